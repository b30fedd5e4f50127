"""`kvtier.v1.PolicyService`: what of the engines' settings may change while they run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from pydantic import TypeAdapter, ValidationError

from kvtier import link_messages as link
from kvtier.config import Settings, accepted
from kvtier.control.api import as_proto
from kvtier.control.api.callers import current_caller
from kvtier.control.api.validation import Violations
from kvtier.v1 import policy_pb2, policy_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvtier.control.api.state import ServerState

logger = logging.getLogger(__name__)

MAX_TENANT_BUDGETS: Final = 256
MAX_PATHS: Final = 64
_MAX_BYTE_SECONDS: Final = (1 << 63) - 1

_MODES = {number: name for name, number in as_proto.MODES.items()}
_ADMISSIONS = {number: name for name, number in as_proto.ADMISSIONS.items()}


class PolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """See the module's docstring."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def GetPolicy(  # noqa: N802 - gRPC's names
        self, request: policy_pb2.GetPolicyRequest, context: Any
    ) -> policy_pb2.GetPolicyResponse:
        """See the proto."""
        del context
        current_caller().needs_all("GetPolicy")
        engine_id = _engine_id(request.engine_id)
        return policy_pb2.GetPolicyResponse(policies=self._policies(engine_id))

    async def UpdatePolicy(  # noqa: N802
        self, request: policy_pb2.UpdatePolicyRequest, context: Any
    ) -> policy_pb2.UpdatePolicyResponse:
        """See the proto."""
        del context
        current_caller().needs_all("UpdatePolicy")
        bad = Violations()
        engine_id = bad.name("engine_id", request.engine_id) if request.engine_id else ""
        changes = _changes(request, bad)
        bad.check()
        engines = self._state.engines(engine_id)
        logger.info("policy of %s: %s", engine_id or "all engines", changes)
        command = msgspec.structs.replace(link.PolicyCommand(id=0), **changes)
        answers = await self._state.ask_all([(e.engine_id, command) for e in engines])
        return policy_pb2.UpdatePolicyResponse(
            policies=[
                _engine_policy(engine.engine_id, engine.policy)
                for engine in engines
                if self._state.registry.engine(engine.engine_id) is engine
            ],
            results=[as_proto.command_result(answer) for answer in answers],
        )

    def _policies(self, engine_id: str) -> list[policy_pb2.EnginePolicy]:
        return [_engine_policy(e.engine_id, e.policy) for e in self._state.engines(engine_id)]


def _engine_policy(engine_id: str, state: link.PolicyState) -> policy_pb2.EnginePolicy:
    return policy_pb2.EnginePolicy(engine_id=engine_id, policy=as_proto.policy(state))


def _engine_id(engine_id: str) -> str:
    """An engine's id, or none."""
    if engine_id:
        bad = Violations()
        bad.name("engine_id", engine_id)
        bad.check()
    return engine_id


def _changes(request: policy_pb2.UpdatePolicyRequest, bad: Violations) -> dict[str, Any]:
    """What the mask names, by the names of `PolicyCommand`, checked as at start."""
    paths = list(request.update_mask.paths)
    names = ", ".join(_READERS)
    if not paths:
        bad.add("update_mask", f"is empty; accepted are {names}")
    if len(paths) > MAX_PATHS:
        bad.add("update_mask", f"has {len(paths)} paths; accepted are at most {MAX_PATHS}")
        return {}
    changes = {}
    for index, path in enumerate(paths):
        if path not in _READERS:
            bad.add(f"update_mask.paths[{index}]", f"is {path[:64]!r}; accepted are {names}")
            continue
        setting, read = _READERS[path]
        changes[setting] = read(request.policy, f"policy.{path}", setting, bad)
    return changes


# -- the fields --------------------------------------------------------------------------------------


def _enum(names: Mapping[Any, str], attribute: str) -> Callable[..., Any]:
    def read(policy: policy_pb2.Policy, field: str, setting: str, bad: Violations) -> str | None:
        value = getattr(policy, attribute)
        if value not in names:
            bad.add(field, f"is {value}; accepted is {accepted(setting)}")
        return names.get(value)

    return read


def _plain(attribute: str) -> Callable[..., Any]:
    def read(policy: policy_pb2.Policy, field: str, setting: str, bad: Violations) -> Any:
        return _as_at_start(setting, getattr(policy, attribute), field, bad)

    return read


def _seconds(attribute: str) -> Callable[..., Any]:
    def read(policy: policy_pb2.Policy, field: str, setting: str, bad: Violations) -> Any:
        if not policy.HasField(attribute):  # type: ignore[arg-type]  # one of our own names
            bad.add(field, f"is missing; accepted is {accepted(setting)}")
        return _as_at_start(setting, bad.seconds(field, getattr(policy, attribute)), field, bad)

    return read


def _budgets(
    policy: policy_pb2.Policy, field: str, setting: str, bad: Violations
) -> list[link.TenantBudget]:
    del setting
    found: dict[str | None, link.TenantBudget] = {}
    if len(policy.tenant_budgets) > MAX_TENANT_BUDGETS:
        count = len(policy.tenant_budgets)
        bad.add(field, f"has {count} entries; accepted are at most {MAX_TENANT_BUDGETS}")
        return []
    for index, budget in enumerate(policy.tenant_budgets):
        where = f"{field}[{index}]"
        tenant = bad.tenant(f"{where}.tenant", budget.tenant)
        if tenant in found:
            bad.add(f"{where}.tenant", f"came before: {budget.tenant!r}; accepted is each once")
        if not 0 <= budget.byte_seconds <= _MAX_BYTE_SECONDS:
            bad.add(f"{where}.byte_seconds", f"is {budget.byte_seconds}; accepted is 0 and more")
        period_s = bad.seconds(f"{where}.period", budget.period, above_zero=True)
        found[tenant] = link.TenantBudget(tenant, budget.byte_seconds, period_s)
    return list(found.values())


def _as_at_start(setting: str, value: Any, field: str, bad: Violations) -> Any:
    """Check a value as the setting of this name is checked when an engine starts."""
    try:
        return _ADAPTERS[setting].validate_python(value)
    except ValidationError:
        bad.add(field, f"is {value:g}; accepted is {accepted(setting)}")
        return None


_READERS: Final[Mapping[str, tuple[str, Callable[..., Any]]]] = {
    "mode": ("mode", _enum(_MODES, "mode")),
    "pin_budget_fraction": ("pin_budget_fraction", _plain("pin_budget_fraction")),
    "max_ttl": ("max_ttl_s", _seconds("max_ttl")),
    "admission": ("admission", _enum(_ADMISSIONS, "admission")),
    "aging": ("aging_s", _seconds("aging")),
    "max_defer": ("max_defer_s", _seconds("max_defer")),
    "stage": ("stage", _plain("stage")),
    "tenant_budgets": ("tenant_budgets", _budgets),
}
"""Fields of `Policy`: the name in `PolicyCommand`, and who reads the value."""


def _adapter(setting: str) -> TypeAdapter[Any]:
    field = Settings.model_fields[setting]
    kind: Any = Annotated[field.annotation, field]
    return TypeAdapter(kind)


_ADAPTERS: Final = {
    setting: _adapter(setting)
    for setting, _ in _READERS.values()
    if setting in Settings.model_fields
}
