"""The server's picture in the words of the API."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from google.protobuf import duration_pb2, timestamp_pb2

from kvtier.v1 import observability_pb2, outcome_pb2, policy_pb2, program_pb2, ttl_pb2

if TYPE_CHECKING:
    from kvtier import link_messages as link
    from kvtier.control.program_picture import ProgramPicture
    from kvtier.control.registry import EngineRecord

_FIRST_S, _LAST_S = -62_135_596_800.0, 253_402_300_799.0
_MAX_INT64: Final = (1 << 63) - 1
_NANOS: Final = 1_000_000_000

OUTCOMES: Final = {
    "accepted": outcome_pb2.OUTCOME_ACCEPTED,
    "clipped": outcome_pb2.OUTCOME_CLIPPED,
    "deferred": outcome_pb2.OUTCOME_DEFERRED,
    "rejected": outcome_pb2.OUTCOME_REJECTED,
    "missing": outcome_pb2.OUTCOME_MISSING,
}
STATES: Final = {
    "waiting": program_pb2.PROGRAM_STATE_WAITING,
    "running": program_pb2.PROGRAM_STATE_RUNNING,
    "paused": program_pb2.PROGRAM_STATE_PAUSED,
}
MODES: Final = {
    "on": policy_pb2.MODE_ON,
    "shadow": policy_pb2.MODE_SHADOW,
    "off": policy_pb2.MODE_OFF,
}
ADMISSIONS: Final = {
    "off": policy_pb2.ADMISSION_OFF,
    "program_fcfs": policy_pb2.ADMISSION_PROGRAM_FCFS,
    "working_set": policy_pb2.ADMISSION_WORKING_SET,
}
TTL_MODES: Final = {
    "fixed": ttl_pb2.TTL_MODE_FIXED,
    "cap": ttl_pb2.TTL_MODE_CAP,
    "floor": ttl_pb2.TTL_MODE_FLOOR,
}


def timestamp(unix_s: float) -> timestamp_pb2.Timestamp:
    """A Unix time; what is outside of the years 1 to 9999, or no number, becomes the nearest of them."""
    seconds = 0.0 if math.isnan(unix_s) else min(max(unix_s, _FIRST_S), _LAST_S)
    whole = math.floor(seconds)
    return timestamp_pb2.Timestamp(
        seconds=whole, nanos=min(int((seconds - whole) * _NANOS), _NANOS - 1)
    )


def duration(duration_s: float) -> duration_pb2.Duration:
    """Seconds; never negative."""
    seconds = 0.0 if math.isnan(duration_s) else min(max(duration_s, 0.0), _LAST_S)
    whole = math.floor(seconds)
    return duration_pb2.Duration(
        seconds=whole, nanos=min(round((seconds - whole) * _NANOS), _NANOS - 1)
    )


def count(value: int) -> int:
    """A number that fits into 64 bits."""
    return max(-_MAX_INT64, min(value, _MAX_INT64))


def program(engine: EngineRecord, picture: ProgramPicture, now_s: float) -> program_pb2.Program:
    """One program in one engine."""
    message = program_pb2.Program(
        name=picture.key.name,
        tenant=picture.key.tenant or "",
        named=picture.key.named,
        state=STATES[picture.activity],
        engine_id=engine.engine_id,
        turns=count(picture.turns),
        context_tokens=count(picture.context_tokens),
        gpu_pinned_tokens=count(picture.pinned_tokens),
        cpu_tokens=count(picture.cpu_tokens),
        tool=picture.tool or "",
        started_at=timestamp(picture.started_s),
        last_active_at=timestamp(picture.last_active_s),
    )
    if picture.predicted_return_s is not None:
        message.predicted_return_at.CopyFrom(timestamp(picture.predicted_return_s))
    if (left_s := picture.ttl_left_s(now_s)) is not None:
        message.ttl_left.CopyFrom(duration(left_s))
    return message


def command_result(answer: link.Answer) -> outcome_pb2.CommandResult:
    """One engine's answer."""
    return outcome_pb2.CommandResult(
        outcome=OUTCOMES[answer.outcome],
        reason=answer.reason,
        detail=answer.detail,
        engine_id=answer.engine_id,
    )


