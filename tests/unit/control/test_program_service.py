"""`ProgramService` from outside: a real gRPC server, real ZeroMQ, an engine that does as the test says."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
import pytest
from google.protobuf.duration_pb2 import Duration

from kvtier import link_messages as link
from kvtier.control import command_desk
from kvtier.v1 import outcome_pb2, program_pb2
from tests.unit.control.control_host import GAUGES, Refused, in_background, program, wait_until

if TYPE_CHECKING:
    from tests.unit.control.control_host import FakeEngine, Host

NAME = {"name": "agent"}
COMMANDS: dict[str, tuple[Any, type[Any]]] = {
    "PinProgram": (program_pb2.PinProgramRequest(**NAME, ttl=Duration(seconds=9)), link.PinCommand),
    "ReleaseProgram": (program_pb2.ReleaseProgramRequest(**NAME), link.ReleaseCommand),
    "StageProgram": (program_pb2.StageProgramRequest(**NAME), link.StageCommand),
    "PrefetchProgram": (program_pb2.PrefetchProgramRequest(**NAME), link.PrefetchCommand),
    "AnnounceToolCall": (
        program_pb2.AnnounceToolCallRequest(**NAME, tool="bash"),
        link.ToolCallCommand,
    ),
    "AnnounceToolReturn": (program_pb2.AnnounceToolReturnRequest(**NAME), link.ToolReturnCommand),
    "EndProgram": (program_pb2.EndProgramRequest(**NAME), link.EndCommand),
}


# -- reading -----------------------------------------------------------------------------------------


def test_a_program_is_told_with_all_that_its_engine_said(host: Host, engine: FakeEngine) -> None:
    key = program("agent", "acme")
    now_s = time.time()
    engine.report(
        link.TurnStarted(at_s=now_s, program=key, request_id="r", turn=3, prompt_tokens=10),
        link.TurnEnded(
            at_s=now_s + 1,
            program=key,
            request_id="r",
            context_tokens=40,
            output_tokens=5,
            tool="bash",
            predicted_gap_s=2.5,
        ),
        link.Pinned(at_s=now_s, program=key, request_id="r", tokens=32, deadline_s=now_s + 100),
        link.Staged(at_s=now_s, program=key, tokens=16),
    )
    request = program_pb2.GetProgramRequest(name="agent", tenant="acme")
    (found,) = host.client.programs.GetProgram(request).programs
    assert (found.name, found.tenant, found.named) == ("agent", "acme", True)
    assert found.state == program_pb2.PROGRAM_STATE_PAUSED
    assert (found.engine_id, found.turns, found.context_tokens) == ("engine-0", 3, 40)
    assert (found.gpu_pinned_tokens, found.cpu_tokens, found.tool) == (32, 16, "bash")
    assert found.started_at.ToNanoseconds() == pytest.approx(now_s * 1e9, abs=2000)
    assert found.last_active_at.ToNanoseconds() == pytest.approx((now_s + 1) * 1e9, abs=2000)
    assert found.predicted_return_at.ToNanoseconds() == pytest.approx((now_s + 3.5) * 1e9, abs=2000)
    assert 90 < found.ttl_left.seconds <= 100


def test_a_program_without_pin_or_prediction_has_these_fields_unset(
    host: Host, engine: FakeEngine
) -> None:
    engine.knows(program())
    (found,) = host.client.programs.GetProgram(program_pb2.GetProgramRequest(**NAME)).programs
    assert not found.HasField("ttl_left")
    assert not found.HasField("predicted_return_at")


def test_an_unknown_program_is_not_found_and_without_engine_it_is_unavailable(
    host: Host,
) -> None:
    client = host.client
    refused = Refused(lambda: client.programs.GetProgram(program_pb2.GetProgramRequest(**NAME)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_ENGINE")
    assert refused.details["RetryInfo"].retry_delay.seconds == 1

    host.engine().join()
    for method, (request, _) in COMMANDS.items():
        call = getattr(client.programs, method)
        refused = Refused(lambda call=call, request=request: call(request))  # type: ignore[misc]
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "PROGRAM_NOT_FOUND")
        assert refused.details["ResourceInfo"].resource_name == "agent"


def test_an_engine_of_another_link_version_is_a_failed_precondition(host: Host) -> None:
    engine = host.engine("old", link=link.LINK_VERSION + 1)
    engine.send(engine.hello)
    wait_until(lambda: host.call(host.server.link_server.incompatible), "the hello is taken in")
    refused = Refused(lambda: host.client.programs.ListPrograms(program_pb2.ListProgramsRequest()))
    assert refused.code == grpc.StatusCode.FAILED_PRECONDITION
    assert refused.details["PreconditionFailure"].violations[0].subject == "old"


# -- lists -------------------------------------------------------------------------------------------


def listed(host: Host, **fields: Any) -> tuple[list[str], str, int]:
    request = program_pb2.ListProgramsRequest(**fields)
    answer = host.client.programs.ListPrograms(request)
    return [p.name for p in answer.programs], answer.next_page_token, answer.total_size


def touch(engine: FakeEngine, name: str, at_s: float, tenant: str | None = None) -> None:
    engine.report(
        link.TurnStarted(
            at_s=at_s,
            program=program(name, tenant),
            request_id=f"{name}-{at_s}",
            turn=1,
            prompt_tokens=1,
        )
    )


def test_programs_are_listed_last_active_first_by_state_and_tenant(
    host: Host, engine: FakeEngine
) -> None:
    engine.knows(program("paused"))
    touch(engine, "old", 1000.0)
    touch(engine, "new", 2000.0, "acme")
    assert listed(host) == (["paused", "new", "old"], "", 3)
    assert listed(host, states=[program_pb2.PROGRAM_STATE_WAITING])[0] == ["new", "old"]
    assert listed(host, states=[program_pb2.PROGRAM_STATE_PAUSED])[0] == ["paused"]
    assert listed(host, states=[program_pb2.PROGRAM_STATE_RUNNING])[0] == []
    assert listed(host, tenant="acme")[0] == ["new"]
    assert listed(host, tenant="")[0] == ["paused", "old"]
    assert listed(host, tenant="nobody") == ([], "", 0)


def test_pages_show_each_program_once_though_others_come_and_all_are_active(
    host: Host, engine: FakeEngine
) -> None:
    names = [f"p{n}" for n in range(7)]
    for at_s, name in enumerate(names):
        touch(engine, name, 1000.0 + at_s)
    seen, token, total = listed(host, page_size=3)
    assert (seen, total) == (["p6", "p5", "p4"], 7)
    # Those not yet listed become the most active ones, one of them ends, and others come.
    touch(engine, "p0", 5000.0)
    touch(engine, "p3", 5001.0)
    touch(engine, "other", 5002.0)
    engine.report(link.ProgramGone(at_s=1.0, program=program("p2")))
    rest, token, total = listed(host, page_size=3, page_token=token)
    assert (rest, token, total) == (["p3", "p1", "p0"], "", 7)


def test_page_tokens_are_bound_to_their_filters_and_cannot_be_made_up(
    host: Host, engine: FakeEngine
) -> None:
    for at_s in range(3):
        touch(engine, f"p{at_s}", 1000.0 + at_s)
    _, token, _ = listed(host, page_size=1)
    assert listed(host, page_size=2, page_token=token)[0] == ["p1", "p0"]
    for fields in (
        {"page_token": token, "tenant": ""},
        {"page_token": token, "states": [program_pb2.PROGRAM_STATE_WAITING]},
        {"page_token": token[:-4] + "AAAA"},
        {"page_token": "*"},
        {"page_token": "A" * 10_000},
    ):
        refused = Refused(lambda fields=fields: listed(host, **fields))  # type: ignore[misc]
        assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
        assert list(refused.fields) == ["page_token"]


# -- commands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", COMMANDS)
def test_a_command_reaches_the_engine_and_its_answer_the_client(
    host: Host, engine: FakeEngine, method: str
) -> None:
    request, kind = COMMANDS[method]
    engine.knows(program())
    result = in_background(lambda: getattr(host.client.programs, method)(request))
    command = engine.next(kind)
    assert command.program == program()
    engine.answer(command, "clipped", "max_ttl", "to 3 s")
    (found,) = result().results
    assert found == outcome_pb2.CommandResult(
        outcome=outcome_pb2.OUTCOME_CLIPPED,
        reason="max_ttl",
        detail="to 3 s",
        engine_id="engine-0",
    )


def test_a_command_goes_to_every_engine_that_knows_the_program_and_to_no_other(
    host: Host, engine: FakeEngine
) -> None:
    second, third = host.engine("engine-1"), host.engine("engine-2")
    for other in (second, third):
        other.join()
    engine.knows(program())
    second.knows(program(named=False))
    third.knows(program("another"), program(tenant="acme"))
    result = in_background(lambda: host.client.programs.PinProgram(COMMANDS["PinProgram"][0]))
    engine.answer(engine.next(link.PinCommand))
    command = second.next(link.PinCommand)
    assert not command.program.named
    second.answer(command, "missing", "no_kv")
    assert [(r.engine_id, r.outcome) for r in result().results] == [
        ("engine-0", outcome_pb2.OUTCOME_ACCEPTED),
        ("engine-1", outcome_pb2.OUTCOME_MISSING),
    ]
    assert third.says_nothing()


def test_an_idle_engine_that_nobody_wakes_answers_deferred_and_does_it_later(
    host: Host, engine: FakeEngine
) -> None:
    engine.knows(program())
    (found,) = host.client.programs.ReleaseProgram(
        program_pb2.ReleaseProgramRequest(**NAME)
    ).results
    assert found.outcome == outcome_pb2.OUTCOME_DEFERRED
    assert found.detail.endswith("it was idle when it reported last, and nobody can wake it")
    told = {"command": "release", "outcome": "deferred"}
    assert host.sample("kvtier_control_commands_total", **told) == 1
    # The command is still there, and its late answer harms nobody.
    engine.answer(engine.next(link.ReleaseCommand))
    engine.settle()
    desk = host.server.link_server.desk
    wait_until(
        lambda: not host.call(lambda: desk.unanswered("engine-0")),
        "the answers to both commands are in",
    )


def test_an_engine_in_a_long_step_is_not_called_idle(host: Host, engine: FakeEngine) -> None:
    engine.knows(program())
    engine.report(gauges=msgspec.structs.replace(GAUGES, running_requests=1))
    request = program_pb2.ReleaseProgramRequest(**NAME)
    (found,) = host.client.programs.ReleaseProgram(request).results
    assert found.outcome == outcome_pb2.OUTCOME_DEFERRED
    assert found.detail == "done at its next step: it has not run one since"


def test_a_command_says_when_it_was_asked_for(host: Host, engine: FakeEngine) -> None:
    engine.knows(program())
    before_s = time.time()
    client = host.client
    client.programs.AnnounceToolCall(
        program_pb2.AnnounceToolCallRequest(**NAME, tool="bash", duration=Duration(seconds=600))
    )
    after_s = time.time()
    command = engine.next(link.ToolCallCommand)
    assert command.asked_s is not None
    assert before_s <= command.asked_s <= after_s
    engine.answer(command)
    engine.settle()
    (found,) = client.programs.GetProgram(program_pb2.GetProgramRequest(**NAME)).programs
    returns_s = found.predicted_return_at.ToNanoseconds() / 1e9
    assert returns_s == pytest.approx(command.asked_s + 600.0, abs=1e-3)


def test_a_callers_short_deadline_is_answered_in_time_and_not_exceeded(
    host: Host, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "PATIENCE_S", 3600.0)
    engine.knows(program())
    answer = host.client.programs.EndProgram(program_pb2.EndProgramRequest(**NAME), timeout=1.0)
    assert answer.results[0].outcome == outcome_pb2.OUTCOME_DEFERRED


def test_an_engine_that_ends_rejects_what_it_has_not_answered(
    host: Host, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "PATIENCE_S", 3600.0)
    engine.knows(program())
    client = host.client
    result = in_background(lambda: client.programs.EndProgram(COMMANDS["EndProgram"][0]))
    engine.next(link.EndCommand)
    engine.send(link.EngineBye(engine_id="engine-0"))
    (found,) = result().results
    assert (found.outcome, found.reason) == (outcome_pb2.OUTCOME_REJECTED, "engine_gone")
    # Programs end with their engine.
    host.engine("engine-1").join()
    refused = Refused(lambda: client.programs.GetProgram(program_pb2.GetProgramRequest(**NAME)))
    assert refused.code == grpc.StatusCode.NOT_FOUND


def test_an_engine_with_too_many_commands_to_answer_takes_no_more(
    host: Host, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "MAX_UNANSWERED", 2)
    engine.knows(program())
    client = host.client
    for _ in range(2):
        client.programs.StageProgram(COMMANDS["StageProgram"][0])
    refused = Refused(lambda: client.programs.StageProgram(COMMANDS["StageProgram"][0]))
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.reason == "ENGINE_BUSY"


def test_an_engine_whose_answers_were_lost_takes_commands_again_when_it_says_hello(
    host: Host, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "MAX_UNANSWERED", 3)
    engine.knows(program())
    client, desk = host.client, host.server.link_server.desk
    for _ in range(3):
        for _ in range(2):
            client.programs.StageProgram(COMMANDS["StageProgram"][0])
            engine.next(link.StageCommand)
        # Those of before the last hello, and those since: each at most so many.
        assert host.call(lambda: desk.unanswered("engine-0")) <= 6
        # The list of overrides, which goes with each answer to a hello, would be one too many.
        engine.send(engine.hello)
        overrides = engine.next(link.OverridesCommand)
    result = in_background(lambda: client.programs.StageProgram(COMMANDS["StageProgram"][0]))
    command = engine.next(link.StageCommand)
    engine.answer(overrides)
    engine.answer(command)
    (found,) = result().results
    assert found.outcome == outcome_pb2.OUTCOME_ACCEPTED
    assert host.call(lambda: desk.unanswered("engine-0")) == 0


def test_a_command_that_waits_while_the_engine_says_hello_again_has_its_answer(
    host: Host, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle engine says so when it is woken, before it reads."""
    monkeypatch.setattr(command_desk, "PATIENCE_S", 3600.0)
    engine.knows(program())
    result = in_background(lambda: host.client.programs.EndProgram(COMMANDS["EndProgram"][0]))
    command = engine.next(link.EndCommand)
    engine.send(engine.hello)
    overrides = engine.next(link.OverridesCommand)
    engine.answer(command)
    engine.answer(overrides)
    assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED


