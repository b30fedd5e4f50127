"""Calls of the `PolicyService`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.field_mask_pb2 import FieldMask

from kvtier.client import decoding
from kvtier.client.calls.call import Call, duration, enum_number, of_service
from kvtier.client.records import Admission, EnginePolicy, Mode, PolicyUpdate, TenantBudget
from kvtier.v1 import policy_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

_policy = of_service("PolicyService")


def get_policy(
    engine_id: str,
) -> Call[policy_pb2.GetPolicyResponse, tuple[EnginePolicy, ...]]:
    """See `KVTierClient.get_policy`."""
    request = policy_pb2.GetPolicyRequest(engine_id=engine_id)
    return _policy("GetPolicy", request, policy_pb2.GetPolicyResponse, decoding.policies)


def update_policy(
    engine_id: str,
    *,
    mode: str | None,
    pin_budget_fraction: float | None,
    max_ttl_s: float | None,
    admission: str | None,
    aging_s: float | None,
    max_defer_s: float | None,
    stage: bool | None,
    tenant_budgets: Iterable[TenantBudget] | None,
) -> Call[policy_pb2.UpdatePolicyResponse, PolicyUpdate]:
    """See `KVTierClient.update_policy`."""
    values: dict[str, Any] = {
        "mode": None if mode is None else enum_number(policy_pb2.Mode, "MODE_", Mode, mode, "mode"),
        "pin_budget_fraction": pin_budget_fraction,
        "max_ttl": None if max_ttl_s is None else duration(max_ttl_s, "max_ttl_s"),
        "admission": None
        if admission is None
        else enum_number(policy_pb2.Admission, "ADMISSION_", Admission, admission, "admission"),
        "aging": None if aging_s is None else duration(aging_s, "aging_s"),
        "max_defer": None if max_defer_s is None else duration(max_defer_s, "max_defer_s"),
        "stage": stage,
        "tenant_budgets": None if tenant_budgets is None else _budgets(tenant_budgets),
    }
    changed = {name: value for name, value in values.items() if value is not None}
    if not changed:
        raise ValueError("update_policy: accepted is at least one setting")
    request = policy_pb2.UpdatePolicyRequest(
        policy=policy_pb2.Policy(**changed),
        update_mask=FieldMask(paths=list(changed)),
        engine_id=engine_id,
    )
    return _policy("UpdatePolicy", request, policy_pb2.UpdatePolicyResponse, decoding.policy_update)


def _budgets(budgets: Iterable[TenantBudget]) -> list[policy_pb2.TenantBudget]:
    return [
        policy_pb2.TenantBudget(
            tenant=budget.tenant,
            byte_seconds=budget.byte_seconds,
            period=duration(budget.period_s, "period_s"),
        )
        for budget in budgets
    ]
