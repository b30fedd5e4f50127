"""What admission goes by, and what it answers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, Literal, TypeVar, get_args

if TYPE_CHECKING:
    from kvtier.shared_blocks import Beginning

Key = TypeVar("Key", bound=Hashable)

Mode = Literal["off", "program_fcfs", "working_set"]
Reason = Literal[
    "off",
    "not_waiting",
    "retry",
    "deferred_long_enough",
    "nothing_running",
    "first_in_order",
    "older_waiting",
    "working_set_full",
    "no_free_blocks",
    "lets_pass",
]
_DEFERRALS: Final[frozenset[Reason]] = frozenset(
    {"older_waiting", "working_set_full", "no_free_blocks", "lets_pass"}
)


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Settings of admission.

    Attributes:
        mode: "off" admits all; "program_fcfs" orders by program; "working_set" also holds new
            programs back until they fit.
        aging_s: The longest patience, and that of new programs: waiting time after which a request
            comes before all that have waited for less, and a new program is no longer held back for
            the working set's sake; 0 turns both off.
        max_defer_s: Longest time from a request's first deferral to its admission.
        blocked_after_s: An admitted request that has not started for this long (there is no room
            for it) no longer holds others back.
        stale_scans: A request that the engine did not ask for in this many passes over its queue
            (it waits for a grammar, say) no longer holds others back.
        headroom_fraction: Share of the KV cache that the working set leaves free.
        overcommit: New programs begin while the blocks that programs are expected to want at a time
            are no more than so many times the KV cache. Above 1, as the CPU tier takes what is too
            much for a moment, and blocks that nobody uses are lost for good.
        long_pause_s: A pause counts towards the working set for this long even without KV.
        backfill_turns: A request for which there is no room lets others pass for so many mean turn
            times, from when there first was none; 0: nobody passes.
    """

    mode: Mode = "working_set"
    aging_s: float = 600.0
    max_defer_s: float = 3600.0
    blocked_after_s: float = 5.0
    stale_scans: int = 8
    headroom_fraction: float = 0.05
    overcommit: float = 1.2
    long_pause_s: float = 10.0
    backfill_turns: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings that could hold a request back for ever."""
        for name in ("aging_s", "max_defer_s", "blocked_after_s", "long_pause_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number of seconds, at least 0")
        if not 0 <= self.backfill_turns < float("inf"):
            raise ValueError("backfill_turns must be a finite number of turns, at least 0")
        if not 0 < self.overcommit < float("inf"):
            raise ValueError("overcommit must be positive and finite")
        if self.stale_scans < 1 or not 0 <= self.headroom_fraction < 1:
            raise ValueError("stale_scans must be positive, headroom_fraction in [0, 1)")

    @property
    def longest_patience_s(self) -> float:
        """`aging_s`, infinite where that is off."""
        return self.aging_s or float("inf")


@dataclass(frozen=True, slots=True)
class AdmissionView:
    """The engine between two steps.

    Attributes:
        now_s: The time.
        free_blocks: KV blocks that an allocation can take.
        total_blocks: All KV blocks.
        running_requests: Requests in the step before.
        pinned_blocks: KV blocks held by pins alone; they are released for a request in need.
        tier_blocks: KV blocks that fit in the CPU tier; 0 without one.
        round_s: Seconds to serve all busy programs but one a turn, computing contexts anew; 0: unknown.
        open_places: Requests that the batch can take besides those that run.
        step_blocks: Blocks of tokens that a step can compute besides them; 0: unknown.
    """

    now_s: float
    free_blocks: int
    total_blocks: int
    running_requests: int
    pinned_blocks: int = 0
    tier_blocks: int = 0
    round_s: float = 0.0
    open_places: int = 0
    step_blocks: int = 0


# eq=False: compared by identity; heaps compare keys, which end in a sequence number.
@dataclass(slots=True, eq=False)
class Waiting(Generic[Key]):
    """A request that waits, as admission sees it.

    Attributes:
        program: Its program.
        is_new_program: The program has not run a turn before.
        priority: vLLM's; less is more urgent.
        context_blocks: Blocks that its context is expected to take.
        since_s: When it came.
        order: Its place by the arrival of its program: priority, time, sequence number.
        line: Its place by waiting time, likewise.
        asked_scan: The pass over the queue in which the engine last asked for it.
        asked: Whether it ever did.
        in_heaps: Which heaps it is in.
        gone: It waits no more.
        lacks_room: Its allocation had failed, and would have again, when it was last judged.
        needed_blocks: Those that it did not find in the prefix cache when it was asked for; before, all.
        deferred_since_s: When it was first deferred.
        admitted_since_s: When it was first admitted, or was again after it had let others pass.
        lacks_since_s: When there was first no room for it.
        lets_pass: Others may pass it now.
        beginning: What its prompt begins with.
    """

    program: Key
    is_new_program: bool
    priority: int
    context_blocks: int
    since_s: float
    order: tuple[int, float, int]
    line: tuple[int, float, int]
    asked_scan: int
    asked: bool = False
    in_heaps: set[int] = field(default_factory=set)
    gone: bool = False
    needed_blocks: int = 0
    deferred_since_s: float | None = None
    admitted_since_s: float | None = None
    lacks_since_s: float | None = None
    lets_pass: bool = False
    lacks_room: bool = False
    beginning: Beginning = ()

    def line_up(self, now_s: float) -> None:
        """Others may pass it no more: it holds those behind it back."""
        if self.lets_pass and self.admitted_since_s is not None:
            self.admitted_since_s = now_s
        self.lets_pass = False


@dataclass(frozen=True, slots=True)
class AdmissionDecision:
    """Whether a request may start in this step, and why.

    Attributes:
        admit: It may.
        reason: Why, or why not.
        lets_pass: There is no room for it, and it holds nobody back for now.
    """

    admit: bool
    reason: Reason
    lets_pass: bool = False


DECISIONS: Final[Mapping[Reason, AdmissionDecision]] = {
    reason: AdmissionDecision(admit=reason not in _DEFERRALS, reason=reason)
    for reason in get_args(Reason)
    if reason != "lets_pass"
}
"""All but those that let others pass, made once: they are needed thousands of times a second."""