def test_a_later_answer_tells_that_an_earlier_one_is_lost(
    host: Host, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "PATIENCE_S", 3600.0)
    engine.knows(program())
    client = host.client
    lost = in_background(lambda: client.programs.StageProgram(COMMANDS["StageProgram"][0]))
    engine.next(link.StageCommand)
    result = in_background(lambda: client.programs.EndProgram(COMMANDS["EndProgram"][0]))
    engine.answer(engine.next(link.EndCommand))
    assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED
    (found,) = lost().results
    assert (found.outcome, found.reason) == (outcome_pb2.OUTCOME_REJECTED, "reconnected")


# -- announcements -----------------------------------------------------------------------------------


def test_what_a_client_announces_reaches_the_engine_and_then_the_picture(
    host: Host, engine: FakeEngine
) -> None:
    engine.knows(program())
    client = host.client
    request = program_pb2.AnnounceToolCallRequest(
        **NAME, tool="pytest", quantiles={"p50": Duration(seconds=60), "p90": Duration(seconds=90)}
    )
    result = in_background(lambda: client.programs.AnnounceToolCall(request))
    command = engine.next(link.ToolCallCommand)
    assert (command.tool, command.p50_s, command.p90_s) == ("pytest", 60.0, 90.0)
    engine.answer(command)
    result()
    get = program_pb2.GetProgramRequest(**NAME)
    (found,) = client.programs.GetProgram(get).programs
    assert found.tool == "pytest"
    assert 55 < found.predicted_return_at.ToSeconds() - time.time() < 65

    result = in_background(
        lambda: client.programs.AnnounceToolReturn(program_pb2.AnnounceToolReturnRequest(**NAME))
    )
    engine.answer(engine.next(link.ToolReturnCommand))
    result()
    (found,) = client.programs.GetProgram(get).programs
    assert abs(found.predicted_return_at.ToSeconds() - time.time()) < 5


@pytest.mark.parametrize("method", ["AnnounceToolCall", "AnnounceToolReturn"])
def test_a_repeated_announcement_is_done_once_and_answered_alike(
    host: Host, engine: FakeEngine, method: str
) -> None:
    engine.knows(program(), program("other"))
    call = getattr(host.client.programs, method)
    request = type(COMMANDS[method][0])()
    request.CopyFrom(COMMANDS[method][0])
    request.request_id = "id-1"
    first, again = in_background(lambda: call(request)), in_background(lambda: call(request))
    engine.answer(engine.next(COMMANDS[method][1]), "accepted", "noted")
    answer = first()
    assert again() == answer == call(request)
    assert engine.says_nothing()

    request.name = "other"
    refused = Refused(lambda: call(request))
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
    assert list(refused.fields) == ["request_id"]


def test_of_a_repeatable_call_little_is_kept_however_long_it_is(
    host: Host, engine: FakeEngine
) -> None:
    engine.knows(program())
    client = host.client

    def announce(unknown: bytes) -> Any:
        request = program_pb2.AnnounceToolCallRequest(**NAME, tool="bash", request_id="id-1")
        # Field 1000, bytes: no field of this message.
        size = len(unknown)
        length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
        request.MergeFromString(b"\xc2\x3e" + length + unknown)
        return client.programs.AnnounceToolCall(request)

    result = in_background(lambda: announce(b"x" * 1_000_000))
    engine.answer(engine.next(link.ToolCallCommand))
    # What the server does not understand makes no other call of it.
    assert announce(b"y" * 500_000) == result()
    kept = host.server._grpc.programs._announced._calls
    assert [len(call.digest) for call in kept.values()] == [32]


