"""The control server's picture of engines and programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvtier import link_messages as link
from kvtier.control import program_picture
from kvtier.control.decision_history import DecisionHistory
from kvtier.control.registry import Registry, RegistryFullError
from tests.unit.control.control_host import GAUGES, POLICY, hello, program

if TYPE_CHECKING:
    from kvtier.control.program_picture import ProgramPicture

NOW_S = 1_700_000_000.0
AGENT = program()


def report(*events: link.Event, engine_id: str = "engine-0", **fields: Any) -> link.Report:
    return link.Report(
        engine_id=engine_id, sent_s=NOW_S, events=list(events), gauges=GAUGES, **fields
    )


def registry_with_engine() -> Registry:
    registry = Registry()
    registry.hello(hello(), NOW_S)
    return registry


def picture_of(registry: Registry, name: str = "agent") -> ProgramPicture:
    ((_, picture),) = registry.find(None, name)
    return picture


def started(at_s: float = NOW_S, request_id: str = "r", turn: int = 1) -> link.TurnStarted:
    return link.TurnStarted(
        at_s=at_s, program=AGENT, request_id=request_id, turn=turn, prompt_tokens=10
    )


def running(request_id: str = "r") -> link.TurnRunning:
    return link.TurnRunning(
        at_s=NOW_S,
        program=AGENT,
        request_id=request_id,
        gpu_tokens=1,
        cpu_tokens=2,
        recomputed_tokens=3,
    )


def ended(at_s: float = NOW_S, request_id: str = "r", **fields: Any) -> link.TurnEnded:
    return link.TurnEnded(
        at_s=at_s,
        program=AGENT,
        request_id=request_id,
        context_tokens=40,
        output_tokens=5,
        **fields,
    )


# -- one program -------------------------------------------------------------------------------------


def test_a_turn_is_followed_from_its_arrival_to_the_pause_after_it() -> None:
    registry = registry_with_engine()
    registry.report(report(started(NOW_S)), NOW_S)
    picture = picture_of(registry)
    assert (picture.activity, picture.turns, picture.started_s) == ("waiting", 1, NOW_S)

    registry.report(report(running()), NOW_S)
    assert picture.activity == "running"

    registry.report(report(ended(NOW_S + 5, tool="bash", predicted_gap_s=3.0)), NOW_S)
    assert (picture.activity, picture.tool, picture.context_tokens) == ("paused", "bash", 40)
    assert picture.predicted_return_s == NOW_S + 8
    assert picture.last_active_s == NOW_S + 5

    registry.report(report(started(NOW_S + 9, "s", 2)), NOW_S)
    assert (picture.activity, picture.tool, picture.predicted_return_s) == ("waiting", None, None)
    assert (picture.turns, picture.started_s) == (2, NOW_S)


def test_a_program_runs_while_any_of_its_requests_does_and_has_no_tool_then() -> None:
    registry = registry_with_engine()
    registry.report(report(started(request_id="a"), started(request_id="b")), NOW_S)
    registry.report(report(running("a"), ended(request_id="b", tool="bash")), NOW_S)
    picture = picture_of(registry)
    assert (picture.activity, picture.tool) == ("running", None)


def test_pins_and_the_cpu_tier_are_counted_in_tokens_with_the_ttl_that_is_left() -> None:
    registry = registry_with_engine()
    events: list[link.Event] = [started(), ended()]
    for request_id, tokens, deadline_s in (("a", 30, 10.0), ("b", 12, 60.0), ("a", 31, 20.0)):
        events.append(
            link.Pinned(
                at_s=NOW_S,
                program=AGENT,
                request_id=request_id,
                tokens=tokens,
                deadline_s=NOW_S + deadline_s,
            )
        )
    events.append(link.Staged(at_s=NOW_S, program=AGENT, tokens=64))
    registry.report(report(*events), NOW_S)
    picture = picture_of(registry)
    assert (picture.pinned_tokens, picture.cpu_tokens) == (43, 64)
    assert picture.ttl_left_s(NOW_S + 15) == 45
    assert picture.ttl_left_s(NOW_S + 100) == 0

    for request_id in "ab":
        end = link.PinEnded(at_s=NOW_S, program=AGENT, request_id=request_id, cause="ttl", tokens=1)
        registry.report(report(end), NOW_S)
    assert (picture.pinned_tokens, picture.ttl_left_s(NOW_S)) == (0, None)


def test_what_follows_the_end_of_a_program_does_not_bring_it_back() -> None:
    registry = registry_with_engine()
    gone = link.ProgramGone(at_s=NOW_S, program=AGENT)
    after = (
        link.PinEnded(at_s=NOW_S, program=AGENT, request_id="r", cause="ended", tokens=1),
        link.Staged(at_s=NOW_S, program=AGENT, tokens=64),
        ended(),
        running(),
    )
    registry.report(report(started(), ended(), gone, *after), NOW_S)
    assert registry.find(None, "agent") == []


# -- engines -----------------------------------------------------------------------------------------


def test_a_program_in_two_engines_is_found_in_both_and_dies_with_neither_alone() -> None:
    registry = registry_with_engine()
    registry.hello(hello("engine-1"), NOW_S)
    for engine_id in ("engine-1", "engine-0"):
        registry.report(report(started(), engine_id=engine_id), NOW_S)
    assert [e.engine_id for e, _ in registry.find(None, "agent")] == ["engine-0", "engine-1"]
    assert registry.program_count() == 2
    assert registry.gone("engine-0") is not None
    assert [e.engine_id for e, _ in registry.find(None, "agent")] == ["engine-1"]
    assert registry.gone("engine-0") is None


def test_a_hello_of_another_process_forgets_the_programs_and_of_the_same_one_keeps_them() -> None:
    registry = registry_with_engine()
    registry.report(report(started()), NOW_S)
    assert registry.hello(hello(), NOW_S) is False
    assert registry.program_count() == 1
    assert registry.hello(hello(pid_start_s=1.0), NOW_S) is True
    assert registry.program_count() == 0


def test_the_first_page_replaces_all_that_was_known_and_the_next_ones_add_to_it() -> None:
    registry = registry_with_engine()
    registry.report(report(started()), NOW_S)
    for number, first in enumerate([True, False, True]):
        state = link.ProgramState(
            program=program(f"p{number}"),
            started_s=NOW_S,
            last_active_s=NOW_S,
            turns=1,
            context_tokens=1,
        )
        page = link.Programs(engine_id="engine-0", programs=[state], first=first)
        registry.programs_page(page, NOW_S)
        names = [picture.key.name for _, picture in registry.programs()]
        assert names == [["p0"], ["p0", "p1"], ["p2"]][number]


def state_of(name: str, turns: int = 1) -> link.ProgramState:
    return link.ProgramState(
        program=program(name), started_s=NOW_S, last_active_s=NOW_S, turns=turns, context_tokens=1
    )


def test_programs_that_are_still_to_be_told_stay_until_the_last_page() -> None:
    """An engine of many programs tells them over many steps: none of them is gone meanwhile."""
    registry = registry_with_engine()

    def told(*names: str, first: bool = False, last: bool = False) -> dict[str, int]:
        states = [state_of(name, turns=2) for name in names]
        page = link.Programs(engine_id="engine-0", programs=states, first=first, last=last)
        registry.programs_page(page, NOW_S)
        return {picture.key.name: picture.turns for _, picture in registry.programs()}

    for name in ("p1", "p2", "p3", "p4"):
        registry.report(report(replace(started(), program=program(name))), NOW_S)
    assert told("p1", first=True) == {"p1": 2, "p2": 1, "p3": 1, "p4": 1}
    registry.report(report(link.ProgramGone(at_s=NOW_S, program=program("p2"))), NOW_S)
    registry.report(report(replace(started(), program=program("new"))), NOW_S)
    assert told("p3") == {"p1": 2, "p3": 2, "p4": 1, "new": 1}
    assert told(last=True) == {"p1": 2, "p3": 2, "new": 1}, "the engine does not know p4"
    assert told("p1", first=True) == {"p1": 2, "p3": 2, "new": 1}
    assert told("p5", first=True, last=True) == {"p5": 2}


def test_tenants_with_the_same_name_are_two_programs() -> None:
    registry = registry_with_engine()
    other = link.TurnStarted(at_s=NOW_S, program=program(tenant="acme"), turn=3, prompt_tokens=1)
    registry.report(report(started(), other), NOW_S)
    ((_, found),) = registry.find("acme", "agent")
    assert found.turns == 3
    assert picture_of(registry).turns == 1


class Changing(dict[str, Any]):
    """Changes whenever it is looked through: another thread is at work."""

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def values(self) -> Any:
        for value in super().values():
            self[f"new-{len(self)}"] = value
            yield value


def test_engines_and_programs_can_be_counted_from_another_thread() -> None:
    registry = registry_with_engine()
    registry._engines = Changing(registry._engines)
    assert [engine.engine_id for engine in registry.engines()] == ["engine-0"]
    assert registry.program_count() == 0


def test_more_engines_than_fit_are_refused_and_change_nothing() -> None:
    registry = Registry(max_engines=1)
    registry.hello(hello(), NOW_S)
    with pytest.raises(RegistryFullError):
        registry.hello(hello("engine-1"), NOW_S)
    assert len(registry) == 1


# -- decisions ---------------------------------------------------------------------------------------


def decided(name: str = "agent", reason: str = "cheap") -> link.Decided:
    return link.Decided(
        at_s=NOW_S,
        program=program(name),
        event="pause",
        action="pin",
        reason=reason,
        ttl_s=3.0,
        costs=[link.OptionCost("pin", 0.5, {"memory": 0.25})],
        inputs={"context_tokens": 9, "tool": None, "wide": True},
    )


def test_the_last_decisions_are_kept_newest_first_and_outlive_the_program() -> None:
    registry = registry_with_engine()
    events = [decided(reason=f"r{n}") for n in range(20)]
    gone = link.ProgramGone(at_s=NOW_S, program=AGENT)
    registry.report(report(started(), *events, gone), NOW_S)
    found = registry.history.last(None, "agent", 64)
    assert [d.reason for _, d in found] == [f"r{n}" for n in range(19, 3, -1)]
    assert found[0] == ("engine-0", events[19])
    assert len(registry.history.last(None, "agent", 3)) == 3
    assert registry.history.last("acme", "agent", 3) == []


def test_a_pin_that_ends_before_its_programs_return_is_a_decision_too() -> None:
    registry = registry_with_engine()
    ends = [
        link.PinEnded(at_s=NOW_S, program=AGENT, request_id="r1", cause=cause, tokens=32)
        for cause in ("handoff", "superseded", "command")
    ]
    registry.report(report(started(), decided(), *ends), NOW_S)
    (_, released), (_, paused) = registry.history.last(None, "agent", 64)
    assert (released.event, released.reason, released.inputs) == (
        "release",
        "command",
        {"tokens": 32},
    )
    assert paused.event == "pause"


@given(st.lists(st.integers(0, 30), max_size=200))
def test_decisions_never_take_more_than_their_memory(names: list[int]) -> None:
    history = DecisionHistory(per_program=4, max_bytes=4000)
    for number, name in enumerate(names):
        history.add("engine-0", decided(str(name), f"{number}"))
        assert history.kept_bytes <= 4000
        assert history.last(None, str(name), 1)[0][1].reason == f"{number}"


# -- any order ---------------------------------------------------------------------------------------

numbers = st.integers(-5, 1 << 62)
times_s = st.floats(allow_nan=True, allow_infinity=True)
keys = st.builds(
    program, st.sampled_from([f"p{n}" for n in range(8)]), st.sampled_from([None, "acme"])
)
request_ids = st.sampled_from([f"r{n}" for n in range(8)])


def event_of(kind: type[link.Event], **fields: Any) -> st.SearchStrategy[link.Event]:
    return st.builds(kind, at_s=times_s, program=keys, request_id=request_ids, **fields)


any_event: st.SearchStrategy[link.Event] = st.one_of(
    event_of(link.TurnStarted, turn=numbers, prompt_tokens=numbers),
    event_of(link.TurnRunning, gpu_tokens=numbers, cpu_tokens=numbers, recomputed_tokens=numbers),
    event_of(
        link.TurnEnded,
        context_tokens=numbers,
        output_tokens=numbers,
        tool=st.none() | st.text(max_size=3),
        predicted_gap_s=st.none() | times_s,
    ),
    event_of(
        link.Decided, event=st.just("pause"), action=st.just("pin"), reason=st.text(max_size=3)
    ),
    event_of(link.Pinned, tokens=numbers, deadline_s=times_s),
    event_of(link.PinEnded, cause=st.just("ttl"), tokens=numbers),
    event_of(link.Staged, tokens=numbers),
    event_of(link.Loaded, tokens=numbers, duration_s=times_s),
    event_of(link.ProgramGone),
)
any_state = st.builds(
    link.ProgramState,
    program=keys,
    started_s=times_s,
    last_active_s=times_s,
    turns=numbers,
    context_tokens=numbers,
    waiting=st.lists(request_ids, max_size=6),
    running=st.lists(request_ids, max_size=6),
    pins=st.lists(st.builds(link.PinState, request_ids, numbers, times_s), max_size=6),
)
engine_ids = st.sampled_from(["engine-0", "engine-1", "engine-2"])
any_message = st.one_of(
    st.builds(lambda e: hello(e, pid=1, pid_start_s=1.0), engine_ids),
    st.builds(
        lambda e, events: report(*events, engine_id=e), engine_ids, st.lists(any_event, max_size=8)
    ),
    st.builds(
        link.Programs,
        engine_id=engine_ids,
        programs=st.lists(any_state, max_size=5),
        first=st.booleans(),
    ),
    st.builds(link.EngineBye, engine_id=engine_ids),
)


@settings(deadline=None)
@given(st.lists(any_message, max_size=40))
def test_messages_in_any_order_never_raise_and_never_take_more_than_their_memory(
    messages: list[Any],
) -> None:
    registry = Registry(
        max_engines=2, max_programs=4, history=DecisionHistory(per_program=2, max_bytes=1500)
    )
    limit, program_picture.MAX_REQUESTS = program_picture.MAX_REQUESTS, 3  # type: ignore[misc]
    try:
        for message in messages:
            match message:
                case link.EngineHello():
                    if len(registry) < 2 or registry.engine(message.engine_id):
                        registry.hello(message, NOW_S)
                case link.Report():
                    registry.report(message, NOW_S)
                case link.Programs():
                    registry.programs_page(message, NOW_S)
                case link.EngineBye():
                    registry.gone(message.engine_id)
            assert registry.history.kept_bytes <= 1500
            for engine in registry.engines():
                assert len(engine.programs) <= 4
            for _, picture in registry.programs():
                assert max(len(picture.waiting), len(picture.running), len(picture.pins)) <= 3
                picture.ttl_left_s(NOW_S)
    finally:
        program_picture.MAX_REQUESTS = limit  # type: ignore[misc]


# -- an engine's own account -------------------------------------------------------------------------


@dataclass
class Told:
    """A program as an engine knows it, which is what it would answer to `Resync`."""

    started_s: float
    last_active_s: float
    turns: int = 0
    context_tokens: int = 0
    waiting: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    pins: dict[str, link.PinState] = field(default_factory=dict)
    cpu_tokens: int = 0
    tool: str | None = None
    gap_s: float | None = None

    def state(self, key: link.ProgramKey) -> link.ProgramState:
        paused = not self.waiting and not self.running
        returns_s = None
        if paused and self.gap_s is not None:
            returns_s = self.last_active_s + self.gap_s
        return link.ProgramState(
            program=key,
            started_s=self.started_s,
            last_active_s=self.last_active_s,
            turns=self.turns,
            context_tokens=self.context_tokens,
            waiting=sorted(self.waiting),
            running=sorted(self.running),
            pins=list(self.pins.values()),
            cpu_tokens=self.cpu_tokens,
            tool=self.tool if paused else None,
            predicted_return_s=returns_s,
        )


class Engine:
    """An engine that lives by random steps, reports each of them, and can tell all it knows."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self._now_s = NOW_S
        self._requests = 0
        self.programs: dict[link.ProgramKey, Told] = {}

    def _one_of(self, found: list[str]) -> str | None:
        return self._data.draw(st.sampled_from(found)) if found else None

    def step(self) -> link.Event | None:
        self._now_s += self._data.draw(st.integers(1, 100))
        key = program(self._data.draw(st.sampled_from("abc")))
        told = self.programs.get(key)
        at: dict[str, Any] = {"at_s": self._now_s, "program": key}
        kind = self._data.draw(
            st.sampled_from(["start", "start", "run", "end", "pin", "unpin", "stage", "gone"])
        )
        if kind == "start":
            return self._start(key, told, at)
        if told is None:
            return None
        match kind:
            case "run" if request_id := self._one_of(sorted(told.waiting)):
                told.waiting.remove(request_id)
                told.running.add(request_id)
                counts = {"gpu_tokens": 0, "cpu_tokens": 0, "recomputed_tokens": 1}
                return link.TurnRunning(**at, request_id=request_id, **counts)
            case "end" if request_id := self._one_of(sorted(told.waiting | told.running)):
                return self._end(told, at, request_id)
            case "pin":
                pin = link.PinState(f"r{self._requests}", self._requests, self._now_s + 9)
                told.pins[pin.request_id] = pin
                return link.Pinned(**at, **{n: getattr(pin, n) for n in pin.__struct_fields__})
            case "unpin" if request_id := self._one_of(sorted(told.pins)):
                del told.pins[request_id]
                return link.PinEnded(**at, request_id=request_id, cause="ttl", tokens=1)
            case "stage":
                told.cpu_tokens = self._data.draw(st.integers(0, 1000))
                return link.Staged(**at, tokens=told.cpu_tokens)
            case "gone":
                del self.programs[key]
                return link.ProgramGone(**at)
        return None

    def _start(
        self, key: link.ProgramKey, told: Told | None, at: dict[str, Any]
    ) -> link.TurnStarted:
        self._requests += 1
        if told is None:
            told = self.programs[key] = Told(self._now_s, self._now_s)
        told.turns += 1
        told.last_active_s = self._now_s
        told.waiting.add(f"r{self._requests}")
        told.tool = told.gap_s = None
        return link.TurnStarted(
            **at, request_id=f"r{self._requests}", turn=told.turns, prompt_tokens=1
        )

    def _end(self, told: Told, at: dict[str, Any], request_id: str) -> link.TurnEnded:
        told.waiting.discard(request_id)
        told.running.discard(request_id)
        told.last_active_s = self._now_s
        told.context_tokens = self._data.draw(st.integers(1, 1000))
        told.tool = self._data.draw(st.sampled_from([None, "bash"]))
        told.gap_s = self._data.draw(st.sampled_from([None, 4.0]))
        return link.TurnEnded(
            **at,
            request_id=request_id,
            context_tokens=told.context_tokens,
            output_tokens=1,
            tool=told.tool,
            predicted_gap_s=told.gap_s,
        )

    def pages(self) -> list[link.Programs]:
        states = [told.state(key) for key, told in self.programs.items()]
        return [
            link.Programs(engine_id="engine-0", programs=states[:2], first=True, last=False),
            link.Programs(engine_id="engine-0", programs=states[2:], first=False),
        ]


