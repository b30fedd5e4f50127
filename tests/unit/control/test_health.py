"""`grpc.health.v1`, reflection and the metrics, as probes and tools see them."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from kvtier import link_messages as link
from kvtier.control.api.errors import ApiError
from kvtier.control.api.grpc_server import SERVICES
from kvtier.control.api.health import Health
from kvtier.v1 import observability_pb2
from tests.unit.control.control_host import GAUGES, Host, Refused, in_background
from tests.unit.control.strangers import (
    UNARY_METHODS,
    call_every_unary_method,
    expected_of,
    watch_an_event,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.control.control_host import FakeEngine

SERVING, NOT_SERVING = 1, 2


def status(host: Host, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(host.channel())
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)


def tier(state: str) -> link.Gauges:
    return msgspec.structs.replace(GAUGES, tier_state=state)


def test_without_an_engine_the_server_serves_and_its_services_do_not(host: Host) -> None:
    assert status(host, "") == SERVING
    assert {status(host, service) for service in SERVICES} == {NOT_SERVING}
    assert len(SERVICES) == 4
    refused = Refused(lambda: status(host, "kvtier.v2.Nothing"))
    assert refused.code == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("state", "expected"),
    [("ready", SERVING), ("off", SERVING), ("lost", NOT_SERVING), ("starting", NOT_SERVING)],
)
def test_services_serve_while_the_tier_works_or_is_not_wanted(
    host: Host, state: str, expected: int
) -> None:
    engine = host.engine()
    engine.join(tier(state))
    assert {status(host, service) for service in SERVICES} == {expected}
    assert status(host, "") == SERVING


def test_one_engine_with_a_tier_is_enough_and_its_end_is_noticed(host: Host) -> None:
    first, second = host.engine(), host.engine("engine-1")
    first.join(tier("lost"))
    assert status(host, SERVICES[0]) == NOT_SERVING
    second.join(tier("ready"))
    assert status(host, SERVICES[0]) == SERVING
    second.report(gauges=tier("starting"))
    assert status(host, SERVICES[0]) == NOT_SERVING
    first.report(gauges=tier("ready"))
    assert status(host, SERVICES[0]) == SERVING
    first.send(link.EngineBye(engine_id="engine-0"))
    second.settle()
    assert status(host, SERVICES[0]) == NOT_SERVING


def test_an_engine_that_has_not_reported_yet_does_not_count(host: Host) -> None:
    host.engine().join(None)
    assert status(host, SERVICES[0]) == NOT_SERVING


def test_health_is_watched_by_several_none_of_whom_ends_another(host: Host) -> None:
    stub: Any = health_pb2_grpc.HealthStub(host.channel())
    request = health_pb2.HealthCheckRequest(service=SERVICES[0])
    streams = [stub.Watch(request) for _ in range(3)]
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nothing"))
    assert [next(stream).status for stream in streams] == [NOT_SERVING] * 3
    assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    streams.pop().cancel()
    host.engine().join()
    assert [next(stream).status for stream in streams] == [SERVING] * 2
    waits = [in_background(lambda stream=stream: next(stream).status) for stream in streams]  # type: ignore[misc]
    host.stop()
    assert [wait() for wait in waits] == [NOT_SERVING] * 2
    for stream in streams:
        assert Refused(lambda stream=stream: next(stream)).code == grpc.StatusCode.UNAVAILABLE  # type: ignore[misc]


def test_who_watches_is_told_of_a_stop_that_came_while_it_was_told_something_else() -> None:
    async def watch() -> list[int]:
        health = Health(SERVICES)
        answers = health.Watch(health_pb2.HealthCheckRequest(), None)
        told = [(await anext(answers)).status]
        # The answer is being sent: the watcher does not wait for a change.
        health.stop()
        told.append((await anext(answers)).status)
        with pytest.raises(ApiError, match="stops"):
            await anext(answers)
        return told

    assert asyncio.run(watch()) == [SERVING, NOT_SERVING]


def test_reflection_shows_every_service_and_what_its_methods_take(host: Host) -> None:
    database = ProtoReflectionDescriptorDatabase(host.channel())
    assert set(SERVICES) | {"grpc.health.v1.Health"} <= set(database.get_services())
    pool = descriptor_pool.DescriptorPool(database)
    found = {
        method.full_name: method.input_type.full_name
        for name in SERVICES
        for method in pool.FindServiceByName(name).methods
    }
    assert len(found) == 18
    assert found["kvtier.v1.ProgramService.PinProgram"] == "kvtier.v1.PinProgramRequest"


def test_a_stranger_may_call_every_method_that_it_finds(host: Host, engine: FakeEngine) -> None:
    found = call_every_unary_method(host.channel())
    assert len(found) == UNARY_METHODS
    assert found == {method: expected_of(method) for method in found}


def test_a_stranger_may_watch_what_happens(host: Host, engine: FakeEngine) -> None:
    bye = link.EngineBye(engine_id="engine-0")
    event = watch_an_event(host.channel(), lambda: engine.send(bye))
    assert (event.kind, event.engine_id) == ("engine", "engine-0")
    assert event.fields["change"] == "gone"


def test_metrics_are_served_on_their_own_address(tmp_path: Path) -> None:
    with Host(tmp_path, metrics_listen="127.0.0.1:0") as host:
        engine = host.engine()
        engine.join()
        host.client.observability.GetStatus(observability_pb2.GetStatusRequest())
        refused = Refused(
            lambda: host.client.observability.ExplainDecision(
                observability_pb2.ExplainDecisionRequest()
            )
        )
        assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
        http = host.server.metrics._http
        assert http is not None
        with urllib.request.urlopen(f"http://127.0.0.1:{http[0].server_port}/metrics") as answer:
            text = answer.read().decode()
    service = "kvtier.v1.ObservabilityService"
    for line in (
        f'kvtier_control_calls_total{{code="OK",method="{service}/GetStatus"}} 1.0',
        f'kvtier_control_calls_total{{code="INVALID_ARGUMENT",method="{service}/ExplainDecision"}} 1.0',
        'kvtier_control_commands_total{command="overrides",outcome="accepted"} 2.0',
        "kvtier_control_engines 1.0",
        "kvtier_control_watchers 0.0",
    ):
        assert line in text.splitlines(), text


def test_the_engine_fixture_is_served(host: Host, engine: FakeEngine) -> None:
    assert status(host, SERVICES[0]) == SERVING