def test_a_call_that_failed_may_be_repeated_with_its_id(host: Host, engine: FakeEngine) -> None:
    client = host.client
    request = program_pb2.AnnounceToolReturnRequest(**NAME, request_id="id-1")
    refused = Refused(lambda: client.programs.AnnounceToolReturn(request))
    assert refused.code == grpc.StatusCode.NOT_FOUND
    engine.knows(program())
    result = in_background(lambda: client.programs.AnnounceToolReturn(request))
    engine.answer(engine.next(link.ToolReturnCommand))
    assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED


def test_one_id_serves_a_tool_calls_announcement_and_its_return(
    host: Host, engine: FakeEngine
) -> None:
    engine.knows(program())
    client = host.client
    call = program_pb2.AnnounceToolCallRequest(**NAME, tool="bash", request_id="call-7")
    back = program_pb2.AnnounceToolReturnRequest(**NAME, request_id="call-7")
    result = in_background(lambda: client.programs.AnnounceToolCall(call))
    engine.answer(engine.next(link.ToolCallCommand))
    result()
    result = in_background(lambda: client.programs.AnnounceToolReturn(back))
    engine.answer(engine.next(link.ToolReturnCommand))
    assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED


# -- waking ------------------------------------------------------------------------------------------


def wakeable(host: Host, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A waker and an engine that is its child; answers are waited for without end."""
    monkeypatch.setattr(command_desk, "WAKEABLE_PATIENCE_S", 3600.0)
    waker = host.peer()
    engine = host.engine(parent_pid=os.getpid(), dp_rank=3)
    waker.send(link.WakerHello(link=link.LINK_VERSION, pid=os.getpid(), parent_pid=1))
    # Engines that are idle since before the server began do not know of it, and are woken until one is here.
    for _ in range(2):
        assert link.waker_decoder.decode(waker.next_frame()) == link.Wake(dp_rank=link.ALL_RANKS)
        waker.send(link.WakerHello(link=link.LINK_VERSION, pid=os.getpid(), parent_pid=1))
    assert link.waker_decoder.decode(waker.next_frame()) == link.Wake(dp_rank=link.ALL_RANKS)
    return waker, engine


def test_a_waker_is_told_to_wake_an_idle_engine_that_has_a_command(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    waker, engine = wakeable(host, monkeypatch)
    engine.join()
    engine.knows(program())
    while not waker.says_nothing(100):
        waker.next_frame()
    waker.send(link.WakerHello(link=link.LINK_VERSION, pid=os.getpid(), parent_pid=1))
    assert waker.says_nothing(100), "its engine is here"
    result = in_background(lambda: host.client.programs.EndProgram(COMMANDS["EndProgram"][0]))
    assert link.waker_decoder.decode(waker.next_frame()) == link.Wake(dp_rank=3)
    # It is told again while the engine does not answer: a hook may just have ended before.
    assert link.waker_decoder.decode(waker.next_frame()) == link.Wake(dp_rank=3)
    engine.answer(engine.next(link.EndCommand))
    assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED


def test_a_busy_engine_that_answers_by_itself_is_not_woken(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "BUSY_WAKE_DELAY_S", 3600.0)
    waker, engine = wakeable(host, monkeypatch)
    engine.join()
    engine.knows(program())
    while not waker.says_nothing(100):
        waker.next_frame()
    busy = link.Gauges(
        **{f: getattr(GAUGES, f) for f in GAUGES.__struct_fields__} | {"running_requests": 1}
    )
    engine.report(gauges=busy)
    while not waker.says_nothing(100):
        waker.next_frame()
    result = in_background(lambda: host.client.programs.EndProgram(COMMANDS["EndProgram"][0]))
    engine.answer(engine.next(link.EndCommand))
    assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED
    assert waker.says_nothing(50)


# -- bad requests ------------------------------------------------------------------------------------

LONG = "x" * 257
BAD: list[tuple[str, dict[str, Any], set[str]]] = [
    ("GetProgram", {}, {"name"}),
    ("GetProgram", {"name": LONG}, {"name"}),
    ("GetProgram", {"name": "a\nb"}, {"name"}),
    ("GetProgram", {"name": "a", "tenant": LONG}, {"tenant"}),
    ("GetProgram", {"name": "", "tenant": "\x00"}, {"name", "tenant"}),
    ("ListPrograms", {"page_size": -1}, {"page_size"}),
    ("ListPrograms", {"page_size": 1001}, {"page_size"}),
    ("ListPrograms", {"page_size": 2**31 - 1}, {"page_size"}),
    ("ListPrograms", {"states": [0]}, {"states[0]"}),
    ("ListPrograms", {"states": [1, 99]}, {"states[1]"}),
    ("ListPrograms", {"tenant": LONG}, {"tenant"}),
    ("PinProgram", {**NAME}, {"ttl"}),
    ("PinProgram", {**NAME, "ttl": Duration()}, {"ttl"}),
    ("PinProgram", {**NAME, "ttl": Duration(seconds=-1)}, {"ttl"}),
    ("PinProgram", {**NAME, "ttl": Duration(seconds=604_800, nanos=1)}, {"ttl"}),
    ("PinProgram", {**NAME, "ttl": Duration(seconds=2**63 - 1)}, {"ttl"}),
    ("PinProgram", {**NAME, "ttl": Duration(seconds=1, nanos=-1)}, {"ttl"}),
    ("PinProgram", {**NAME, "ttl": Duration(nanos=2_000_000_000)}, {"ttl"}),
    ("ReleaseProgram", {"name": LONG}, {"name"}),
    ("StageProgram", {"name": ""}, {"name"}),
    ("PrefetchProgram", {"name": ""}, {"name"}),
    ("EndProgram", {"name": "", "tenant": LONG}, {"name", "tenant"}),
    ("AnnounceToolCall", {**NAME}, {"tool"}),
    ("AnnounceToolCall", {**NAME, "tool": "é" * 129}, {"tool"}),
    ("AnnounceToolCall", {**NAME, "tool": "b", "request_id": "x" * 129}, {"request_id"}),
    ("AnnounceToolCall", {**NAME, "tool": "b", "duration": Duration(seconds=-1)}, {"duration"}),
    ("AnnounceToolCall", {**NAME, "tool": "b", "quantiles": {}}, {"quantiles"}),
    (
        "AnnounceToolCall",
        {
            **NAME,
            "tool": "b",
            "quantiles": {"p50": Duration(seconds=2), "p90": Duration(seconds=1)},
        },
        {"quantiles.p90"},
    ),
    ("AnnounceToolReturn", {"name": "", "request_id": "\n"}, {"name", "request_id"}),
]


def test_every_bad_field_is_named_and_no_engine_hears_of_it(host: Host, engine: FakeEngine) -> None:
    client = host.client
    engine.knows(program())
    for method, fields, names in BAD:
        request = getattr(program_pb2, f"{method}Request")(**fields)
        call = getattr(client.programs, method)
        refused = Refused(lambda call=call, request=request: call(request))  # type: ignore[misc]
        assert refused.code == grpc.StatusCode.INVALID_ARGUMENT, (method, fields)
        assert set(refused.fields) == names, (method, fields)
        assert all("accepted" in text for text in refused.fields.values()), refused.fields
    assert engine.says_nothing()


def test_fields_at_their_limits_are_accepted(host: Host, engine: FakeEngine) -> None:
    key = program("é" * 256, "t" * 256)
    engine.knows(key)
    names = {"name": key.name, "tenant": key.tenant}
    client = host.client
    pin = program_pb2.PinProgramRequest(**names, ttl=Duration(seconds=604_800))
    result = in_background(lambda: client.programs.PinProgram(pin))
    command = engine.next(link.PinCommand)
    assert command.ttl_s == 604_800
    engine.answer(command)
    result()
    request = program_pb2.AnnounceToolCallRequest(
        **names, tool="é" * 128, duration=Duration(), request_id="x" * 128
    )
    result = in_background(lambda: client.programs.AnnounceToolCall(request))
    command = engine.next(link.ToolCallCommand)
    assert (command.p50_s, command.p90_s) == (0.0, None)
    engine.answer(command)
    assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED
