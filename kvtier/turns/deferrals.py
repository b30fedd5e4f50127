"""Whom admission has deferred, so that being asked again in every step costs next to nothing.

vLLM asks its connector about every waiting request in every step. A deferral stands until something has
changed that could end it: a request has started, nothing runs any more, the working set has shrunk, memory has
become free for who lacks it, or `RECHECK_S` has passed, as admission's own limits are seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.admission import AdmissionController
    from kvtier.admission_facts import AdmissionView
    from kvtier.stats import Stats

RECHECK_S: Final = 0.5
COUNT_INTERVAL_S: Final = 0.5
"""Deferrals that stood are counted so often."""

_LASTING: Final = frozenset({"older_waiting", "working_set_full", "lets_pass"})
"""The reasons that do not depend on what is free right now, or only on whether more becomes free."""


class Memory(Protocol):
    """What deferrals go by of `kvtier.turns.room`."""

    @property
    def most_blocks(self) -> int:
        """The most blocks that there are for a request."""

    def lacks(self, request_id: str, need_blocks: int, /) -> bool:
        """Whether its allocation has failed, and would again."""


class Deferrals:
    """Asks admission where it must.

    Args:
        admission: Who decides.
        read_view: Returns the engine's state at a time.
        stats: Counts deferrals.
        read_room: Returns who knows for whom there is no room; asked for when there is memory.
    """

    def __init__(
        self,
        admission: AdmissionController[str],
        read_view: Callable[[float], AdmissionView],
        stats: Stats,
        read_room: Callable[[], Memory],
    ) -> None:
        self._admission = admission
        self._read_view = read_view
        self._stats = stats
        self._read_room = read_room
        self._reasons: dict[str, str] = {}
        # For whom there is no room, and who lets others pass; and the blocks that there were at the last step's end.
        self._passed: dict[str, None] = {}
        self._room_blocks = 0
        self._repeated: dict[str, int] = dict.fromkeys(_LASTING, 0)
        self._recheck_s = self._count_s = float("-inf")
        self._working_set_blocks = 0
        self._running = 0
        self._view_is_old = True
        self._view_s = float("-inf")

    def stands(self, request_id: str) -> bool:
        """Whether a request was deferred before, and nothing has changed for it."""
        reason = self._reasons.get(request_id)
        if reason is None:
            if self._view_is_old or not self._admission.still_waits(request_id):
                return False
            reason = "older_waiting"
            self._remember(request_id, reason)
        self._repeated[reason] += 1
        return True

    def decide(self, request_id: str, needed_blocks: int, now_s: float) -> bool:
        """Whether a request may start now; see `AdmissionController.decide`."""
        if self._view_is_old:
            self._view_is_old = False
            # While deferrals stand, those who have them are not asked: the pass goes on.
            self._view_s = now_s
            self._admission.begin_step(self._read_view(now_s), same_scan=bool(self._reasons))
            self._working_set_blocks = self._admission.working_set_blocks
        room = self._read_room()
        lacks_room = room.lacks(request_id, needed_blocks)
        verdict = self._admission.decide(request_id, needed_blocks, now_s, lacks_room=lacks_room)
        if not verdict.lets_pass:
            self._passed.pop(request_id, None)
        elif request_id not in self._passed:
            self._passed[request_id] = None
            # Who was held back for its sake, and comes behind it in the queue, may be next.
            self._reasons.clear()
        if verdict.admit:
            return True
        if verdict.reason in _LASTING:
            self._remember(request_id, verdict.reason)
        self._stats.count("deferrals", 1, verdict.reason)
        return False

    def _remember(self, request_id: str, reason: str) -> None:
        if not self._reasons:
            self._recheck_s = self._view_s + RECHECK_S
        self._reasons[request_id] = reason

    def started(self) -> None:
        """A request has its blocks: who waited behind it may be next."""
        self._reasons.clear()

    def finished(self, request_id: str) -> None:
        """A request is over; with the last one that runs, every deferral ends."""
        self._reasons.pop(request_id, None)
        self._passed.pop(request_id, None)
        self._running -= 1
        if self._running <= 0:
            self._reasons.clear()
        else:
            self._memory_became_free()

    def step_ended(self, now_s: float, running_requests: int) -> None:
        """A step was scheduled, with so many requests in it or loading."""
        self._view_is_old = True
        self._running = running_requests
        if now_s >= self._count_s:
            self._count_s = now_s + COUNT_INTERVAL_S
            self._count_repeated()
        if not self._reasons:
            return
        if self._passed:
            blocks = self._read_room().most_blocks
            if blocks > self._room_blocks:
                self._memory_became_free()
            self._room_blocks = blocks
        shrunk = self._admission.working_set_blocks < self._working_set_blocks
        if shrunk or not running_requests or now_s >= self._recheck_s:
            self._reasons.clear()

    def _count_repeated(self) -> None:
        """Not in every step, most of which do little else."""
        for reason, times in self._repeated.items():
            if times:
                self._stats.count_quietly("deferrals", times, reason)
                self._repeated[reason] = 0

    def _memory_became_free(self) -> None:
        for request_id in self._passed:
            self._reasons.pop(request_id, None)
