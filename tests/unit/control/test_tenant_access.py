"""What a tenant's token lets its owner see and do."""

from __future__ import annotations

from typing import Any

import grpc
import msgspec
import pytest
from google.protobuf.duration_pb2 import Duration

from kvtier import link_messages as link
from kvtier.v1 import observability_pb2, outcome_pb2, policy_pb2, program_pb2, ttl_pb2
from tests.unit.control.access_cases import ACME, GET, OPEN, OTHER, STATUS, over_tcp, with_token
from tests.unit.control.control_host import (
    BLOCK_BYTES,
    GAUGES,
    Host,
    Refused,
    in_background,
    program,
)

MINE, THEIRS = program("agent", "acme"), program("agent", "other corp")


@pytest.fixture
def tenants(guarded: Host) -> Host:
    """Two tenants' programs and overrides, and one of nobody's."""
    for scope in (
        {"program": {"name": "agent", "tenant": "acme"}},
        {"program": {"name": "agent", "tenant": "other corp"}},
        {"program": {"name": "agent"}},
        {"tool": "bash"},
        {"tenant": "acme"},
        {"tenant": "other corp"},
        {"all": True},
    ):
        guarded.client.ttl.SetTtlOverride(_set(scope))
    engine = guarded.engine()
    engine.join()
    engine.knows(MINE, THEIRS, program("agent"))
    return guarded


def _set(scope: dict[str, Any]) -> ttl_pb2.SetTtlOverrideRequest:
    return ttl_pb2.SetTtlOverrideRequest(
        override=ttl_pb2.TtlOverride(
            scope=ttl_pb2.TtlScope(**scope),
            mode=ttl_pb2.TTL_MODE_CAP,
            ttl=Duration(seconds=1),
        )
    )


def test_a_tenant_sees_its_own_programs_and_no_others(tenants: Host) -> None:
    client, token = over_tcp(tenants), with_token(ACME)
    assert client.programs.GetProgram(GET, **token).programs[0].tenant == "acme"
    found = client.programs.ListPrograms(program_pb2.ListProgramsRequest(), **token)
    assert ([p.tenant for p in found.programs], found.total_size) == (["acme"], 1)
    for tenant in ("other corp", ""):
        found = client.programs.ListPrograms(
            program_pb2.ListProgramsRequest(tenant=tenant), **token
        )
        assert (list(found.programs), found.total_size) == ([], 0)


def test_a_tenant_sees_nothing_of_others_programs_in_the_status(tenants: Host) -> None:
    busy = msgspec.structs.replace(GAUGES, programs=3, staging_programs=2, loading_requests=1)
    tenants.engine().join(busy)

    def seen(token: str) -> list[int]:
        (engine,) = over_tcp(tenants).observability.GetStatus(STATUS, **with_token(token)).engines
        assert engine.gpu.free_bytes == 60 * BLOCK_BYTES
        gpu, cpu = engine.gpu, engine.cpu
        return [gpu.programs, gpu.pinned_bytes, cpu.staging_programs, cpu.loading_requests]

    assert seen(OPEN) == [3, 10 * BLOCK_BYTES, 2, 1]
    assert seen(ACME) == [0, 0, 0, 0]


@pytest.mark.parametrize("tenant", ["other corp", "", "nobody"])
def test_anothers_program_is_not_found_as_if_there_were_none(tenants: Host, tenant: str) -> None:
    client, token = over_tcp(tenants), with_token(ACME)
    of = {"name": "agent", "tenant": tenant}
    seconds = Duration(seconds=1)
    calls = [
        (client.programs.GetProgram, program_pb2.GetProgramRequest(**of)),
        (client.programs.PinProgram, program_pb2.PinProgramRequest(**of, ttl=seconds)),
        (client.programs.ReleaseProgram, program_pb2.ReleaseProgramRequest(**of)),
        (client.programs.StageProgram, program_pb2.StageProgramRequest(**of)),
        (client.programs.PrefetchProgram, program_pb2.PrefetchProgramRequest(**of)),
        (
            client.programs.AnnounceToolCall,
            program_pb2.AnnounceToolCallRequest(**of, tool="x", request_id="id"),
        ),
        (client.programs.AnnounceToolReturn, program_pb2.AnnounceToolReturnRequest(**of)),
        (client.programs.EndProgram, program_pb2.EndProgramRequest(**of)),
        (
            client.observability.ExplainDecision,
            observability_pb2.ExplainDecisionRequest(**of),
        ),
        (client.ttl.SetTtlOverride, _set({"program": of})),
        (
            client.ttl.DeleteTtlOverride,
            ttl_pb2.DeleteTtlOverrideRequest(scope=_set({"program": of}).override.scope),
        ),
    ]
    messages = set()
    for call, request in calls:
        refused = Refused(lambda call=call, request=request: call(request, **token))  # type: ignore[misc]
        assert refused.code == grpc.StatusCode.NOT_FOUND, request
        assert refused.reason == "PROGRAM_NOT_FOUND"
        messages.add(refused.message)
    # What an unknown program of its own is told, word for word.
    unknown = program_pb2.GetProgramRequest(name="agent", tenant="acme")
    unknown.name = "agent2"
    refused = Refused(lambda: client.programs.GetProgram(unknown, **token))
    assert messages == {refused.message.replace("agent2", "agent")}


