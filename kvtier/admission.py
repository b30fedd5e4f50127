"""Which waiting request may start now: order and admission by program.

vLLM asks its connector once per waiting request and step whether the request may be looked up; a
"not now" defers it to the next step. This controller answers, before anything is looked up.

Order. By vLLM's priority, where requests have different ones. Among equals, requests that have waited for
longer than their *patience* come first, the longest waiting ahead; then the others by the arrival of their
program. So older programs finish first, which makes
the mean job completion time short, and yet nobody waits long for one token. The patience of a returning
turn is the time that serving the other busy programs a turn each would take if their contexts had to be
computed anew, at most ``aging_s``: the wait in an engine that keeps nothing. Aging by time alone would not
do: where all wait for longer than that, the order becomes first come, first served, the worst for
completion times. A program's first turn has more patience, ``aging_s``: it waits once, before its
program begins, instead of many times while its tools have answered.

Working set. A program that is new is admitted only while the contexts of the programs that run or wait to
go on, its own included, fit in the KV cache, and are expected to fit when they have grown
(`demand_forecast`); and those of the programs that pause for a short time fit besides, in the KV cache or
the CPU tier. So nothing is begun whose KV would have to be thrown away, or that would have to wait halfway.

No deadlock. A request holds younger ones back only while the engine really asks for it and has not
admitted it in vain for ``blocked_after_s``; nobody is deferred for longer than ``max_defer_s``; and
if nothing runs, the first in order of those that were asked for last time is let through.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Final, Generic

from kvtier.admission_facts import AdmissionConfig, AdmissionDecision, AdmissionView, Key, Waiting
from kvtier.demand_forecast import DemandForecast
from kvtier.working_set import WorkingSet

_COMPACT_FROM: Final = 64
_RETURNING, _NEW, _RETURNING_LINE, _NEW_LINE = range(4)
_LINES = _RETURNING_LINE, _NEW_LINE

MIN_PATIENCE_S: Final = 1.0
"""Below this, an order by program would only be noise."""


_HeapItem = tuple[tuple[int, float, int], Waiting[Key]]


class AdmissionController(Generic[Key]):
    """Answers for each waiting request and step whether it may start.

    Each call costs O(log n) amortised in the number of waiting requests.
    """

    def __init__(self, config: AdmissionConfig | None = None) -> None:
        self.config = config or AdmissionConfig()
        self._waiting: dict[str, Waiting[Key]] = {}
        self._started: dict[str, Waiting[Key]] = {}
        # How many of them have which priority, and the largest; None: to be found out.
        self._priorities: Counter[int] = Counter()
        self._least_urgent: int | None = None
        # Returning turns, and turns of new programs, which may be unable to start: by program, and by
        # waiting time.
        self._heaps: tuple[list[_HeapItem[Key]], ...] = ([], [], [], [])
        self._new_blocks = 0
        self._new_requests = 0
        self._sequence = 0
        self._scan = 0
        self._scan_open = False
        self._view = AdmissionView(now_s=0.0, free_blocks=0, total_blocks=0, running_requests=0)
        # Requests that started less those that ended since the view was taken.
        self._running_since_view = 0
        self._now_s = float("-inf")
        self.patience_s = self._patience_s()
        """Waiting time after which a returning request comes before all that have waited for less."""
        self._working_set: WorkingSet[Key] = WorkingSet(self.config.long_pause_s)
        self._forecast: DemandForecast[Key] = DemandForecast()
        # Of `_forecast`, until something happens: what was asked, and its answer.
        self._peak_blocks: tuple[int, float] | None = None

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting)

    @property
    def working_set_blocks(self) -> int:
        """Blocks that the busy programs are expected to take."""
        return self._working_set.blocks

    @property
    def busy(self) -> tuple[int, int]:
        """Programs that run, pause for a short time or wait to begin, and the blocks they take."""
        n_programs = len(self._working_set) + self._new_requests
        return n_programs, self._working_set.blocks + self._new_blocks

    def on_arrival(
        self,
        request_id: str,
        program: Key,
        *,
        program_arrival_s: float,
        returning: bool,
        context_blocks: int,
        now_s: float,
        priority: int = 0,
    ) -> None:
        """Take in a request that begins to wait; known ones are left as they are.

        Args:
            request_id: The request.
            program: Identity of its program (any hashable).
            program_arrival_s: When the program's first turn arrived.
            returning: The program has run a turn before.
            context_blocks: Blocks that its context is expected to take.
            now_s: The time of arrival.
            priority: vLLM's; less is more urgent.
        """
        self._now_s = max(self._now_s, now_s)
        if request_id in self._waiting or request_id in self._started:
            return
        self._sequence += 1
        entry = Waiting(
            program,
            is_new_program=not returning,
            priority=priority,
            context_blocks=context_blocks,
            since_s=now_s,
            order=(priority, program_arrival_s, self._sequence),
            line=(priority, now_s, self._sequence),
            asked_scan=self._scan,
        )
        self._waiting[request_id] = entry
        if entry.is_new_program:
            self._new_blocks += context_blocks
            self._new_requests += 1
        else:
            self._working_set.wait(program, context_blocks)
            self._forecast.turn_waits(program, now_s)
            self._peak_blocks = None
        self._push(entry)

    def on_started(self, request_id: str) -> None:
        """Count a request that got its blocks; a preempted one that resumes is known already."""
        entry = self._waiting.pop(request_id, None)
        if entry is None:
            return
        self._leave(entry)
        self._started[request_id] = entry
        self._priorities[entry.priority] += 1
        self._least_urgent = None
        self._forecast.turn_starts(entry.program, entry.context_blocks, self._now_s)
        self._peak_blocks = None
        self._running_since_view += 1
        self._working_set.start(
            entry.program, entry.context_blocks, waited=not entry.is_new_program
        )

    def on_turn_ended(
        self,
        request_id: str,
        *,
        context_blocks: int,
        goes_on: bool,
        gap_s: float,
        now_s: float,
    ) -> None:
        """Note that a turn is over; its program pauses.

        Args:
            request_id: The request.
            context_blocks: Blocks of its prompt and output.
            goes_on: It has called a tool, so its program comes back with the result.
            gap_s: Mean pause after such turns.
            now_s: The time.
        """
        self._now_s = max(self._now_s, now_s)
        program = self._ends(request_id)
        if program is not None:
            self._forecast.turn_ends(program, context_blocks, now_s, goes_on=goes_on, gap_s=gap_s)
            self._pauses(program)
        else:
            self.on_aborted(request_id)

    def on_aborted(self, request_id: str) -> None:
        """Drop a request that went and left nothing behind."""
        entry = self._waiting.pop(request_id, None)
        if entry is not None:
            self._leave(entry)
            if not entry.is_new_program:
                self._working_set.give_up(entry.program, self._now_s)
                self._forecast.turn_vanishes(entry.program, self._now_s, started=False)
                self._peak_blocks = None
            return
        program = self._ends(request_id)
        if program is not None:
            self._forecast.turn_vanishes(program, self._now_s, started=True)
            self._pauses(program)

    def on_kv_pinned(self, program: Key) -> None:
        """Note that a paused program's KV is held in GPU memory: it counts until released."""
        self._working_set.hold(program)

    def on_kv_released(self, program: Key) -> None:
        """Note that a paused program's KV is no longer held in GPU memory."""
        self._working_set.release(program, self._now_s)

    def on_program_ended(self, program: Key) -> None:
        """Stop counting a program that is over or forgotten."""
        self._working_set.end(program)
        self._forecast.program_ends(program)
        self._peak_blocks = None

    def begin_step(self, view: AdmissionView, *, same_scan: bool = False) -> None:
        """Take the state of the engine; what is asked from here on belongs to one step.

        Args:
            view: The state.
            same_scan: Not everybody who waits will be asked: this is no new pass over the queue.
        """
        self._now_s = max(self._now_s, view.now_s)
        self._view = view
        self._scan_open &= same_scan
        self._running_since_view = 0
        self._peak_blocks = None
        self.patience_s = self._patience_s()
        self._working_set.expire(view.now_s)

    def decide(self, request_id: str, needed_blocks: int, now_s: float) -> AdmissionDecision:
        """Decide whether a waiting request may start now.

        Args:
            request_id: The request; one that does not wait (preempted, unknown) is admitted.
            needed_blocks: Blocks that it needs beyond those in the prefix cache.
            now_s: The time.
        """
        self._now_s = max(self._now_s, now_s)
        if self.config.mode == "off":
            return AdmissionDecision(admit=True, reason="off")
        entry = self._waiting.get(request_id)
        if entry is None:
            return AdmissionDecision(admit=True, reason="not_waiting")
        if not self._scan_open:
            self._scan_open = True
            self._scan += 1
        decision = self._judge(entry, needed_blocks, now_s)
        entry.asked_scan = self._scan
        entry.asked = True
        if decision.admit:
            if entry.admitted_since_s is None:
                entry.admitted_since_s = now_s
        elif entry.deferred_since_s is None:
            entry.deferred_since_s = now_s
        if not self._is_blocked(entry, now_s):
            self._push(entry)
        return decision

    def _ends(self, request_id: str) -> Key | None:
        entry = self._started.pop(request_id, None)
        if entry is None:
            return None
        self._priorities[entry.priority] -= 1
        if not self._priorities[entry.priority]:
            del self._priorities[entry.priority]
        self._least_urgent = None
        return entry.program

    def _pauses(self, program: Key) -> None:
        self._running_since_view -= 1
        # Here too: in shadow mode and off, nobody asks who may start.
        self._working_set.expire(self._now_s)
        self._working_set.pause(program, self._now_s)
        self._peak_blocks = None

    def _patience_s(self) -> float:
        longest_s = self._longest_patience_s()
        if self._view.round_s <= 0 or self.config.aging_s == 0:
            return longest_s
        return min(longest_s, max(MIN_PATIENCE_S, self._view.round_s))

    def _longest_patience_s(self) -> float:
        return self.config.aging_s or float("inf")

    def _judge(self, entry: Waiting[Key], needed_blocks: int, now_s: float) -> AdmissionDecision:
        deferred = entry.deferred_since_s
        if deferred is not None and now_s - deferred >= self.config.max_defer_s:
            return AdmissionDecision(admit=True, reason="deferred_long_enough")
        idle = self._view.running_requests + self._running_since_view <= 0
        # Also where it was admitted before, but there was no room: an older program has come since.
        if self._is_held_back(entry, now_s, idle=idle):
            return AdmissionDecision(admit=False, reason="older_waiting")
        if entry.admitted_since_s is not None:
            return AdmissionDecision(admit=True, reason="retry")
        if idle:
            return AdmissionDecision(admit=True, reason="nothing_running")
        if self._is_gated(entry, now_s):
            return self._judge_new_program(entry, needed_blocks)
        return AdmissionDecision(admit=True, reason="first_in_order")

    def _judge_new_program(self, entry: Waiting[Key], needed_blocks: int) -> AdmissionDecision:
        if not self._fits(entry, needed_blocks):
            return AdmissionDecision(admit=False, reason="working_set_full")
        if needed_blocks > self._view.free_blocks + self._view.pinned_blocks:
            # Its allocation would fail, and vLLM then tries nobody behind it in this step.
            return AdmissionDecision(admit=False, reason="no_free_blocks")
        return AdmissionDecision(admit=True, reason="first_in_order")

    def _is_held_back(self, entry: Waiting[Key], now_s: float, *, idle: bool) -> bool:
        """Whether a request that comes first in order is itself able to start."""
        lines = (self._first(line, now_s, idle=idle) for line in _LINES)
        aged = [one for one in lines if one is not None and self._is_aged(one, now_s)]
        is_aged = self._is_aged(entry, now_s)
        if is_aged and any(one.line < entry.line for one in aged):
            return True
        if not is_aged and any(one.priority <= entry.priority for one in aged):
            return True
        for heap in (_RETURNING, _NEW):
            other = self._first(heap, now_s, idle=idle)
            if other is None or other.order >= entry.order:
                continue
            if is_aged and other.priority == entry.priority:
                continue
            # New programs wait in line even behind one that does not fit: passed by every smaller
            # one, it would never fit.
            in_line = self._is_gated(entry, now_s)
            if idle or in_line or not self._is_gated(other, now_s) or self._fits(other):
                return True
        return False

    def _first(self, heap: int, now_s: float, *, idle: bool) -> Waiting[Key] | None:
        """Return the first request that may hold others back, parking those that may not."""
        items = self._heaps[heap]
        while items:
            entry = items[0][1]
            if not entry.gone and self._competes(entry, now_s, idle=idle):
                return entry
            heapq.heappop(items)
            entry.in_heaps.discard(heap)
        return None

    def _competes(self, entry: Waiting[Key], now_s: float, *, idle: bool) -> bool:
        if self._is_blocked(entry, now_s):
            return False
        if idle:
            # Nothing runs: only one that the engine is sure to ask for may hold others back.
            return entry.asked and entry.asked_scan >= self._scan - 1
        return entry.asked_scan >= self._scan - self.config.stale_scans

    def _fits(self, entry: Waiting[Key], needed_blocks: int = 0) -> bool:
        share = 1.0 - self.config.headroom_fraction
        room_blocks = int(self._view.total_blocks * share)
        all_blocks = room_blocks + int(self._view.tier_blocks * share)
        blocks = max(entry.context_blocks, needed_blocks)
        if not self._working_set.fits(entry.program, blocks, room_blocks, all_blocks):
            return False
        return (
            self._expected_peak_blocks(blocks) <= self._view.total_blocks * self.config.overcommit
        )

    def _expected_peak_blocks(self, blocks: int) -> float:
        if self._peak_blocks is None or self._peak_blocks[0] != blocks:
            self._peak_blocks = (
                blocks,
                self._forecast.peak_blocks(blocks, self._now_s, self._view.total_blocks),
            )
        return self._peak_blocks[1]

    def _is_aged(self, entry: Waiting[Key], now_s: float) -> bool:
        """Whether the request has waited for so long that waiting alone decides."""
        patience_s = self._longest_patience_s() if entry.is_new_program else self.patience_s
        return now_s - entry.since_s >= patience_s

    def _is_gated(self, entry: Waiting[Key], now_s: float) -> bool:
        """Whether the working set decides about this request: a new program that is not aged.

        Nor more urgent than something that runs: what that takes is not to keep this one waiting.
        """
        if self.config.mode != "working_set" or not entry.is_new_program:
            return False
        if self._least_urgent is None:
            self._least_urgent = max(self._priorities, default=entry.priority)
        return entry.priority >= self._least_urgent and not self._is_aged(entry, now_s)

    def _is_blocked(self, entry: Waiting[Key], now_s: float) -> bool:
        admitted = entry.admitted_since_s
        return admitted is not None and now_s - admitted >= self.config.blocked_after_s

    def _push(self, entry: Waiting[Key]) -> None:
        heaps = (_NEW, _NEW_LINE) if entry.is_new_program else (_RETURNING, _RETURNING_LINE)
        for heap in heaps:
            if heap not in entry.in_heaps:
                entry.in_heaps.add(heap)
                key = entry.line if heap in _LINES else entry.order
                heapq.heappush(self._heaps[heap], (key, entry))

    def _leave(self, entry: Waiting[Key]) -> None:
        """Take a request out of its heaps: lazily, but they stay in proportion."""
        entry.gone = True
        if entry.is_new_program:
            self._new_blocks -= entry.context_blocks
            self._new_requests -= 1
        for items in self._heaps:
            if len(items) > _COMPACT_FROM + 2 * len(self._waiting):
                items[:] = [item for item in items if not item[1].gone]
                heapq.heapify(items)
