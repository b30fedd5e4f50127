"""An engine's end of the control link, against a real ZeroMQ ROUTER and a real scheduler half."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

import pytest
import zmq

from kvtier import link_messages as messages
from kvtier.control import engine_events, engine_picture
from kvtier.control import link as link_module
from kvtier.control.engine_status import EngineStatus
from kvtier.control.link import EngineLink
from kvtier.control.registry import Registry
from kvtier.programs import ProgramId
from tests.unit.fake_vllm import BLOCK_TOKENS
from tests.unit.mini_engine import MiniEngine
from tests.unit.program_cases import follow_up, prompt, turn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UNIX_S = 1_700_000_000.0
Kind = TypeVar("Kind")


class Server:
    """The other end; bound when the test says so."""

    def __init__(self, path: Path) -> None:
        self.endpoint = f"ipc://{path}"
        self._context = zmq.Context()
        self._socket: Any = None
        self._peer = b""

    def bind(self) -> None:
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.endpoint)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    def send(self, message: Any) -> None:
        frame = message if isinstance(message, bytes) else messages.encoder.encode(message)
        self._socket.send_multipart([self._peer, frame])

    def next(self) -> Any:
        assert self._socket.poll(10_000), "the engine says nothing"
        self._peer, frame = self._socket.recv_multipart()
        return messages.server_decoder.decode(frame)

    def all(self) -> list[Any]:
        """What has come until nothing comes any more: ZeroMQ keeps the order of a peer's messages."""
        found = []
        while self._socket.poll(200):
            found.append(self.next())
        return found


