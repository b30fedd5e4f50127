"""The settings that may change while the engine runs: read, and changed by an operator's command."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvtier.gpu_pin import ReleaseCause
from kvtier.link_messages import PolicyCommand, PolicyState
from kvtier.link_messages import TenantBudget as WireBudget
from kvtier.programs import bounded_name
from kvtier.ttl.tenant_budgets import TenantBudget
from kvtier.turns.live_mode import LiveMode, Mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.admission import AdmissionController
    from kvtier.gpu_pin import Pin, PinTable
    from kvtier.link_messages import Outcome
    from kvtier.policy import Policy
    from kvtier.turns.endings import Endings


class LivePolicy:
    """See the module's docstring. A change is made as a whole or not at all."""

    def __init__(
        self,
        mode: LiveMode,
        policy: Policy,
        admission: AdmissionController[str],
        pins: PinTable,
        endings: Endings,
        *,
        total_blocks: int,
        regret: Callable[[Pin], float],
    ) -> None:
        self._mode = mode
        self._policy = policy
        self._admission = admission
        self._pins = pins
        self._endings = endings
        self._total_blocks = total_blocks
        self._regret = regret
        self._budget_fraction = policy.facts.pin_budget_fraction

    def state(self) -> PolicyState:
        """What holds now."""
        admission, policy = self._admission.config, self._policy.config
        return PolicyState(
            mode=self._mode.mode.value,
            pin_budget_fraction=self._budget_fraction,
            max_ttl_s=policy.max_ttl_s,
            admission=admission.mode,
            aging_s=admission.aging_s,
            max_defer_s=admission.max_defer_s,
            stage=policy.stage,
            tenant_budgets=[
                WireBudget(budget.tenant, int(budget.byte_seconds), budget.period_s)
                for budget in self._policy.ttl.budgets.all()
            ],
        )

    def change(self, command: PolicyCommand) -> tuple[Outcome, str, str]:
        """Change what is not None; outcome, reason and detail."""
        try:
            admission = replace(
                self._admission.config,
                **_given(
                    mode=command.admission,
                    aging_s=command.aging_s,
                    max_defer_s=command.max_defer_s,
                ),
            )
            policy = replace(
                self._policy.config, **_given(max_ttl_s=command.max_ttl_s, stage=command.stage)
            )
            budgets = [
                TenantBudget(
                    bounded_name(budget.tenant) if budget.tenant else None,
                    budget.byte_seconds,
                    budget.period_s,
                )
                for budget in command.tenant_budgets or ()
            ]
            fraction = command.pin_budget_fraction
            _check(fraction, command.max_ttl_s, policy.fixed_ttl_s)
        except ValueError as error:
            return "rejected", "out_of_range", str(error)
        mode = self._mode.mode if command.mode is None else Mode(command.mode)
        if command.mode is not None and not self._mode.can_set(mode):
            return "rejected", "switch_file", "the switch file sets the mode; nothing is changed"
        yielding = self._to_end(fraction)
        # From here on nothing can fail.
        self._admission.config = admission
        self._policy.config = policy
        if command.tenant_budgets is not None:
            self._policy.ttl.budgets.replace(budgets)
        if fraction is not None:
            self._budget_fraction = fraction
            self._pins.budget_blocks = self._blocks(fraction)
        if command.mode is not None:
            self._mode.set(mode)
        for pin in yielding:
            if self._pins.pinned_blocks <= self._pins.budget_blocks:
                break
            self._endings.unpin(pin.key, ReleaseCause.BUDGET)
        return "accepted", "changed", ""

    def _to_end(self, fraction: float | None) -> list[Pin]:
        """Pins in the order in which they end, those of least regret first, until the rest fits the share."""
        if fraction is None or self._pins.pinned_blocks <= self._blocks(fraction):
            return []
        return list(self._pins.in_release_order(self._regret))

    def _blocks(self, fraction: float) -> int:
        return int(fraction * self._total_blocks)


def _given(**values: object) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check(fraction: float | None, max_ttl_s: float | None, fixed_ttl_s: float | None) -> None:
    if fraction is not None and not 0.0 <= fraction <= 1.0:
        raise ValueError(f"pin_budget_fraction must be within 0 and 1, not {fraction:g}")
    if max_ttl_s is not None and not 0.0 <= max_ttl_s < float("inf"):
        raise ValueError(f"max_ttl_s must be finite and at least 0, not {max_ttl_s:g}")
    # As at start.
    if max_ttl_s is not None and fixed_ttl_s is not None and max_ttl_s < fixed_ttl_s:
        raise ValueError(
            f"max_ttl_s must be at least ttl_fixed_s={fixed_ttl_s:g}, not {max_ttl_s:g}"
        )
