"""Records what reaches a live scheduler, and lets the production code live through it a second time.

The tape has what comes from outside: requests, aborts, resets, the workers' results, when the tier answered, and
every reading of the clock. A replay builds vLLM's scheduler with kvtier's connector anew from the engine's own
configuration, with the laboratory's virtual tier in place of the LMCache server, and does the same in the same
order. What the virtual tier answers is its own: it is held against what the server answered.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvtier.backend import (
    CommitDone,
    Evicted,
    LookupDone,
    OperationFailed,
    ReserveDone,
    StateChanged,
    TierEvent,
    TierState,
)
from kvtier.replay.virtual_tier import VirtualTier
from kvtier.replay.vllm_engine import injected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.engine.engine_harness import Engine

STARTS = ("lookup", "reserve", "commit")
Answer = tuple[int, Any]


@dataclass(slots=True)
class Decisions:
    """Follows a decision log."""

    entries: list[tuple[str, str, str, dict[str, Any]]] = field(default_factory=list)

    def decided(self, event: str, program: str, request_id: str, entry: dict[str, Any]) -> None:
        self.entries.append((event, program, request_id, entry))


@dataclass(slots=True)
class Tape:
    """What happened.

    Attributes:
        calls: Of vLLM's scheduler: which, and with what.
        clock_s: What the clock said, in the order of asking.
        polls: Of the tier: which operations were answered, by their number, and how.
        decisions: Those of kvtier.
        scheduled: By step: tokens by request.
    """

    calls: list[tuple[str, Any]] = field(default_factory=list)
    clock_s: list[float] = field(default_factory=list)
    polls: list[list[Answer]] = field(default_factory=list)
    decisions: Decisions = field(default_factory=Decisions)
    scheduled: list[dict[str, int]] = field(default_factory=list)


@contextmanager
def recorded(engine: Engine) -> Iterator[Tape]:
    """Record what the engine lives through, which must not have run a step yet."""
    half, tier = engine.half, engine.half.tier
    assert half._steps._last_id == 0, "the engine has a past that the tape would lack"
    assert tier.state is TierState.READY
    assert not tier._pending
    tape = Tape()
    with _shadowed() as shadow:
        _record_clock(half, tape, shadow)
        _record_tier(tier, tape, shadow)
        _record_scheduler(engine.scheduler, tape, shadow)
        half._log._follower = tape.decisions
        try:
            yield tape
        finally:
            half._log._follower = None


def replayed(engine: Engine, tape: Tape) -> Tape:
    """Live through a tape again; what came of it, in the same form."""
    from vllm.v1.structured_output import StructuredOutputManager  # noqa: PLC0415

    live, second = engine.scheduler, Tape()
    slot_bytes = engine.half.facts.slot_bytes
    tier = _TapedTier(engine.half.tier.region.size_bytes // slot_bytes, slot_bytes, tape, second)
    times_s = iter(tape.clock_s)

    def clock() -> float:
        second.clock_s.append(next(times_s))
        return second.clock_s[-1]

    with injected(clock, tier):
        scheduler = type(live)(
            vllm_config=live.vllm_config,
            kv_cache_config=live.kv_cache_config,
            structured_output_manager=StructuredOutputManager(live.vllm_config),
            block_size=live.block_size,
            log_stats=live.log_stats,
        )
    half = scheduler.connector.scheduler_half
    half._log._follower = second.decisions
    engine.make_recompute_dear(half)
    outputs: list[Any] = []
    for name, what in tape.calls:
        if name == "add_request":
            scheduler.add_request(_request(what, engine.core.engine_core.engine_core))
        elif name == "schedule":
            outputs.append(scheduler.schedule(*what))
            second.scheduled.append(dict(outputs[-1].num_scheduled_tokens))
        elif name == "update_from_output":
            scheduler.update_from_output(outputs[what[0]], copy.deepcopy(what[1]))
        else:
            getattr(scheduler, name)(*what)
    assert scheduler.connector.scheduler_half is half, "kvtier gave up in the replay"
    scheduler.shutdown()
    return second


class _TapedTier(VirtualTier):
    """Gives its answers when the server gave the same ones."""

    def __init__(self, n_slots: int, slot_bytes: int, tape: Tape, second: Tape) -> None:
        super().__init__(n_slots, slot_bytes)
        self._polls = iter(tape.polls)
        self._second = second
        self._open: dict[int, TierEvent] = {}

    def poll(self, now_s: float, wait_s: float = 0.0) -> list[TierEvent]:
        for event in super().poll(now_s, wait_s):
            assert not isinstance(event, StateChanged | Evicted), "the tier had room for all"
            self._open[event.op_id] = event
        # Operations are numbered from 1 in both.
        due = [self._open.pop(number) for number, _ in next(self._polls, [])]
        self._second.polls.append([_answer(event, 0) for event in due])
        return due


def _record_clock(half: Any, tape: Tape, shadow: Callable[..., None]) -> None:
    clock = half._clock

    def read() -> float:
        tape.clock_s.append(clock())
        return tape.clock_s[-1]

    for part in (half, *vars(half).values()):
        if getattr(part, "_clock", None) is clock:
            shadow(part, "_clock", read)


def _record_tier(tier: Any, tape: Tape, shadow: Callable[..., None]) -> None:
    poll, numbers = tier.poll, {}

    def starts(name: str) -> Callable[..., int]:
        start = getattr(tier, name)

        def started(*args: Any, **kwargs: Any) -> int:
            op_id = int(start(*args, **kwargs))
            numbers[op_id] = len(numbers) + 1
            return op_id

        return started

    def polled(now_s: float, wait_s: float = 0.0) -> list[TierEvent]:
        events = poll(now_s, wait_s)
        tape.polls.append([_answer(event, numbers[event.op_id]) for event in events])
        return events

    for name in STARTS:
        shadow(tier, name, starts(name))
    shadow(tier, "poll", polled)


def _record_scheduler(scheduler: Any, tape: Tape, shadow: Callable[..., None]) -> None:
    outputs: list[Any] = []
    schedule, update = scheduler.schedule, scheduler.update_from_output

    def scheduled(*args: Any) -> Any:
        tape.calls.append(("schedule", args))
        outputs.append(schedule(*args))
        tape.scheduled.append(dict(outputs[-1].num_scheduled_tokens))
        return outputs[-1]

    def updated(output: Any, computed: Any) -> Any:
        step = next(i for i, known in enumerate(outputs) if known is output)
        tape.calls.append(("update_from_output", (step, copy.deepcopy(computed))))
        return update(output, computed)

    def noted(name: str, take: Callable[..., Any]) -> Callable[..., Any]:
        method = getattr(scheduler, name)

        def call(*args: Any) -> Any:
            tape.calls.append((name, take(*args)))
            return method(*args)

        return call

    shadow(scheduler, "schedule", scheduled)
    shadow(scheduler, "update_from_output", updated)
    shadow(scheduler, "add_request", noted("add_request", _fields))
    for name in ("finish_requests", "reset_prefix_cache"):
        shadow(scheduler, name, noted(name, lambda *args: copy.deepcopy(args)))


_FIELDS = ("request_id", "sampling_params", "pooling_params", "cache_salt", "session_id")


def _fields(request: Any) -> dict[str, Any]:
    fields = {name: copy.deepcopy(getattr(request, name)) for name in _FIELDS}
    prompt = list(request.prompt_token_ids)
    return {**fields, "prompt_token_ids": prompt, "arrival_time": request.arrival_time}


def _request(fields: dict[str, Any], core: Any) -> Any:
    from vllm.v1.request import Request  # noqa: PLC0415

    return Request(**copy.deepcopy(fields), block_hasher=core.request_block_hasher)


def _answer(event: Any, number: int) -> Answer:
    """An answer without what differs between servers: ids, and where chunks lie."""
    number = number or event.op_id
    match event:
        case LookupDone():
            return number, ["lookup", event.hit_chunks]
        case ReserveDone():
            return number, ["reserve", [[slot >= 0 for slot in row] for row in event.slots]]
        case CommitDone():
            return number, ["commit", event.resident_chunks]
        case OperationFailed():
            return number, ["failed", event.reason]
    message = f"the tier did not stay: {event}"
    raise AssertionError(message)


@contextmanager
def _shadowed() -> Iterator[Callable[..., None]]:
    """Replace attributes of objects, and give them back."""
    before: list[tuple[Any, str, Any]] = []

    def shadow(owner: Any, name: str, value: Any) -> None:
        before.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    try:
        yield shadow
    finally:
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
