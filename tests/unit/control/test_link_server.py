"""The server's end of the link: strangers, reconnects, dead processes and nonsense."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier import link_messages as link
from kvtier.control import command_desk, link_server
from kvtier.v1 import observability_pb2, outcome_pb2, program_pb2
from tests.unit.control.control_host import (
    GAUGES,
    POLICY,
    Host,
    in_background,
    program,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.control.control_host import FakeEngine


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing until it is ended."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE
    ) as process:
        yield process
        process.kill()


def errors(host: Host, kind: str) -> float:
    return host.sample("kvtier_control_link_errors_total", kind=kind)


def engine_ids(host: Host) -> list[str]:
    return host.call(lambda: [e.engine_id for e in host.server.registry.engines()])


def test_a_hello_is_answered_each_time_else_the_engine_would_think_itself_unheard(
    host: Host,
) -> None:
    engine = host.engine()
    for _ in range(3):
        assert engine.settle() == []


def test_whoever_is_not_known_is_asked_to_say_hello_but_not_for_each_message(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_server, "RESYNC_INTERVAL_S", 3600.0)
    engine = host.engine()
    for _ in range(50):
        engine.send(link.Programs(engine_id="engine-0", programs=[], first=True))
    engine.next(link.Resync)
    engine.settle()
    assert engine.says_nothing()


def test_an_engine_cannot_speak_for_another_one(host: Host, engine: FakeEngine) -> None:
    engine.knows(program())
    stranger = host.engine("engine-1")
    stranger.join()
    stranger.send(link.EngineBye(engine_id="engine-0"))
    stranger.send(link.Programs(engine_id="engine-0", programs=[], first=True))
    stranger.next(link.Resync)
    assert engine_ids(host) == ["engine-0", "engine-1"]
    assert host.call(host.server.registry.program_count) == 1


def test_an_engine_that_reconnects_keeps_its_programs_and_fails_what_was_under_way(
    host: Host, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "PATIENCE_S", 3600.0)
    engine.knows(program())
    request = program_pb2.EndProgramRequest(name="agent")
    result = in_background(lambda: host.client.programs.EndProgram(request))
    engine.next(link.EndCommand)
    again = host.engine()
    again.join()
    (found,) = result().results
    assert (found.outcome, found.reason) == (outcome_pb2.OUTCOME_REJECTED, "reconnected")
    result = in_background(lambda: host.client.programs.EndProgram(request))
    again.answer(again.next(link.EndCommand))
    assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED


def test_an_engine_started_anew_under_its_name_has_no_programs(
    host: Host, engine: FakeEngine, sleeper: subprocess.Popen[bytes]
) -> None:
    engine.knows(program())
    host.engine(pid=sleeper.pid).join()
    assert engine_ids(host) == ["engine-0"]
    assert host.call(host.server.registry.program_count) == 0


def test_a_killed_engine_is_noticed_and_its_programs_are_forgotten(
    host: Host, sleeper: subprocess.Popen[bytes]
) -> None:
    engine = host.engine(pid=sleeper.pid)
    engine.join()
    engine.knows(program())
    sleeper.kill()
    # Not waited for: a zombie is dead, too.
    wait_until(lambda: engine_ids(host) == [], "the engine's death is noticed")


def test_an_engine_that_is_not_visible_from_here_is_not_taken_in(host: Host) -> None:
    for changes in ({"pid_start_s": 1.0}, {"pid": os.getpid(), "engine_id": ""}, {"pid": 2**40}):
        changes.setdefault("pid_start_s", 1.0)
        engine = host.engine(**changes)  # type: ignore[arg-type]
        engine.send(engine.hello)
    wait_until(lambda: errors(host, "invisible_engine") == 3, "all are refused")
    assert engine_ids(host) == []


def test_a_waker_counts_while_its_process_runs(
    host: Host, sleeper: subprocess.Popen[bytes]
) -> None:
    def wakeable() -> bool:
        request = observability_pb2.GetStatusRequest()
        (status,) = host.client.observability.GetStatus(request).engines
        return bool(status.wakeable)

    engine = host.engine(parent_pid=12_345)
    engine.join()
    assert not wakeable()
    waker = host.peer()
    waker.send(link.WakerHello(link=link.LINK_VERSION, pid=sleeper.pid, parent_pid=12_345))
    wait_until(wakeable, "the waker is known")
    sleeper.kill()
    wait_until(lambda: not wakeable(), "its death is noticed")


def test_an_answer_that_nobody_asked_for_is_counted_and_ignored(
    host: Host, engine: FakeEngine
) -> None:
    stray = link.Answer(id=99_999, engine_id="engine-0", outcome="accepted", reason="x")
    engine.send(link.Answered(engine_id="engine-0", answers=[stray]))
    engine.settle()
    assert errors(host, "stray_answer") == 1


def test_no_part_of_a_message_speaks_for_another_engine(host: Host, engine: FakeEngine) -> None:
    other = host.engine("engine-1")
    other.join()
    answer = link.Answer(id=1, engine_id="engine-0", outcome="accepted", reason="x", policy=POLICY)
    report = link.Report(engine_id="engine-0", sent_s=1.0, events=[gone()], gauges=GAUGES)
    engine.knows(program())
    other.send(link.Answered(engine_id="engine-1", answers=[answer], report=report))
    other.settle()
    assert errors(host, "foreign_part") == 2
    assert host.call(host.server.registry.program_count) == 1


def test_all_answers_of_a_message_count_after_its_report(
    host: Host, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "PATIENCE_S", 3600.0)
    engine.knows(program("a"), program("b"))
    asked = [ask_to_end(host, name) for name in ("a", "b")]
    commands = [engine.next(link.EndCommand) for _ in asked]
    engine.send(told(commands, events=[gone("a")]))
    assert [result().results[0].reason for result in asked] == ["told"] * 2
    assert host.call(host.server.registry.program_count) == 1


def test_a_report_that_cannot_be_handled_keeps_no_answer_away(
    host: Host,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(command_desk, "PATIENCE_S", 3600.0)
    engine.knows(program("a"), program("b"))
    asked = [ask_to_end(host, name) for name in ("a", "b")]
    commands = [engine.next(link.EndCommand) for _ in asked]

    def breaks(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(host.server, "reported", breaks)
    engine.send(told(commands, events=[gone("a")]))
    assert [result().results[0].reason for result in asked] == ["told"] * 2
    assert "planted" in caplog.text


def test_what_a_stranger_tells_with_its_answers_is_counted_as_lost(host: Host) -> None:
    stranger = host.engine()
    stranger.send(told([], events=[gone(), gone()], lost=3))
    stranger.next(link.Resync)
    stranger.settle()
    assert host.sample("kvtier_control_lost_events_total", where="engine") == 5


def gone(name: str = "agent") -> link.Event:
    return link.ProgramGone(at_s=1.0, program=program(name))


def told(commands: list[link.EndCommand], events: list[link.Event], lost: int = 0) -> link.Answered:
    """The answers to these commands, and what had happened."""
    return link.Answered(
        engine_id="engine-0",
        answers=[
            link.Answer(id=c.id, engine_id="engine-0", outcome="accepted", reason="told")
            for c in commands
        ],
        report=link.Report(
            engine_id="engine-0", sent_s=1.0, events=events, gauges=GAUGES, lost=lost
        ),
    )


def ask_to_end(host: Host, name: str) -> Callable[[], Any]:
    """Begin to end a program; the returned function waits for the answer."""
    request = program_pb2.EndProgramRequest(name=name)
    return in_background(lambda: host.client.programs.EndProgram(request))


# -- versions ----------------------------------------------------------------------------------------


class OlderPin(msgspec.Struct, tag="PinCommand", frozen=True, kw_only=True, omit_defaults=True):
    """Before commands said when they were asked for."""

    id: int
    program: link.ProgramKey
    ttl_s: float


def test_an_older_peer_understands_commands_and_is_understood() -> None:
    newer = link.PinCommand(id=3, asked_s=1.5, program=program(), ttl_s=60.0)
    older = OlderPin(id=3, program=program(), ttl_s=60.0)
    assert msgspec.msgpack.decode(link.encoder.encode(newer), type=OlderPin) == older
    taken = link.engine_decoder.decode(link.encoder.encode(older))
    assert taken == link.PinCommand(id=3, program=program(), ttl_s=60.0)


# -- nonsense ----------------------------------------------------------------------------------------


def test_frames_that_are_no_messages_are_counted_and_ignored(
    host: Host, engine: FakeEngine
) -> None:
    peer = host.peer()
    bad = [b"", b"\xc1", b"\x93", b"{}", os.urandom(100), b"\x91" * 100_000]
    bad.append(link.encoder.encode(link.Resync()))
    for frame in bad:
        peer.socket.send(frame)
    peer.socket.send_multipart([b"", link.encoder.encode(engine.hello)])
    wait_until(lambda: errors(host, "malformed") == len(bad) + 1, "all are counted")
    assert peer.says_nothing()
    engine.settle()


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.binary(max_size=200), min_size=1, max_size=5))
def test_random_frames_leave_the_link_serving(
    host: Host, engine: FakeEngine, caplog: pytest.LogCaptureFixture, frames: list[bytes]
) -> None:
    engine.socket.send_multipart(frames)
    engine.settle()
    assert "could not be handled" not in caplog.text


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_messages_leave_the_link_serving(
    host: Host, engine: FakeEngine, caplog: pytest.LogCaptureFixture, data: st.DataObject
) -> None:
    message = data.draw(
        st.sampled_from(
            [
                engine.hello,
                link.EngineBye(engine_id="engine-0"),
                link.WakerHello(link=link.LINK_VERSION, pid=1, parent_pid=1),
                link.Answered(
                    engine_id="engine-0",
                    answers=[
                        link.Answer(id=1, engine_id="engine-0", outcome="accepted", reason="x")
                    ],
                    report=link.Report(engine_id="engine-0", sent_s=1.0, events=[], gauges=GAUGES),
                ),
                link.Programs(engine_id="engine-0", programs=[], first=True),
            ]
        )
    )
    damaged = bytearray(link.encoder.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    engine.socket.send(bytes(damaged))
    engine.send(engine.hello)
    # It may have been taken for a hello, a waker's, or a stranger's message: all are answered.
    while b"OverridesCommand" not in (frame := engine.next_frame()):
        pass
    engine.answer(link.engine_decoder.decode(frame))
    assert "could not be handled" not in caplog.text


def test_random_bytes_on_the_unix_sockets_and_the_port_leave_all_of_them_serving(
    tmp_path: Path,
) -> None:
    chance = random.Random(5)
    with Host(tmp_path, listen="127.0.0.1:0") as host:
        engine = host.engine()
        engine.join()
        address, _, port = str(host.listening.tcp_target).rpartition(":")
        client = host.client
        for number in range(60):
            for target in (host.files.link_socket_path, host.files.grpc_socket_path, None):
                kind = socket.AF_INET if target is None else socket.AF_UNIX
                with socket.socket(kind, socket.SOCK_STREAM) as stranger:
                    stranger.settimeout(5)
                    stranger.connect((address, int(port)) if target is None else str(target))
                    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if number % 3 == 0 else b""
                    try:
                        stranger.sendall(preface + chance.randbytes(chance.randrange(1, 4000)))
                    except (BrokenPipeError, ConnectionResetError):
                        continue
            if number % 10 == 0:
                engine.settle()
                client.observability.GetStatus(observability_pb2.GetStatusRequest())
        over_tcp = host.channel(host.listening.tcp_target)
        answer = type(client)(over_tcp).observability.GetStatus(
            observability_pb2.GetStatusRequest()
        )
        assert [e.engine_id for e in answer.engines] == ["engine-0"]