class Rig:
    """A small engine with a real link to `server`."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.revived = 0
        status: list[EngineStatus] = []
        self.link = EngineLink(
            server.endpoint,
            engine_id="engine",
            hello=lambda: status[0].hello(),  # noqa: PLW0108 - it comes later
            read_gauges=lambda: status[0].gauges(),  # noqa: PLW0108
            block_tokens=BLOCK_TOKENS,
            clock=lambda: self.engine.now_s,
            revive=self._revive,
            wall_clock=lambda: UNIX_S + self.engine.now_s,
        )
        self.engine = MiniEngine(link=self.link)
        status.append(EngineStatus(self.engine.half, "engine", "a-model", dp_rank=0))
        self.hello = status[0].hello

    def _revive(self) -> None:
        self.revived += 1

    def until(self, kind: type[Kind]) -> Kind:
        """Run hooks until the server gets such a message; the connection takes a moment."""
        for _ in range(500):
            self.engine.now_s += 1.1
            self.engine.wake()
            while self.server._socket.poll(20):
                message = self.server.next()
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__}")

    def follow(self) -> messages.Programs:
        """The server meets the engine, and asks for all it knows."""
        self.until(messages.EngineHello)
        self.server.send(messages.Resync())
        return self.until(messages.Programs)

    def wake_until(self, condition: Any) -> None:
        for _ in range(500):
            self.engine.now_s += 0.1
            self.engine.wake()
            if condition():
                return
            self.server._socket.poll(10)
        raise AssertionError("it never happened")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "s")
    yield made
    made.close()


@pytest.fixture
def rig(server: Server) -> Iterator[Rig]:
    made = Rig(server)
    yield made
    made.link.close()


def pause_an_agent(rig: Rig, server: Server) -> None:
    """Its turn has ended, and the server knows it."""
    server.bind()
    rig.engine.run(turn("r1", prompt(30), session="agent"))
    rig.follow()
    server.all()


def events(found: list[Any]) -> list[messages.Event]:
    reports = [m.report if isinstance(m, messages.Answered) else m for m in found]
    return [event for r in reports if isinstance(r, messages.Report) for event in r.events]


def test_without_a_server_nothing_is_kept_and_someone_is_asked_to_start_it(rig: Rig) -> None:
    for i in range(50):
        rig.engine.run(turn(f"r{i}", prompt(20), session="s"))
        rig.engine.now_s += 10.0
    assert not rig.link.is_followed
    assert rig.link._events == []
    assert 0 < rig.revived <= 500 / link_module.REVIVE_INTERVAL_S + 1


def test_a_server_that_comes_later_learns_what_there_is(rig: Rig, server: Server) -> None:
    rig.engine.run(turn("r1", prompt(30), session="agent", hints={"tool": "bash"}))
    server.bind()
    page = rig.follow()
    assert page.first
    (state,) = page.programs
    assert state.program == messages.ProgramKey(None, "agent")
    assert (state.turns, state.context_tokens, state.cpu_tokens) == (1, 34, 32)
    assert (state.waiting, state.running, state.tool) == ([], [], "bash")
    assert [(pin.request_id, pin.tokens) for pin in state.pins] == [("r1", 32)]
    assert state.pins[0].deadline_s > UNIX_S + rig.engine.now_s
    assert state.predicted_return_s is not None


def test_what_happens_is_told_in_order_and_before_the_engine_goes_idle(
    rig: Rig, server: Server
) -> None:
    server.bind()
    rig.follow()
    first = turn("r1", prompt(30), session="agent")
    rig.engine.run(first)
    rig.engine.half.report(rig.engine.now_s)
    told = events(server.all())
    kinds = [type(event).__name__ for event in told]
    assert kinds == [
        "TurnStarted",
        "TurnRunning",
        "TurnEnded",
        "Pinned",
        "Decided",
        *["Staged"] * (len(kinds) - 5),
    ]
    assert {event.program.name for event in told} == {"agent"}
    started, running, ended, pinned, decided = told[:5]
    assert isinstance(started, messages.TurnStarted)
    assert (started.turn, started.prompt_tokens, started.gap_s) == (1, 30, None)
    assert isinstance(running, messages.TurnRunning)
    assert (running.gpu_tokens, running.cpu_tokens, running.recomputed_tokens) == (0, 0, 30)
    assert isinstance(ended, messages.TurnEnded)
    assert (ended.context_tokens, ended.output_tokens) == (34, 4)
    assert isinstance(pinned, messages.Pinned)
    assert pinned.tokens == 32
    assert isinstance(decided, messages.Decided)
    assert decided.action == "pin"
    assert {cost.option for cost in decided.costs} >= {"drop", "pin"}
    assert decided.inputs["keep_tokens"] == 32
    assert abs(pinned.deadline_s - decided.at_s - decided.ttl_s) < 0.1

    rig.engine.now_s += 3.0
    rig.engine.run(follow_up(first, "r2", session="agent"))
    rig.engine.half.report(rig.engine.now_s)
    told = events(server.all())
    kinds = [type(event).__name__ for event in told]
    assert kinds[:3] == ["TurnStarted", "PinEnded", "TurnRunning"]
    assert isinstance(told[0], messages.TurnStarted)
    assert told[0].gap_s == pytest.approx(3.0, abs=0.1)
    assert isinstance(told[1], messages.PinEnded)
    assert (told[1].cause, told[1].tokens) == ("handoff", 32)


def test_a_turn_names_its_requests_trace_and_passes_on_nothing_too_long_for_one(
    rig: Rig, server: Server
) -> None:
    server.bind()
    rig.follow()
    headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "x" * 513}
    traced = turn("r1", prompt(30), session="agent")
    traced.trace_headers = headers
    rig.engine.run(traced)
    rig.engine.run(follow_up(traced, "r2", session="agent"))
    rig.engine.half.report(rig.engine.now_s)
    started = [e for e in events(server.all()) if isinstance(e, messages.TurnStarted)]
    assert [event.trace for event in started] == [{"traceparent": headers["traceparent"]}, {}]


def test_a_command_gets_one_answer_after_what_it_caused(rig: Rig, server: Server) -> None:
    pause_an_agent(rig, server)
    server.send(messages.ReleaseCommand(id=7, program=messages.ProgramKey(None, "agent")))
    rig.wake_until(lambda: not rig.engine.pool.references)
    told = [m for m in server.all() if isinstance(m, messages.Answered)]
    answers = [(a.id, a.engine_id, a.outcome) for m in told for a in m.answers]
    assert answers == [(7, "engine", "accepted")]
    assert events(told)


def test_a_command_is_answered_whatever_else_cannot_be_written(rig: Rig, server: Server) -> None:
    pause_an_agent(rig, server)
    (pin,) = rig.engine.half.pins.pins()
    rig.link.decided("pause", pin.program, "r1", {"action": "a", "reason": "r", "value": object()})
    answer = messages.Answer(id=7, engine_id="engine", outcome="accepted", reason="done")
    bad = messages.Answer(id=8, engine_id="engine", outcome="accepted", reason="\ud800")
    rig.link.answer([answer, bad])
    rig.engine.half.report(rig.engine.now_s + 1000.0)
    found = server.all()
    assert [m.answers for m in found if isinstance(m, messages.Answered)] == [[answer]]
    assert sum(m.lost for m in found if isinstance(m, messages.Report)) == 1
    assert rig.link.is_followed


def test_what_can_neither_be_written_nor_sent_is_lost_once(rig: Rig, server: Server) -> None:
    pause_an_agent(rig, server)
    (pin,) = rig.engine.half.pins.pins()
    bad = {"action": "a", "reason": "r", "value": object()}
    rig.link.decided("pause", pin.program, "r1", bad)
    answer = messages.Answer(id=7, engine_id="engine", outcome="accepted", reason="done")
    with mock.patch.object(rig.link._socket, "send", side_effect=zmq.Again):
        rig.link.answer([answer])
    assert not rig.link.is_followed
    assert rig.link._lost == 1


def test_an_idle_engines_figures_are_those_after_its_commands(rig: Rig, server: Server) -> None:
    """What a hook does after it has answered may change them."""
    pause_an_agent(rig, server)
    rig.link.answer([messages.Answer(id=7, engine_id="engine", outcome="accepted", reason="done")])
    rig.engine.half.programs.forget(rig.engine.now_s + 1e9)
    now_s = rig.engine.now_s
    rig.link.report(now_s, idle=False)
    rig.link.report(now_s, idle=True)
    rig.link.report(now_s, idle=True)
    answered, *later = server.all()
    assert [(m.gauges.programs, answered.report.gauges.programs) for m in later] == [(0, 1)]


def test_a_release_is_done_within_the_step_that_finds_it(rig: Rig, server: Server) -> None:
    pause_an_agent(rig, server)
    assert rig.engine.pool.references
    server.send(messages.ReleaseCommand(id=7, program=messages.ProgramKey(None, "agent")))
    # The message is in the engine's socket, where no hook has looked yet.
    assert rig.link._socket.poll(10_000)
    rig.engine.now_s += 1.0
    rig.engine.wake()
    assert not rig.engine.pool.references


def test_noise_on_the_socket_is_ignored(rig: Rig, server: Server) -> None:
    server.bind()
    rig.engine.run(turn("r1", prompt(30), session="agent"))
    rig.follow()
    for noise in (b"", b"\x00", b"\xc1\xc1", messages.encoder.encode({"type": "Nonsense"})):
        server.send(noise)
    server.send(messages.ReleaseCommand(id=8, program=messages.ProgramKey(None, "agent")))
    rig.wake_until(lambda: not rig.engine.pool.references)


def test_too_many_events_are_counted_and_the_picture_is_sent_anew(
    rig: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_events, "MAX_EVENTS", 1)
    server.bind()
    rig.follow()
    server.all()
    rig.engine.run(turn("r1", prompt(30), session="agent"))
    rig.engine.half.report(rig.engine.now_s)
    found = server.all()
    assert sum(m.lost for m in found if isinstance(m, messages.Report)) > 0
    *_, page = [m for m in found if isinstance(m, messages.Programs)]
    assert page.programs[0].context_tokens == 34


def many(rig: Rig, n_programs: int) -> None:
    for i in range(n_programs):
        rig.engine.run(turn(f"r{i}", prompt(8, i), session=f"agent-{i}", hints={"pin": False}))


def names(pages: list[messages.Programs]) -> list[str]:
    return [state.program.name for page in pages for state in page.programs]


def test_many_programs_come_in_pages_one_a_step(
    rig: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_picture, "PAGE_PROGRAMS", 4)
    many(rig, 10)
    server.bind()
    found = [rig.follow()]
    assert rig.engine.half.has_work(), "an idle engine must step until all is told"
    while rig.engine.half.has_work():
        rig.engine.step()
        found += [m for m in server.all() if isinstance(m, messages.Programs)]
        rig.engine.now_s += 0.1
    assert [len(page.programs) for page in found] == [4, 4, 2]
    assert [(page.first, page.last) for page in found] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert sorted(names(found)) == sorted(f"agent-{i}" for i in range(10))


def test_many_hooks_of_one_step_tell_one_page(
    rig: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_picture, "PAGE_PROGRAMS", 4)
    many(rig, 10)
    server.bind()
    rig.follow()
    for i in range(5):
        rig.engine.half.on_new_request(turn(f"q{i}", prompt(8), session="q"))
    assert len([m for m in server.all() if isinstance(m, messages.Programs)]) <= 1


def test_what_happens_between_pages_is_told_in_order(
    rig: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's picture is the engine's, whenever programs come, go on and end."""
    monkeypatch.setattr(engine_picture, "PAGE_PROGRAMS", 3)
    many(rig, 8)
    server.bind()
    messages_in_order: list[Any] = [rig.follow()]
    half = rig.engine.half
    for i in (7, 0, 5):
        rig.engine.run(turn(f"again-{i}", prompt(12, i), session=f"agent-{i}"))
        rig.engine.run(turn(f"new-{i}", prompt(12, i), session=f"new-{i}"))
        half.endings.program_ended(
            rig.engine.facts.program_handle(ProgramId(None, "named", f"agent-{i + 1}"))
        )
        rig.engine.step()
        messages_in_order += server.all()
    while half.has_work():
        rig.engine.now_s += 0.1
        rig.engine.step()
    half.report(rig.engine.now_s + 9.0)
    messages_in_order += server.all()
    registry = Registry()
    registry.hello(rig.hello(), 0.0)
    for message in messages_in_order:
        if isinstance(message, messages.Programs):
            registry.programs_page(message, 0.0)
        elif isinstance(message, messages.Report):
            registry.report(message, 0.0)
    told = {program.key.name: program for _, program in registry.programs()}
    known = {known.key.name: known for known in rig.link._programs.values()}
    assert set(told) == set(known)
    for name, program in told.items():
        state = known[name].state(rig.link._offset_s)
        assert (program.turns, program.context_tokens) == (state.turns, state.context_tokens), name
        assert program.pins.keys() == {pin.request_id for pin in state.pins}, name
        assert program.activity == "paused"


