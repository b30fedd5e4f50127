"""What the client's calls carry, and what becomes of the answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration

from kvtier import client as front
from kvtier.client import (
    CommandResult,
    KVTierClient,
    Outcome,
    ProgramState,
    TenantBudget,
    TtlMode,
    TtlScope,
)
from kvtier.v1 import observability_pb2, outcome_pb2, policy_pb2, program_pb2, ttl_pb2
from tests.unit.scripted_control import ScriptedControl, on_unix_socket, time_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOLD = timezone(timedelta(hours=2))


@pytest.fixture
def server() -> Iterator[ScriptedControl]:
    with on_unix_socket() as server:
        yield server


@pytest.fixture
def client(server: ScriptedControl) -> Iterator[KVTierClient]:
    with KVTierClient(server.target) as client:
        yield client


def test_a_program_comes_with_all_its_fields(client: KVTierClient, server: ScriptedControl) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, 500000, tzinfo=UTC)
    server.script["GetProgram"] = [
        program_pb2.GetProgramResponse(
            programs=[
                program_pb2.Program(
                    name="p", tenant="t", named=True,
                    state=program_pb2.PROGRAM_STATE_PAUSED, engine_id="e0",
                    turns=3, context_tokens=4, gpu_pinned_tokens=5, cpu_tokens=6, tool="bash",
                    started_at=time_of(at), last_active_at=time_of(at),
                    predicted_return_at=time_of(at), ttl_left=Duration(seconds=1, nanos=250_000_000),
                ),
                program_pb2.Program(name="p"),
            ]
        )
    ]  # fmt: skip
    full, empty = client.get_program("p", tenant="t")
    assert full == front.Program(
        "p", "t", True, ProgramState.PAUSED, "e0", 3, 4, 5, 6, "bash", at, at, at, 1.25
    )
    assert (empty.state, empty.tool, empty.started_at, empty.ttl_left_s) == (
        ProgramState.UNKNOWN, None, None, None,
    )  # fmt: skip
    assert server.requests("GetProgram") == [program_pb2.GetProgramRequest(name="p", tenant="t")]


def test_results_say_what_became_of_a_command(
    client: KVTierClient, server: ScriptedControl
) -> None:
    result = outcome_pb2.CommandResult(
        outcome=outcome_pb2.OUTCOME_CLIPPED, reason="max_ttl", detail="to 600 s", engine_id="e0"
    )
    newer = outcome_pb2.CommandResult(outcome=99)  # type: ignore[arg-type]
    server.script["PinProgram"] = [program_pb2.PinProgramResponse(results=[result, newer])]
    clipped, unknown = client.pin_program("p", 1e4, tenant="t")
    assert clipped == CommandResult(Outcome.CLIPPED, "max_ttl", "to 600 s", "e0")
    assert clipped.is_done
    assert unknown.outcome is Outcome.UNKNOWN
    assert not unknown.is_done
    request = server.requests("PinProgram")[0]
    assert (request.name, request.tenant, request.ttl) == ("p", "t", Duration(seconds=10_000))


def test_pages_are_followed_to_the_last(client: KVTierClient, server: ScriptedControl) -> None:
    def page(request: program_pb2.ListProgramsRequest) -> program_pb2.ListProgramsResponse:
        n = int(request.page_token or 0)
        return program_pb2.ListProgramsResponse(
            programs=[program_pb2.Program(name=f"p{n}"), program_pb2.Program(name=f"q{n}")],
            next_page_token=str(n + 1) if n < 2 else "",
            total_size=6,
        )

    server.script["ListPrograms"] = [page]
    names = [p.name for p in client.iter_programs(states=["paused"], tenant="", page_size=2)]
    assert names == ["p0", "q0", "p1", "q1", "p2", "q2"]
    requests = server.requests("ListPrograms")
    assert [r.page_token for r in requests] == ["", "1", "2"]
    assert {(tuple(r.states), r.HasField("tenant"), r.tenant, r.page_size) for r in requests} == {
        ((program_pb2.PROGRAM_STATE_PAUSED,), True, "", 2)
    }
    assert client.list_programs().total_size == 6
    assert not server.requests("ListPrograms")[-1].HasField("tenant")


def test_pages_of_overrides_are_followed_too(client: KVTierClient, server: ScriptedControl) -> None:
    override = ttl_pb2.TtlOverride(
        scope=ttl_pb2.TtlScope(tool="bash"), mode=ttl_pb2.TTL_MODE_CAP, ttl=Duration(seconds=60)
    )
    server.script["ListTtlOverrides"] = [
        ttl_pb2.ListTtlOverridesResponse(overrides=[override], next_page_token="n"),
        ttl_pb2.ListTtlOverridesResponse(overrides=[override]),
    ]
    found = list(client.iter_ttl_overrides())
    wanted = front.TtlOverride(TtlScope.of_tool("bash"), TtlMode.CAP, 60.0, None)
    assert found == [wanted, wanted]
    assert [r.page_token for r in server.requests("ListTtlOverrides")] == ["", "n"]


@pytest.mark.parametrize(
    ("scope", "sent"),
    [
        (
            TtlScope.of_program("p", "t"),
            ttl_pb2.TtlScope(program=ttl_pb2.ProgramScope(name="p", tenant="t")),
        ),
        (TtlScope.of_tool("bash"), ttl_pb2.TtlScope(tool="bash")),
        (TtlScope.of_tenant(""), ttl_pb2.TtlScope(tenant="")),
        (TtlScope.of_all(), ttl_pb2.TtlScope(all=True)),
    ],
)
def test_an_overrides_scope_goes_there_and_back(
    scope: TtlScope, sent: ttl_pb2.TtlScope, client: KVTierClient, server: ScriptedControl
) -> None:
    server.script["SetTtlOverride"] = [
        lambda r: ttl_pb2.SetTtlOverrideResponse(override=r.override, engines=2, saved=True)
    ]
    expires_at = datetime(2030, 1, 1, 2, tzinfo=TOLD)
    applied = client.set_ttl_override(scope, 0.5, mode="floor", expires_at=expires_at)
    assert (applied.engines, applied.saved) == (2, True)
    assert applied.override == front.TtlOverride(scope, TtlMode.FLOOR, 0.5, expires_at)
    server.script["DeleteTtlOverride"] = [ttl_pb2.DeleteTtlOverrideResponse(engines=3)]
    assert client.delete_ttl_override(scope) == front.DeletedOverride(3, False)
    assert server.requests("SetTtlOverride")[0].override.scope == sent
    assert server.requests("DeleteTtlOverride")[0].scope == sent


def test_only_the_changed_settings_are_in_the_mask(
    client: KVTierClient, server: ScriptedControl
) -> None:
    policy = policy_pb2.Policy(
        mode=policy_pb2.MODE_SHADOW, pin_budget_fraction=0.0, max_ttl=Duration(seconds=30),
        admission=policy_pb2.ADMISSION_PROGRAM_FCFS, aging=Duration(), stage=False,
        max_defer=Duration(seconds=1),
        tenant_budgets=[
            policy_pb2.TenantBudget(tenant="t", byte_seconds=8, period=Duration(seconds=60))
        ],
    )  # fmt: skip
    server.script["UpdatePolicy"] = [
        policy_pb2.UpdatePolicyResponse(policies=[{"engine_id": "e0", "policy": policy}])
    ]
    update = client.update_policy(
        engine_id="e0", mode="shadow", pin_budget_fraction=0.0, max_ttl_s=30, aging_s=0,
        admission="program_fcfs", max_defer_s=1, stage=False,
        tenant_budgets=[TenantBudget("t", 8, 60.0)],
    )  # fmt: skip
    request = server.requests("UpdatePolicy")[0]
    assert request.policy == policy
    assert request.engine_id == "e0"
    assert set(request.update_mask.paths) == set(policy.DESCRIPTOR.fields_by_name)
    assert update.policies[0] == front.EnginePolicy(
        "e0",
        front.Policy(
            front.Mode.SHADOW, 0.0, 30.0, front.Admission.PROGRAM_FCFS, 0.0, 1.0, False,
            (TenantBudget("t", 8, 60.0),),
        ),
    )  # fmt: skip
    client.update_policy(stage=True)
    assert server.requests("UpdatePolicy")[1].update_mask.paths == ["stage"]


def test_status_and_decisions_come_with_all_their_parts(
    client: KVTierClient, server: ScriptedControl
) -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    server.script["GetStatus"] = [
        observability_pb2.GetStatusResponse(
            version="1", started_at=time_of(at), watchers=2,
            engines=[
                observability_pb2.EngineStatus(
                    engine_id="e0", model="m", pid=4, mode="on", started_at=time_of(at),
                    reported_at=time_of(at), wakeable=True,
                    gpu=observability_pb2.GpuTier(
                        total_bytes=10, free_bytes=4, pinned_bytes=3, budget_bytes=5, programs=2
                    ),
                    cpu=observability_pb2.CpuTier(
                        state="ready", total_bytes=9, staging_programs=1, loading_requests=2
                    ),
                    link=observability_pb2.Link(to_cpu_bytes_per_s=1.5, to_gpu_bytes_per_s=2.5),
                    queue=observability_pb2.Queue(
                        running_requests=1, waiting_requests=2, waiting_tokens=3,
                        delay=Duration(nanos=500_000_000),
                    ),
                    versions={"vllm": "0.32"},
                )
            ],
        )
    ]  # fmt: skip
    assert client.get_status() == front.Status(
        "1",
        (
            front.EngineStatus(
                "e0", "m", 4, "on", at, at, True, front.GpuTier(10, 4, 3, 5, 2),
                front.CpuTier("ready", 9, 1, 2), front.Link(1.5, 2.5, None),
                front.Queue(1, 2, 3, 0.5), {"vllm": "0.32"},
            ),
        ),
        at,
        2,
    )  # fmt: skip
    server.script["ExplainDecision"] = [
        observability_pb2.ExplainDecisionResponse(
            decisions=[
                observability_pb2.Decision(
                    engine_id="e0", request_id="r", decided_at=time_of(at), event="pause",
                    action="pin", reason="memory_free", ttl=Duration(seconds=9),
                    costs=[
                        observability_pb2.OptionCost(option="pin", cost_s=1, parts_s={"held": 1})
                    ],
                    inputs={"tool": "bash"},
                )
            ]
        )
    ]  # fmt: skip
    assert client.explain_decision("p", tenant="t", limit=3) == (
        front.Decision(
            "e0", "r", at, "pause", "pin", "memory_free", 9.0,
            (front.OptionCost("pin", 1.0, {"held": 1.0}),), {"tool": "bash"},
        ),
    )  # fmt: skip
    request = server.requests("ExplainDecision")[0]
    assert (request.name, request.tenant, request.limit) == ("p", "t", 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.pin_program("p", float("nan")),
        lambda c: c.pin_program("p", 1e300),
        lambda c: c.announce_tool_call("p", "bash", expected_s=float("inf")),
        lambda c: c.set_ttl_override(TtlScope.of_all(), 1, mode="most"),
        lambda c: c.set_ttl_override(
            TtlScope.of_all(), 1, expires_at=datetime(2030, 1, 1)  # noqa: DTZ001
        ),
        lambda c: c.update_policy(),
        lambda c: c.update_policy(mode="unknown"),
        lambda c: c.list_programs(states=["asleep"]),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused_before_anything_is_sent(
    call: Callable[[KVTierClient], Any], client: KVTierClient, server: ScriptedControl
) -> None:
    with pytest.raises(ValueError, match="accepted is"):
        call(client)
    assert server.asked == []


def test_an_expected_time_is_a_duration_or_quantiles(
    client: KVTierClient, server: ScriptedControl
) -> None:
    client.announce_tool_call("p", "bash", tenant="t", expected_s=1.5, request_id="mine")
    client.announce_tool_call("p", "bash", expected_s=1, expected_p90_s=4)
    client.announce_tool_call("p", "bash", expected_p90_s=4)
    client.announce_tool_call("p", "bash")
    one, both, last, none = server.requests("AnnounceToolCall")
    assert (one.tenant, one.tool, one.request_id) == ("t", "bash", "mine")
    assert one.duration == Duration(seconds=1, nanos=500_000_000)
    assert both.quantiles == program_pb2.DurationQuantiles(
        p50=Duration(seconds=1), p90=Duration(seconds=4)
    )
    assert last.quantiles == program_pb2.DurationQuantiles(p90=Duration(seconds=4))
    assert none.WhichOneof("expected") is None
