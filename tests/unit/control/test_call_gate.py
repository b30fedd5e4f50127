"""What every call passes: sizes, limits, malformed requests, bugs, deadlines."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier import link_messages as link
from kvtier.control import command_desk
from kvtier.control.api import call_gate
from kvtier.control.api.grpc_server import MAX_RPCS, SERVICES
from kvtier.v1 import observability_pb2, policy_pb2, program_pb2, ttl_pb2
from tests.unit.control.control_host import Host, Refused, in_background, program, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.unit.control.control_host import FakeEngine

METHODS = [
    f"/{service.full_name}/{method.name}"
    for module in (observability_pb2, policy_pb2, program_pb2, ttl_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.name != "WatchEvents"
]
STATUS = observability_pb2.GetStatusRequest()


def call_raw(host_channel: grpc.Channel, method: str, request: bytes) -> Any:
    return host_channel.unary_unary(method)(request, timeout=20)


def calls(host: Host, method: str, code: str) -> float:
    return host.sample("kvtier_control_calls_total", method=method.removeprefix("/"), code=code)


@pytest.mark.parametrize("method", METHODS)
def test_a_request_that_is_no_message_is_an_invalid_argument(host: Host, method: str) -> None:
    refused = Refused(lambda: call_raw(host.channel(), method, b"\xff\xff\xff"))
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "BadRequest" in refused.details
    assert calls(host, method, "INVALID_ARGUMENT") == 1


def test_text_that_is_no_utf8_and_fields_of_a_wrong_type_are_invalid(host: Host) -> None:
    method = "/kvtier.v1.ProgramService/GetProgram"
    for request in (b"\x0a\x02\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05a"):
        refused = Refused(lambda request=request: call_raw(host.channel(), method, request))  # type: ignore[misc]
        assert refused.code == grpc.StatusCode.INVALID_ARGUMENT


def test_too_long_a_request_is_refused_before_it_is_taken_in(host: Host) -> None:
    for size in ((1 << 20) + 1, 16 << 20):
        refused = Refused(
            lambda size=size: call_raw(host.channel(), METHODS[0], bytes(size))  # type: ignore[misc]
        )
        assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    host.client.observability.GetStatus(STATUS)


def test_a_request_that_does_not_come_is_not_waited_for_without_end(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_gate, "REQUEST_S", 0.05)
    held: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    channel, path = host.channel(), "/kvtier.v1.ObservabilityService/GetStatus"
    refused = Refused(lambda: channel.stream_unary(path)(iter(held.get, b""), timeout=20))
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "REQUEST_TOO_LATE",
    )
    assert "no request has come" in refused.message
    monkeypatch.setattr(call_gate, "REQUEST_S", 60.0)
    refused = Refused(lambda: channel.stream_unary(path)(iter(()), timeout=20))
    assert "the request is missing" in refused.message
    held.put(b"")


def test_a_call_that_ends_before_its_request_is_counted_as_what_it_was(host: Host) -> None:
    held: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    channel, path = host.channel(), "/kvtier.v1.ObservabilityService/GetStatus"
    for attempt in range(8):
        # On a busy machine the time may be up before the server has heard of the call.
        with pytest.raises(grpc.RpcError):
            channel.stream_unary(path)(iter(held.get, b""), timeout=0.1 * 2**attempt)
        if calls(host, path, "DEADLINE_EXCEEDED"):
            break
    left = channel.stream_unary(path).future(iter(held.get, b""), timeout=60)
    running = host.server._grpc.gate._running
    wait_until(lambda: host.call(lambda: running["calls"]) == 1, "the call has been let in")
    left.cancel()
    for code in ("DEADLINE_EXCEEDED", "CANCELLED"):
        wait_until(lambda code=code: calls(host, path, code) > 0, f"{code} is counted")  # type: ignore[misc]
    assert calls(host, path, "CANCELLED") == 1
    assert calls(host, path, "DEADLINE_EXCEEDED") <= attempt + 1
    assert calls(host, path, "INVALID_ARGUMENT") == 0
    for _ in range(16):
        held.put(b"")


def test_an_unknown_method_is_unimplemented(host: Host) -> None:
    refused = Refused(lambda: call_raw(host.channel(), f"/{SERVICES[0]}/Nothing", b""))
    assert refused.code == grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[tuple[Host, FakeEngine, grpc.Channel]]:
    """One server for many examples."""
    with Host(tmp_path) as host:
        engine = host.engine()
        engine.join()
        engine.knows(program())
        yield host, engine, host.channel()


def code_of(channel: grpc.Channel, method: str, request: bytes) -> grpc.StatusCode:
    try:
        call_raw(channel, method, request)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
        return code
    return grpc.StatusCode.OK


ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    # More commands than the engine, which never answers here, may have.
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(method=st.sampled_from(METHODS), request=st.binary(max_size=60))
def test_random_requests_have_canonical_answers(
    serving: tuple[Host, FakeEngine, grpc.Channel],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    request: bytes,
) -> None:
    monkeypatch.setattr(command_desk, "PATIENCE_S", 0.0)
    assert code_of(serving[2], method, request) in ALLOWED, (method, request)


texts = st.one_of(
    st.text(max_size=5), st.just("x" * 257), st.sampled_from(["agent", "acme", "\x00", "\ud7ff"])
)
whole = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, 604_800, 604_801]))
durations = st.builds(
    lambda s, n: {"seconds": s, "nanos": n}, whole, st.integers(-(2**31), 2**31 - 1)
)
small = st.integers(-(2**31), 2**31 - 1)
scopes = st.one_of(
    st.just({}),
    st.builds(lambda n, t: {"program": {"name": n, "tenant": t}}, texts, texts),
    st.builds(lambda t: {"tool": t}, texts),
    st.builds(lambda t: {"tenant": t}, texts),
    st.builds(lambda b: {"all": b}, st.booleans()),
)
policies = st.fixed_dictionaries(
    {},
    optional={
        "mode": small,
        "pin_budget_fraction": st.floats(),
        "max_ttl": durations,
        "admission": small,
        "aging": durations,
        "max_defer": durations,
        "stage": st.booleans(),
        "tenant_budgets": st.lists(
            st.builds(
                lambda t, b, p: {"tenant": t, "byte_seconds": b, "period": p},
                texts,
                whole,
                durations,
            ),
            max_size=3,
        ),
    },
)
paths = st.one_of(texts, st.sampled_from(list(policy_pb2.Policy.DESCRIPTOR.fields_by_name)))
requests = st.one_of(
    st.builds(
        lambda s, t, n, p: (
            "ProgramService/ListPrograms",
            program_pb2.ListProgramsRequest(states=s, tenant=t, page_size=n, page_token=p),
        ),
        st.lists(small, max_size=3),
        texts,
        small,
        texts,
    ),
    st.builds(
        lambda n, t, d: (
            "ProgramService/PinProgram",
            program_pb2.PinProgramRequest(name=n, tenant=t, ttl=d),
        ),
        texts,
        texts,
        durations,
    ),
    st.builds(
        lambda n, tool, a, b, i: (
            "ProgramService/AnnounceToolCall",
            program_pb2.AnnounceToolCallRequest(
                name=n, tool=tool, quantiles={"p50": a, "p90": b}, request_id=i
            ),
        ),
        texts,
        texts,
        durations,
        durations,
        texts,
    ),
    st.builds(
        lambda s, m, d, e: (
            "TtlService/SetTtlOverride",
            ttl_pb2.SetTtlOverrideRequest(
                override={"scope": s, "mode": m, "ttl": d, "expires_at": e}
            ),
        ),
        scopes,
        small,
        durations,
        durations,
    ),
    st.builds(
        lambda p, m, e: (
            "PolicyService/UpdatePolicy",
            policy_pb2.UpdatePolicyRequest(policy=p, update_mask={"paths": m}, engine_id=e),
        ),
        policies,
        st.lists(paths, max_size=4),
        texts,
    ),
    st.builds(
        lambda n, t, i: (
            "ObservabilityService/ExplainDecision",
            observability_pb2.ExplainDecisionRequest(name=n, tenant=t, limit=i),
        ),
        texts,
        texts,
        small,
    ),
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(requests)
def test_absurd_requests_have_canonical_answers(
    serving: tuple[Host, FakeEngine, grpc.Channel],
    monkeypatch: pytest.MonkeyPatch,
    request_: tuple[str, Any],
) -> None:
    monkeypatch.setattr(command_desk, "PATIENCE_S", 0.0)
    method, message = request_
    code = code_of(serving[2], f"/kvtier.v1.{method}", message.SerializeToString())
    assert code in ALLOWED, (method, message)


def test_calls_at_a_time_are_limited_and_others_are_told_to_come_later(
    host: Host, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "PATIENCE_S", 3600.0)
    engine.knows(program())
    client = host.client
    request = program_pb2.EndProgramRequest(name="agent")
    host.call(lambda: host.server._grpc.gate._limits.update(calls=2))
    results = [in_background(lambda: client.programs.EndProgram(request)) for _ in range(2)]
    commands = [engine.next(link.EndCommand) for _ in range(2)]
    refused = Refused(lambda: client.observability.GetStatus(STATUS))
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "TOO_MANY_CALLS",
    )
    for command in commands:
        engine.answer(command)
    for result in results:
        result()
    wait_until(lambda: not host.server._grpc.gate._running["calls"], "the calls have ended")
    client.observability.GetStatus(STATUS)


def test_watchers_of_health_keep_nobody_else_out(host: Host, engine: FakeEngine) -> None:
    stub: Any = health_pb2_grpc.HealthStub(host.channel())
    watch = health_pb2.HealthCheckRequest(service="")
    streams = [stub.Watch(watch) for _ in range(call_gate.MAX_HEALTH_STREAMS)]
    assert {next(stream).status for stream in streams} == {1}
    refused = Refused(lambda: next(stub.Watch(watch)))
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "TOO_MANY_CALLS",
    )
    # All the room that the others have is left.
    host.call(lambda: host.server._grpc.gate._limits.update(streams=1))
    events = host.client.observability.WatchEvents(observability_pb2.WatchEventsRequest())
    events.initial_metadata()
    engine.send(link.EngineBye(engine_id="engine-0"))
    assert next(events).event.kind == "engine"
    assert stub.Check(watch).status == 1
    for stream in (*streams, events):
        stream.cancel()


def test_a_bug_is_an_internal_error_that_tells_its_story_to_the_log_alone(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(host.server.registry, "engines", broken)
    refused = Refused(lambda: host.client.observability.GetStatus(STATUS))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in refused.message
    assert "a secret of the house" in caplog.text


def test_a_call_that_is_given_up_leaves_nothing_running(
    host: Host, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "PATIENCE_S", 3600.0)
    engine.knows(program())
    request = program_pb2.EndProgramRequest(name="agent")
    future = host.client.programs.EndProgram.future(request)
    command = engine.next(link.EndCommand)
    future.cancel()
    method = "/kvtier.v1.ProgramService/EndProgram"
    wait_until(lambda: calls(host, method, "CANCELLED") == 1, "the server has noticed")
    assert host.server._grpc.gate._running["calls"] == 0
    engine.answer(command)
    engine.settle()


def test_the_gates_limits_are_below_the_servers() -> None:
    health = call_gate.MAX_HEALTH_CALLS + call_gate.MAX_HEALTH_STREAMS
    assert call_gate.MAX_CALLS + call_gate.MAX_STREAMS + health < MAX_RPCS