def test_a_tenant_commands_its_own_programs(tenants: Host) -> None:
    engine = tenants.engine()
    engine.join()
    engine.knows(MINE, THEIRS)
    client, token = over_tcp(tenants), with_token(ACME)
    request = program_pb2.EndProgramRequest(name="agent", tenant="acme")
    result = in_background(lambda: client.programs.EndProgram(request, **token))
    command = engine.next(link.EndCommand)
    assert command.program == MINE
    engine.answer(command)
    assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED


def test_a_tenant_sets_sees_and_deletes_its_own_overrides(tenants: Host) -> None:
    client, token = over_tcp(tenants), with_token(ACME)

    def scopes() -> list[str | None]:
        found = client.ttl.ListTtlOverrides(ttl_pb2.ListTtlOverridesRequest(), **token)
        return [o.scope.WhichOneof("scope") for o in found.overrides]

    assert scopes() == ["program", "tenant"]
    client.ttl.SetTtlOverride(_set({"program": {"name": "new", "tenant": "acme"}}), **token)
    assert scopes() == ["program", "program", "tenant"]
    scope = ttl_pb2.TtlScope(tenant="acme")
    client.ttl.DeleteTtlOverride(ttl_pb2.DeleteTtlOverrideRequest(scope=scope), **token)
    assert scopes() == ["program", "program"]


@pytest.mark.parametrize("scope", [{"tool": "bash"}, {"all": True}, {"tenant": "other corp"}])
def test_what_concerns_others_too_is_denied_to_a_tenant(
    tenants: Host, scope: dict[str, Any]
) -> None:
    client, token = over_tcp(tenants), with_token(ACME)
    delete = ttl_pb2.DeleteTtlOverrideRequest(scope=ttl_pb2.TtlScope(**scope))
    for call, request in (
        (client.ttl.SetTtlOverride, _set(scope)),
        (client.ttl.DeleteTtlOverride, delete),
        (client.policy.GetPolicy, policy_pb2.GetPolicyRequest()),
        (client.policy.UpdatePolicy, policy_pb2.UpdatePolicyRequest()),
        (client.observability.Calibrate, observability_pb2.CalibrateRequest()),
    ):
        refused = Refused(lambda call=call, request=request: call(request, **token))  # type: ignore[misc]
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "BOUND_TO_TENANT",
        )
    # The one who may do all may do these.
    client.ttl.DeleteTtlOverride(delete, **with_token(OPEN))


def test_a_tenants_overrides_are_limited_and_take_nobodys_room(
    tenants: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.control.override_book.MAX_PER_TENANT", 3)
    client = over_tcp(tenants)
    one, two = (_set({"program": {"name": name, "tenant": "acme"}}) for name in ("one", "two"))
    client.ttl.SetTtlOverride(one, **with_token(ACME))
    refused = Refused(lambda: client.ttl.SetTtlOverride(two, **with_token(ACME)))
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    client.ttl.SetTtlOverride(one, **with_token(ACME))
    client.ttl.SetTtlOverride(two, **with_token(OPEN))


def test_a_tenant_watches_its_own_programs_only(tenants: Host) -> None:
    engine = tenants.engine()
    engine.join()
    client, token = over_tcp(tenants), with_token(ACME)
    stream = client.observability.WatchEvents(observability_pb2.WatchEventsRequest(), **token)
    stream.initial_metadata()
    for key in (THEIRS, program("agent"), MINE):
        engine.report(link.ProgramGone(at_s=1.0, program=key))
    # Neither the others' nor the engine's own events, nor the commands to set overrides.
    assert next(stream).event.tenant == "acme"
    stream.cancel()
    request = observability_pb2.WatchEventsRequest(name="agent", tenant="other corp")
    refused = Refused(lambda: next(client.observability.WatchEvents(request, **token)))
    assert refused.code == grpc.StatusCode.NOT_FOUND


def test_page_tokens_and_request_ids_of_one_tenant_are_nothing_to_another(
    tenants: Host,
) -> None:
    engine = tenants.engine()
    engine.join()
    engine.knows(MINE, program("second", "acme"), THEIRS)
    client = over_tcp(tenants)
    page = client.programs.ListPrograms(
        program_pb2.ListProgramsRequest(page_size=1), **with_token(ACME)
    )
    request = program_pb2.ListProgramsRequest(page_size=1, page_token=page.next_page_token)
    refused = Refused(lambda: client.programs.ListPrograms(request, **with_token(OTHER)))
    assert list(refused.fields) == ["page_token"]
    for token, tenant in ((ACME, "acme"), (OTHER, "other corp")):
        call = program_pb2.AnnounceToolReturnRequest(name="agent", tenant=tenant, request_id="same")
        result = in_background(
            lambda call=call, token=token: client.programs.AnnounceToolReturn(  # type: ignore[misc]
                call, **with_token(token)
            )
        )
        engine.answer(engine.next(link.ToolReturnCommand))
        assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED
