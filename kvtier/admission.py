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
program begins, instead of many times while its tools have answered. Returning turns that could all start in
one step wait for nobody: vLLM may ask for them in any order (`waiting_front`).

Working set. A program that is new is admitted only while the contexts of the programs that run or wait to
go on, its own included, fit in the KV cache, and are expected to fit when they have grown
(`demand_forecast`); and those of the programs that pause for a short time fit besides, in the KV cache or
the CPU tier. So nothing is begun whose KV would have to be thrown away, or that would have to wait halfway.

Backfill. vLLM stops at the first request that does not fit, so that everybody behind it waits though memory for
them may be free; and new programs wait in line. A request for which there is no room lets others pass
instead, for as long as a mean turn takes (``backfill_turns``); from then on, and once it has aged, it comes
first, and memory is left for it as it becomes free.

No deadlock. A request holds younger ones back only while the engine really asks for it and has not
admitted it in vain for ``blocked_after_s``; nobody is deferred for longer than ``max_defer_s``; and
if nothing runs, the first in order of those that were asked for last time is let through.
"""

from __future__ import annotations

from typing import Final

from kvtier.admission_facts import (
    DECISIONS,
    AdmissionConfig,
    AdmissionDecision,
    AdmissionView,
    Key,
    Waiting,
)
from kvtier.programs_at_work import ProgramsAtWork
from kvtier.waiting_front import Order, last_of_front
from kvtier.waiting_lines import (
    BY_PROGRAM,
    BY_WAITING,
    LINES_OF_EACH,
    NEW,
    RETURNING,
)

_NO_ROOM: Final = frozenset({"working_set_full", "no_free_blocks"})
_IN_ORDER: Final = frozenset({"first_in_order", "retry"})

MIN_PATIENCE_S: Final = 1.0
"""Below this, an order by program would only be noise."""


class AdmissionController(ProgramsAtWork[Key]):
    """Answers for each waiting request and step whether it may start.

    Each call costs O(log n) amortised in the number of waiting requests.
    """

    def __init__(self, config: AdmissionConfig | None = None) -> None:
        super().__init__(config or AdmissionConfig())
        self._scan_open = False
        self.patience_s = self._patience_s()
        """Waiting time after which a returning request comes before all that have waited for less."""
        # The last of those that return and could all start in this step; and when that was found out.
        self._front: Order | None = None
        self._front_known = self._front_idle = False
        # Who held others back last, by line: the first of those who return, and of the new ones.
        self._holders: dict[int, Waiting[Key]] = {}

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
        self._front_known = False
        self._peak_blocks = None
        self.patience_s = self._patience_s()
        self._working_set.expire(view.now_s)

    def decide(
        self, request_id: str, needed_blocks: int, now_s: float, *, lacks_room: bool = False
    ) -> AdmissionDecision:
        """Decide whether a waiting request may start now.

        Args:
            request_id: The request; one that does not wait (preempted, unknown) is admitted.
            needed_blocks: Blocks that it needs beyond those in the prefix cache.
            now_s: The time.
            lacks_room: Its allocation has failed, and would again.
        """
        self._now_s = max(self._now_s, now_s)
        if self.config.mode == "off":
            return DECISIONS["off"]
        entry = self._waiting.get(request_id)
        if entry is None:
            return DECISIONS["not_waiting"]
        if not self._scan_open:
            self._scan_open = True
            self._scan += 1
        entry.needed_blocks, entry.lacks_room = needed_blocks, lacks_room
        decision = self._judge(entry, needed_blocks, now_s)
        if decision.reason in _NO_ROOM or (lacks_room and decision.reason in _IN_ORDER):
            decision = self._let_pass(entry, decision, now_s)
        elif entry.lets_pass:
            entry.line_up(now_s)
        entry.asked_scan = self._scan
        entry.asked = True
        if decision.admit:
            if entry.admitted_since_s is None:
                entry.admitted_since_s = now_s
        elif entry.deferred_since_s is None:
            entry.deferred_since_s = now_s
        if not entry.lets_pass and not self._is_blocked(entry, now_s):
            self._lines.put(entry)
        return decision

    def still_waits(self, request_id: str) -> bool:
        """Whether `decide` would say `older_waiting` once more; what False means, only `decide` can say.

        Where many wait, nearly all of them are asked in vain each time that one starts. Who held back the one
        asked before most likely holds back this one, too: for that, nothing need be looked for.
        """
        entry = self._waiting.get(request_id)
        if entry is None or entry.deferred_since_s is None or entry.admitted_since_s is not None:
            return False
        now_s = self._now_s
        if (
            not self._scan_open
            or self._view.running_requests + self._running_since_view <= 0
            or entry.lets_pass
            or len(entry.in_heaps) < LINES_OF_EACH
            or now_s - entry.deferred_since_s >= self.config.max_defer_s
            or self._is_aged(entry, now_s)
            or self._is_in_front(entry, now_s, idle=False)
        ):
            return False
        for heap, holder in self._holders.items():
            if (
                holder.order < entry.order
                and heap in holder.in_heaps
                and self._competes(holder, now_s, idle=False)
                and (heap == RETURNING or self._is_gated(entry, now_s))
            ):
                # As `decide`: who is asked for competes.
                entry.asked_scan = self._scan
                return True
        return False

    def _patience_s(self) -> float:
        longest_s = self.config.longest_patience_s
        if self._view.round_s <= 0 or self.config.aging_s == 0:
            return longest_s
        return min(longest_s, max(MIN_PATIENCE_S, self._view.round_s))

    def _judge(self, entry: Waiting[Key], needed_blocks: int, now_s: float) -> AdmissionDecision:
        deferred = entry.deferred_since_s
        if deferred is not None and now_s - deferred >= self.config.max_defer_s:
            return DECISIONS["deferred_long_enough"]
        idle = self._view.running_requests + self._running_since_view <= 0
        # Also where it was admitted before, but there was no room: an older program has come since.
        if self._is_held_back(entry, now_s, idle=idle):
            return DECISIONS["older_waiting"]
        if idle:
            return DECISIONS["nothing_running"]
        if entry.admitted_since_s is not None:
            return DECISIONS["retry"]
        if self._is_gated(entry, now_s):
            return self._judge_new_program(entry, needed_blocks)
        return DECISIONS["first_in_order"]

    def _let_pass(
        self, entry: Waiting[Key], decision: AdmissionDecision, now_s: float
    ) -> AdmissionDecision:
        """Let others pass a request for which there is no room, for a while."""
        if entry.lacks_since_s is None:
            entry.lacks_since_s = now_s
        until_s = entry.lacks_since_s + self.config.backfill_turns * self._forecast.turn_s
        if now_s >= until_s or self._is_aged(entry, now_s):
            entry.line_up(now_s)
            return decision
        entry.lets_pass, self._front_known = True, False
        reason = "lets_pass" if decision.admit else decision.reason
        return AdmissionDecision(admit=False, reason=reason, lets_pass=True)

    def _judge_new_program(self, entry: Waiting[Key], needed_blocks: int) -> AdmissionDecision:
        if not self._fits(entry, needed_blocks):
            return DECISIONS["working_set_full"]
        if needed_blocks > self._view.free_blocks + self._view.pinned_blocks:
            # Its allocation would fail, and vLLM then tries nobody behind it in this step.
            return DECISIONS["no_free_blocks"]
        return DECISIONS["first_in_order"]

    def _is_held_back(self, entry: Waiting[Key], now_s: float, *, idle: bool) -> bool:
        """Whether a request that comes first in order is itself able to start."""
        is_aged = self._is_aged(entry, now_s)
        for line in BY_WAITING:
            one = self._first(line, now_s, idle=idle)
            if one is None or not self._is_aged(one, now_s):
                continue
            if one.line < entry.line if is_aged else one.priority <= entry.priority:
                return True
        for heap in BY_PROGRAM:
            other = self._first(heap, now_s, idle=idle)
            if other is None or other.order >= entry.order:
                continue
            if is_aged and other.priority == entry.priority:
                continue
            # New programs wait in line even behind one that does not fit: passed by every smaller
            # one, it would never fit.
            in_line = self._is_gated(entry, now_s)
            may_start = idle or not self._is_gated(other, now_s) or self._fits(other)
            if in_line or (may_start and not self._is_in_front(entry, now_s, idle=idle)):
                self._holders[heap] = other
                return True
        return False

    def _is_in_front(self, entry: Waiting[Key], now_s: float, *, idle: bool) -> bool:
        """Whether a returning turn and all before it could start in this step: then it waits for nobody."""
        # Memory that the front counts on may not be had: pins' blocks that others share, what loads have reserved.
        # Let through all the same, it would have vLLM stop at it in every step, before an older one that fits.
        if entry.is_new_program or entry.lacks_room:
            return False
        if not self._front_known or self._front_idle != idle:
            self._front_known, self._front_idle = True, idle
            new = self._first(NEW, now_s, idle=idle)
            if new is not None and self._is_gated(new, now_s) and not self._fits(new):
                new = None
            self._front = last_of_front(
                self._lines.heap(RETURNING),
                lambda one: self._competes(one, now_s, idle=idle),
                self._view,
                spare_blocks=int(self._view.total_blocks * self.config.headroom_fraction),
                before=new,
            )
        return self._front is not None and entry.order <= self._front

    def _first(self, heap: int, now_s: float, *, idle: bool) -> Waiting[Key] | None:
        """Return the first request that may hold others back."""
        return self._lines.first(heap, lambda entry: self._competes(entry, now_s, idle=idle))

    def _competes(self, entry: Waiting[Key], now_s: float, *, idle: bool) -> bool:
        if entry.lets_pass or self._is_blocked(entry, now_s):
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
        beginning = entry.beginning
        if not self._working_set.fits(entry.program, blocks, room_blocks, all_blocks, beginning):
            return False
        repeated_blocks = self._forecast.repeated_blocks(beginning)
        most_blocks = self._view.total_blocks * self.config.overcommit
        return self._expected_peak_blocks(blocks, repeated_blocks) <= most_blocks

    def _expected_peak_blocks(self, blocks: int, repeated_blocks: int) -> float:
        if self._peak_blocks is None or self._peak_blocks[:2] != (blocks, repeated_blocks):
            peak_blocks = self._forecast.peak_blocks(
                blocks, self._now_s, self._view.total_blocks, repeated_blocks
            )
            self._peak_blocks = (blocks, repeated_blocks, peak_blocks)
        return self._peak_blocks[2]

    def _is_aged(self, entry: Waiting[Key], now_s: float) -> bool:
        """Whether the request has waited for so long that waiting alone decides."""
        patience_s = self.config.longest_patience_s if entry.is_new_program else self.patience_s
        return now_s - entry.since_s >= patience_s

    def _is_gated(self, entry: Waiting[Key], now_s: float) -> bool:
        """Whether the working set decides about this request: a new program that is not aged.

        Nor more urgent than something that runs: what that takes is not to keep this one waiting.
        """
        if self.config.mode != "working_set" or not entry.is_new_program:
            return False
        least_urgent = self._priorities.least_urgent(entry.priority)
        return entry.priority >= least_urgent and not self._is_aged(entry, now_s)

    def _is_blocked(self, entry: Waiting[Key], now_s: float) -> bool:
        admitted = entry.admitted_since_s
        return admitted is not None and now_s - admitted >= self.config.blocked_after_s

    def _leave(self, entry: Waiting[Key]) -> None:
        super()._leave(entry)
        for line, holder in list(self._holders.items()):
            if holder is entry:
                del self._holders[line]
