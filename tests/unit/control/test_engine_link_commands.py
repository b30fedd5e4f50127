"""Commands and their answers at an engine's end of the control link."""

from __future__ import annotations

from unittest import mock

import zmq

from kvtier import link_messages as messages
from tests.unit.control.link_rig import Rig, Server, events, pause_an_agent


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