def test_a_server_that_reads_slowly_gets_its_pages_later(
    rig: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_picture, "PAGE_PROGRAMS", 1)
    many(rig, 20)
    server.bind()
    found = [rig.follow()]
    monkeypatch.setattr(rig.link, "_can_send", lambda: False)
    for _ in range(5):
        rig.engine.now_s += 0.1
        rig.engine.step()
    assert rig.link.is_followed
    assert not [m for m in server.all() if isinstance(m, messages.Programs)]
    monkeypatch.undo()
    while rig.engine.half.has_work():
        rig.engine.now_s += 0.1
        rig.engine.step()
        found += [m for m in server.all() if isinstance(m, messages.Programs)]
    assert len(set(names(found))) == 20


def test_nothing_is_kept_to_be_told_when_the_server_goes(
    rig: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_picture, "PAGE_PROGRAMS", 1)
    many(rig, 5)
    server.bind()
    rig.follow()
    server.close()
    for _ in range(100):
        if not rig.engine.half.has_work():
            return
        rig.engine.now_s += 0.1
        rig.engine.step()
    raise AssertionError("the engine runs for a server that is gone")


def test_names_that_are_no_text_are_told_as_well_as_they_can_be(rig: Rig, server: Server) -> None:
    """A lone surrogate of a JSON escape, which no message can hold."""
    rig.engine.run(turn("r1", prompt(30), session="a\ud800b", cache_salt="\udfff"))
    server.bind()
    page = rig.follow()
    assert page.programs[0].program == messages.ProgramKey("\\udfff", "a\\ud800b")
    rig.engine.run(turn("r2", prompt(40), session="a\ud800b", cache_salt="\udfff"))
    rig.engine.half.report(rig.engine.now_s)
    assert "TurnEnded" in {type(event).__name__ for event in events(server.all())}


