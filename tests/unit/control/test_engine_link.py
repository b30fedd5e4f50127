"""An engine's end of the control link: what it tells, and when the server is not there."""

from __future__ import annotations

import pytest

from kvtier import link_messages as messages
from kvtier.control import engine_events
from kvtier.control import link as link_module
from tests.unit.control.link_rig import UNIX_S, Rig, Server, events, follow_in_pages, names
from tests.unit.program_cases import follow_up, prompt, turn


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


def test_nothing_is_kept_to_be_told_when_the_server_goes(
    rig: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow_in_pages(rig, 5, 1, monkeypatch)
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