def account(registry: Registry) -> dict[link.ProgramKey, Any]:
    """All that can be asked of the programs."""
    return {
        picture.key: (
            picture.activity,
            picture.started_s,
            picture.last_active_s,
            picture.turns,
            picture.context_tokens,
            set(picture.waiting),
            set(picture.running),
            picture.pins,
            picture.cpu_tokens,
            picture.tool,
            picture.predicted_return_s,
        )
        for _, picture in registry.programs()
    }


@settings(deadline=None)
@given(st.data())
def test_the_programs_after_a_resync_are_those_that_the_events_had_told_of(
    data: st.DataObject,
) -> None:
    engine, followed = Engine(data), registry_with_engine()
    for _ in range(data.draw(st.integers(0, 30))):
        if (event := engine.step()) is not None:
            followed.report(report(event), NOW_S)
    before = account(followed)
    late = registry_with_engine()
    for page in engine.pages():
        late.programs_page(page, NOW_S)
        followed.programs_page(page, NOW_S)
    assert account(late) == before
    assert account(followed) == before
    # And both follow what comes next alike.
    for _ in range(data.draw(st.integers(0, 10))):
        if (event := engine.step()) is not None:
            followed.report(report(event), NOW_S)
            late.report(report(event), NOW_S)
    assert account(late) == account(followed)


def test_gauges_and_lost_events_are_the_engines_last_word() -> None:
    registry = registry_with_engine()
    registry.report(report(lost=3), NOW_S + 1)
    registry.report(report(lost=4), NOW_S + 2)
    engine = registry.engine("engine-0")
    assert engine is not None
    assert (engine.gauges, engine.lost_events, engine.seen_s) == (GAUGES, 7, NOW_S + 2)
    assert engine.policy == POLICY
    assert engine.seems_idle