def test_what_cannot_be_written_is_lost_and_counted(rig: Rig, server: Server) -> None:
    """Whatever a decision's entry holds: following kvtier must not end it."""
    server.bind()
    rig.engine.run(turn("r1", prompt(30), session="agent"))
    rig.follow()
    program = rig.engine.half.pins.of_program(next(iter(rig.link._programs)))[0].program
    server.all()
    for value in (object(), "\ud800", 1 << 80):
        entry = {"action": "a", "reason": "r", "value": value}
        rig.link.decided("pause", program, "r1", entry)
        rig.engine.half.report(rig.engine.now_s + 100.0)
    rig.engine.half.report(rig.engine.now_s + 1000.0)
    found = server.all()
    assert sum(m.lost for m in found if isinstance(m, messages.Report)) == 3
    assert rig.link.is_followed
    rig.until(messages.Programs)


def test_a_program_that_cannot_be_written_does_not_hide_the_others(
    rig: Rig, server: Server
) -> None:
    for name in ("a", "b", "c"):
        rig.engine.run(turn(f"r-{name}", prompt(30), session=name))
    next(known for known in rig.link._programs.values() if known.key.name == "b").tool = "\ud800"
    server.bind()
    assert sorted(names([rig.follow()])) == ["a", "c"]


def test_what_is_lost_with_a_server_that_does_not_read_is_told_when_it_reads_again(
    rig: Rig, server: Server
) -> None:
    server.bind()
    rig.engine.run(turn("r1", prompt(30), session="agent", hints={"pin": False}))
    rig.follow()
    server.all()
    (handle,) = rig.link._programs
    told = 0

    def tell() -> None:
        nonlocal told
        told += 1
        rig.link.staged(handle, told)

    while rig.link.is_followed:
        # Two events in a report: the one that fails, too, has more than one.
        tell()
        tell()
        rig.engine.now_s += 1.1
        rig.link.report(rig.engine.now_s, idle=True)
        assert told < 100_000
    for _ in range(7):
        tell()
    found = server.all()
    server.send(messages.Resync())
    rig.wake_until(lambda: rig.link.is_followed)
    for _ in range(3):
        rig.engine.now_s += 1.1
        rig.engine.wake()
        tell()
        rig.engine.half.report(rig.engine.now_s + 1.0)
    found += server.all()
    seen = [event.tokens for event in events(found) if isinstance(event, messages.Staged)]
    reports = [message for message in found if isinstance(message, messages.Report)]
    lost = [report.lost for report in reports if report.lost]
    # All in one, before anything that came later.
    assert len(lost) == 1
    assert lost[0] >= 2 + 7
    assert seen == [*range(1, told - 3 - lost[0] + 1), told - 2, told - 1, told]
    # The picture begins anew after it, once.
    pages = [message for message in found if isinstance(message, messages.Programs)]
    assert len([page for page in pages if page.first]) == 1


