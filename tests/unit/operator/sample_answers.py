"""Answers of a control server with one engine and two programs, for tests of the commands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration

from kvtier.v1 import observability_pb2, outcome_pb2, policy_pb2, program_pb2, ttl_pb2
from tests.unit.scripted_control import time_of

GIB = 1 << 30


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def engine() -> observability_pb2.EngineStatus:
    return observability_pb2.EngineStatus(
        engine_id="e0", model="small-model", pid=4711, mode="on", started_at=time_of(ago(7200)),
        reported_at=time_of(ago(0.5)), wakeable=True,
        gpu=observability_pb2.GpuTier(
            total_bytes=8 * GIB, free_bytes=2 * GIB, pinned_bytes=3 * GIB, budget_bytes=4 * GIB,
            programs=2,
        ),
        cpu=observability_pb2.CpuTier(
            state="ready", total_bytes=64 * GIB, staging_programs=1, loading_requests=2, used_bytes=16 * GIB
        ),
        link=observability_pb2.Link(
            to_cpu_bytes_per_s=12.5e9, to_gpu_bytes_per_s=25e9, calibrated_at=time_of(ago(86400))
        ),
        queue=observability_pb2.Queue(
            running_requests=5, waiting_requests=6, waiting_tokens=12_345,
            delay=Duration(seconds=1, nanos=500_000_000),
        ),
        versions={"vllm": "0.32.0", "kvtier": "0.1.0"},
    )  # fmt: skip


def status() -> observability_pb2.GetStatusResponse:
    return observability_pb2.GetStatusResponse(
        version="0.1.0", engines=[engine()], started_at=time_of(ago(3600)), watchers=2
    )


def paused(name: str = "my-agent") -> program_pb2.Program:
    return program_pb2.Program(
        name=name, tenant="acme", named=True, state=program_pb2.PROGRAM_STATE_PAUSED,
        engine_id="e0", turns=7, context_tokens=20_480, gpu_pinned_tokens=20_000, cpu_tokens=16_384,
        tool="bash", started_at=time_of(ago(600)), last_active_at=time_of(ago(12)),
        predicted_return_at=time_of(ago(-30)), ttl_left=Duration(seconds=48),
    )  # fmt: skip


def running(name: str = "other") -> program_pb2.Program:
    return program_pb2.Program(
        name=name, state=program_pb2.PROGRAM_STATE_RUNNING, engine_id="e0", turns=1,
        context_tokens=512, last_active_at=time_of(ago(1)),
    )  # fmt: skip


def programs() -> program_pb2.ListProgramsResponse:
    return program_pb2.ListProgramsResponse(programs=[running(), paused()], total_size=2)


def pause_decision() -> observability_pb2.Decision:
    cost = observability_pb2.OptionCost
    return observability_pb2.Decision(
        engine_id="e0", request_id="chatcmpl-1", decided_at=time_of(ago(12)), event="pause",
        action="pin", reason="return_expected", ttl=Duration(seconds=60),
        costs=[
            cost(option="drop", cost_s=2.5),
            cost(option="pin", cost_s=0.25, parts_s={"held": 0.2, "miss": 0.05}),
            cost(option="pin_and_stage", cost_s=0.125),
        ],
        inputs={"tool": "bash", "context_tokens": "20480"},
    )  # fmt: skip


def return_decision() -> observability_pb2.Decision:
    return observability_pb2.Decision(
        engine_id="e0", request_id="chatcmpl-0", decided_at=time_of(ago(40)), event="return",
        action="gpu", reason="gpu_hit",
        costs=[observability_pb2.OptionCost(option="gpu", cost_s=0.01)],
    )  # fmt: skip


def decisions() -> observability_pb2.ExplainDecisionResponse:
    return observability_pb2.ExplainDecisionResponse(
        decisions=[pause_decision(), return_decision()]
    )


def decided_event() -> observability_pb2.WatchEventsResponse:
    event = observability_pb2.Event(
        kind="decision", engine_id="e0", happened_at=time_of(ago(0)), name="my-agent",
        tenant="acme", request_id="chatcmpl-1", decision=pause_decision(),
    )  # fmt: skip
    return observability_pb2.WatchEventsResponse(event=event)


def staged_event() -> observability_pb2.WatchEventsResponse:
    event = observability_pb2.Event(
        kind="staged", engine_id="e0", happened_at=time_of(ago(0)), name="my-agent",
        fields={"tokens": "16384"},
    )  # fmt: skip
    return observability_pb2.WatchEventsResponse(event=event)


def lost(events: int) -> observability_pb2.WatchEventsResponse:
    return observability_pb2.WatchEventsResponse(lost=events)


def policy(**changes: object) -> policy_pb2.EnginePolicy:
    fields: dict[str, object] = {
        "mode": policy_pb2.MODE_ON, "pin_budget_fraction": 0.5, "max_ttl": Duration(seconds=600),
        "admission": policy_pb2.ADMISSION_WORKING_SET, "aging": Duration(seconds=600),
        "max_defer": Duration(seconds=3600), "stage": True,
        "tenant_budgets": [
            {"tenant": "acme", "byte_seconds": 480 * GIB, "period": Duration(seconds=600)}
        ],
    }  # fmt: skip
    return policy_pb2.EnginePolicy(engine_id="e0", policy=policy_pb2.Policy(**(fields | changes)))  # type: ignore[arg-type]


def override(**scope: object) -> ttl_pb2.TtlOverride:
    return ttl_pb2.TtlOverride(
        scope=ttl_pb2.TtlScope(**scope),  # type: ignore[arg-type]
        mode=ttl_pb2.TTL_MODE_CAP,
        ttl=Duration(seconds=60),
        expires_at=time_of(ago(-3600)),
    )


def result(
    outcome: str = "ACCEPTED", reason: str = "pinned", detail: str = "pinned for 10m"
) -> outcome_pb2.CommandResult:
    return outcome_pb2.CommandResult(
        outcome=outcome_pb2.Outcome.Value(f"OUTCOME_{outcome}"),
        reason=reason,
        detail=detail,
        engine_id="e0",
    )
