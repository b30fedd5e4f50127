"""Messages of the control API to the records that the client returns."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, Any, TypeVar

from kvtier.client.records import (
    Admission,
    AppliedOverride,
    CommandResult,
    CpuTier,
    Decision,
    DeletedOverride,
    EnginePolicy,
    EngineStatus,
    Event,
    GpuTier,
    Link,
    Lost,
    Mode,
    OptionCost,
    Outcome,
    Policy,
    PolicyUpdate,
    Program,
    ProgramPage,
    ProgramState,
    Queue,
    Status,
    TenantBudget,
    TtlMode,
    TtlOverride,
    TtlOverridePage,
    TtlScope,
)
from kvtier.v1 import outcome_pb2, policy_pb2, program_pb2, ttl_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime
    from enum import StrEnum

    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

    from kvtier.v1 import observability_pb2

    EnumT = TypeVar("EnumT", bound=StrEnum)
    ValueT = TypeVar("ValueT")

# -- values ----------------------------------------------------------------------------------------


def _enum(kind: type[EnumT], wrapper: Any, prefix: str, number: int) -> EnumT:
    """A proto enum's value by name; UNKNOWN for one that this client does not know."""
    try:
        return kind(wrapper.Name(number).removeprefix(prefix).lower())
    except ValueError:
        return kind("unknown")


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _seconds_if_set(message: Any, field: str) -> float | None:
    return _seconds(getattr(message, field)) if message.HasField(field) else None


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)


def _time_if_set(message: Any, field: str) -> datetime | None:
    return _time(getattr(message, field)) if message.HasField(field) else None


def _map(fields: Mapping[str, ValueT]) -> dict[str, ValueT]:
    """A proto map, whose order is by chance, in the order of its keys."""
    return dict(sorted(fields.items()))


# -- answers ---------------------------------------------------------------------------------------


def results(message: Any) -> tuple[CommandResult, ...]:
    """The engines' answers in any response that has `results`."""
    return tuple(_result(result) for result in message.results)


def _result(result: outcome_pb2.CommandResult) -> CommandResult:
    return CommandResult(
        outcome=_enum(Outcome, outcome_pb2.Outcome, "OUTCOME_", result.outcome),
        reason=result.reason,
        detail=result.detail,
        engine_id=result.engine_id,
    )


def program_page(message: program_pb2.ListProgramsResponse) -> ProgramPage:
    """A page of programs."""
    return ProgramPage(
        _programs(message.programs), message.next_page_token, int(message.total_size)
    )


def programs(message: program_pb2.GetProgramResponse) -> tuple[Program, ...]:
    """One program as each engine knows it."""
    return _programs(message.programs)


def _programs(messages: Iterable[program_pb2.Program]) -> tuple[Program, ...]:
    return tuple(
        Program(
            name=program.name,
            tenant=program.tenant,
            named=program.named,
            state=_enum(
                ProgramState, program_pb2.ProgramState, "PROGRAM_STATE_", int(program.state)
            ),
            engine_id=program.engine_id,
            turns=program.turns,
            context_tokens=program.context_tokens,
            gpu_pinned_tokens=program.gpu_pinned_tokens,
            cpu_tokens=program.cpu_tokens,
            tool=program.tool or None,
            started_at=_time_if_set(program, "started_at"),
            last_active_at=_time_if_set(program, "last_active_at"),
            predicted_return_at=_time_if_set(program, "predicted_return_at"),
            ttl_left_s=_seconds_if_set(program, "ttl_left"),
        )
        for program in messages
    )


def override_page(message: ttl_pb2.ListTtlOverridesResponse) -> TtlOverridePage:
    """A page of overrides."""
    return TtlOverridePage(
        tuple(_override(override) for override in message.overrides), message.next_page_token
    )


def applied_override(message: ttl_pb2.SetTtlOverrideResponse) -> AppliedOverride:
    """What was set."""
    return AppliedOverride(_override(message.override), message.engines, message.saved)


def deleted_override(message: ttl_pb2.DeleteTtlOverrideResponse) -> DeletedOverride:
    """What was deleted."""
    return DeletedOverride(message.engines, message.saved)


def _override(override: ttl_pb2.TtlOverride) -> TtlOverride:
    return TtlOverride(
        scope=_scope(override.scope),
        mode=_enum(TtlMode, ttl_pb2.TtlMode, "TTL_MODE_", int(override.mode)),
        ttl_s=_seconds(override.ttl),
        expires_at=_time_if_set(override, "expires_at"),
    )