def test_a_server_that_asks_anew_misses_nothing_of_what_was_to_be_told(
    rig: Rig, server: Server
) -> None:
    server.bind()
    rig.engine.run(turn("r1", prompt(30), session="agent", hints={"pin": False}))
    rig.follow()
    rig.engine.half.report(rig.engine.now_s + 9.0)
    server.all()
    (handle,) = rig.link._programs
    rig.link.staged(handle, 16)
    server.send(messages.Resync())
    assert rig.link._socket.poll(10_000)
    rig.engine.now_s += 1.0
    rig.engine.wake()
    found = server.all()
    assert [e.tokens for e in events(found) if isinstance(e, messages.Staged)] == [16]
    assert not any(m.lost for m in found if isinstance(m, messages.Report))


def test_what_happens_before_the_first_server_is_no_loss(rig: Rig, server: Server) -> None:
    rig.engine.run(turn("r1", prompt(30), session="agent"))
    server.bind()
    rig.follow()
    rig.engine.half.report(rig.engine.now_s + 9.0)
    assert not any(m.lost for m in server.all() if isinstance(m, messages.Report))


def test_a_server_that_has_gone_is_found_again(rig: Rig, server: Server) -> None:
    server.bind()
    rig.follow()
    server.close()
    server.bind()
    rig.engine.run(turn("r1", prompt(30), session="agent"))
    # Whatever comes first, the new server knows nobody, and asks.
    rig.wake_until(lambda: server._socket.poll(0))
    server.next()
    server.send(messages.Resync())
    page = rig.until(messages.Programs)
    assert page.programs[0].program.name == "agent"


def test_goodbye_is_said(server: Server) -> None:
    rig = Rig(server)
    server.bind()
    rig.follow()
    rig.engine.half.shutdown()
    assert any(isinstance(m, messages.EngineBye) for m in server.all())