def decision(engine_id: str, decided: link.Decided) -> observability_pb2.Decision:
    """One decision with what it went by."""
    message = observability_pb2.Decision(
        engine_id=engine_id,
        request_id=decided.request_id,
        decided_at=timestamp(decided.at_s),
        event=decided.event,
        action=decided.action,
        reason=decided.reason,
        costs=[
            observability_pb2.OptionCost(option=c.option, cost_s=c.cost_s, parts_s=c.parts_s)
            for c in decided.costs
        ],
        inputs={name: text(value) for name, value in decided.inputs.items()},
    )
    if decided.ttl_s > 0:
        message.ttl.CopyFrom(duration(decided.ttl_s))
    return message


def text(value: str | float | bool | None) -> str:
    """A value for people and scripts: `true`, `false`, `none`, numbers in at most 6 digits."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:.6g}"
        case _:
            return str(value)


def engine_status(
    engine: EngineRecord, *, wakeable: bool, with_programs: bool
) -> observability_pb2.EngineStatus:
    """An engine with the figures that it reported last; those of all tenants' programs where asked for."""
    hello, gauges = engine.hello, engine.gauges
    block_bytes = hello.block_bytes
    message = observability_pb2.EngineStatus(
        engine_id=hello.engine_id,
        model=hello.model,
        pid=count(hello.pid),
        mode=engine.policy.mode if gauges is None else gauges.mode,
        started_at=timestamp(hello.started_s),
        wakeable=wakeable,
        gpu=observability_pb2.GpuTier(total_bytes=count(hello.total_blocks * block_bytes)),
        versions=hello.versions,
    )
    if gauges is None:
        return message
    message.reported_at.CopyFrom(timestamp(engine.gauges_s))
    message.gpu.free_bytes = count(gauges.free_blocks * block_bytes)
    message.gpu.budget_bytes = count(gauges.budget_blocks * block_bytes)
    message.cpu.state = gauges.tier_state
    message.cpu.total_bytes = count(gauges.tier_bytes)
    if gauges.tier_used_bytes is not None:
        message.cpu.used_bytes = count(gauges.tier_used_bytes)
    message.link.to_cpu_bytes_per_s = gauges.to_cpu_bytes_per_s
    message.link.to_gpu_bytes_per_s = gauges.to_gpu_bytes_per_s
    if gauges.calibrated_s is not None:
        message.link.calibrated_at.CopyFrom(timestamp(gauges.calibrated_s))
    message.queue.running_requests = count(gauges.running_requests)
    message.queue.waiting_requests = count(gauges.waiting_requests)
    message.queue.waiting_tokens = count(gauges.waiting_tokens)
    message.queue.delay.CopyFrom(duration(gauges.queue_delay_s))
    if with_programs:
        message.gpu.pinned_bytes = count(gauges.pinned_blocks * block_bytes)
        message.gpu.programs = count(gauges.programs)
        message.cpu.staging_programs = count(gauges.staging_programs)
        message.cpu.loading_requests = count(gauges.loading_requests)
    return message


def policy(state: link.PolicyState) -> policy_pb2.Policy:
    """The settings of an engine that may change."""
    return policy_pb2.Policy(
        mode=MODES[state.mode],
        pin_budget_fraction=state.pin_budget_fraction,
        max_ttl=duration(state.max_ttl_s),
        admission=ADMISSIONS[state.admission],
        aging=duration(state.aging_s),
        max_defer=duration(state.max_defer_s),
        stage=state.stage,
        tenant_budgets=[
            policy_pb2.TenantBudget(
                tenant=budget.tenant or "",
                byte_seconds=count(budget.byte_seconds),
                period=duration(budget.period_s),
            )
            for budget in state.tenant_budgets
        ],
    )


def ttl_override(override: link.TtlOverride) -> ttl_pb2.TtlOverride:
    """A TTL override."""
    message = ttl_pb2.TtlOverride(
        mode=TTL_MODES[override.mode], ttl=duration(override.ttl_s), scope=ttl_scope(override)
    )
    if override.expires_s is not None:
        message.expires_at.CopyFrom(timestamp(override.expires_s))
    return message


def ttl_scope(override: link.TtlOverride) -> ttl_pb2.TtlScope:
    """What an override is for."""
    if override.program is not None:
        key = override.program
        scope = ttl_pb2.ProgramScope(name=key.name, tenant=key.tenant or "")
        return ttl_pb2.TtlScope(program=scope)
    if override.tool is not None:
        return ttl_pb2.TtlScope(tool=override.tool)
    if override.tenant is not None:
        return ttl_pb2.TtlScope(tenant=override.tenant)
    return ttl_pb2.TtlScope(all=True)