def _scope(scope: ttl_pb2.TtlScope) -> TtlScope:
    match scope.WhichOneof("scope"):
        case "program":
            return TtlScope.of_program(scope.program.name, scope.program.tenant)
        case "tool":
            return TtlScope.of_tool(scope.tool)
        case "tenant":
            return TtlScope.of_tenant(scope.tenant)
        case _:
            return TtlScope.of_all()


def policies(message: Any) -> tuple[EnginePolicy, ...]:
    """The engines' policies in any response that has `policies`."""
    return tuple(EnginePolicy(entry.engine_id, _policy(entry.policy)) for entry in message.policies)


def policy_update(message: policy_pb2.UpdatePolicyResponse) -> PolicyUpdate:
    """The policies after an update."""
    return PolicyUpdate(policies(message), results(message))


def _policy(policy: policy_pb2.Policy) -> Policy:
    return Policy(
        mode=_enum(Mode, policy_pb2.Mode, "MODE_", int(policy.mode)),
        pin_budget_fraction=policy.pin_budget_fraction,
        max_ttl_s=_seconds(policy.max_ttl),
        admission=_enum(Admission, policy_pb2.Admission, "ADMISSION_", int(policy.admission)),
        aging_s=_seconds(policy.aging),
        max_defer_s=_seconds(policy.max_defer),
        stage=policy.stage,
        tenant_budgets=tuple(
            TenantBudget(budget.tenant, budget.byte_seconds, _seconds(budget.period))
            for budget in policy.tenant_budgets
        ),
    )


def status(message: observability_pb2.GetStatusResponse) -> Status:
    """The state of server and engines."""
    return Status(
        version=message.version,
        engines=tuple(_engine(engine) for engine in message.engines),
        started_at=_time_if_set(message, "started_at"),
        watchers=message.watchers,
    )


def _engine(engine: observability_pb2.EngineStatus) -> EngineStatus:
    gpu, cpu, link, queue = engine.gpu, engine.cpu, engine.link, engine.queue
    return EngineStatus(
        engine_id=engine.engine_id,
        model=engine.model,
        pid=engine.pid,
        mode=engine.mode,
        started_at=_time_if_set(engine, "started_at"),
        reported_at=_time_if_set(engine, "reported_at"),
        wakeable=engine.wakeable,
        gpu=GpuTier(
            gpu.total_bytes, gpu.free_bytes, gpu.pinned_bytes, gpu.budget_bytes, gpu.programs
        ),
        cpu=CpuTier(
            cpu.state,
            cpu.total_bytes,
            cpu.staging_programs,
            cpu.loading_requests,
            cpu.used_bytes if cpu.HasField("used_bytes") else None,
        ),
        link=Link(
            link.to_cpu_bytes_per_s,
            link.to_gpu_bytes_per_s,
            _time_if_set(link, "calibrated_at"),
        ),
        queue=Queue(
            queue.running_requests,
            queue.waiting_requests,
            queue.waiting_tokens,
            _seconds(queue.delay),
        ),
        versions=_map(engine.versions),
    )


def decisions(message: observability_pb2.ExplainDecisionResponse) -> tuple[Decision, ...]:
    """Decisions, newest first."""
    return tuple(_decision(decision) for decision in message.decisions)


def _decision(decision: observability_pb2.Decision) -> Decision:
    return Decision(
        engine_id=decision.engine_id,
        request_id=decision.request_id,
        decided_at=_time_if_set(decision, "decided_at"),
        event=decision.event,
        action=decision.action,
        reason=decision.reason,
        ttl_s=_seconds_if_set(decision, "ttl"),
        costs=tuple(
            OptionCost(cost.option, cost.cost_s, _map(cost.parts_s)) for cost in decision.costs
        ),
        inputs=_map(decision.inputs),
    )


def watched(message: observability_pb2.WatchEventsResponse) -> Event | Lost | None:
    """An event, or how many were lost; None for what a newer server may send besides."""
    match message.WhichOneof("item"):
        case "lost":
            return Lost(message.lost)
        case "event":
            event = message.event
            return Event(
                kind=event.kind,
                engine_id=event.engine_id,
                happened_at=_time_if_set(event, "happened_at"),
                name=event.name,
                tenant=event.tenant,
                request_id=event.request_id,
                decision=_decision(event.decision) if event.HasField("decision") else None,
                fields=_map(event.fields),
            )
        case _:
            return None
