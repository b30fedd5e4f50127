"""Chooses how long pins live and which are released first, and learns what that depends on.

The rule is :func:`kvtier.ttl.holding.optimal_ttl`; this module feeds it with learned gaps, overrides
and tenant budgets. Baselines (the Continuum paper's rule, a constant TTL) are not here.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, replace

from kvtier.ttl.gaps import GapBook, SurvivalCurve
from kvtier.ttl.holding import HoldReason, TtlBound, TtlChoice, optimal_ttl
from kvtier.ttl.overrides import OverrideTable, Scope, TenantBudgets, TtlOverride

__all__ = [
    "HeldPin",
    "OutputReuse",
    "OverrideTable",
    "Scope",
    "TenantBudgets",
    "TtlChoice",
    "TtlController",
    "TtlOverride",
    "regret_per_block_s",
    "release_order_key",
]


@dataclass(frozen=True, slots=True)
class HeldPin:
    """A pin whose TTL is to be chosen, new or held for a while.

    Attributes:
        program: program id, None if unknown.
        tool: tool called, None if the turn ended without a call.
        tenant: whose budget counts.
        waited_s: seconds since the turn ended.
        n_blocks: blocks held.
        miss_cost_s: B, seconds, with the copies that exist (a reload if the tier holds it;
            :class:`~kvtier.cost_model.PauseTerms`).
        price_s_per_block_s: price of memory
            (:func:`~kvtier.ttl.holding.memory_price_s_per_block_s`).
    """

    program: str | None
    tool: str | None
    tenant: str
    waited_s: float
    n_blocks: int
    miss_cost_s: float
    price_s_per_block_s: float


class TtlController:
    """Gap statistics, overrides and tenant budgets behind one TTL decision."""

    def __init__(
        self,
        *,
        gaps: GapBook | None = None,
        overrides: OverrideTable | None = None,
        budgets: TenantBudgets | None = None,
        max_ttl_s: float = 300.0,
    ) -> None:
        """Use the given parts, or empty ones without tenant limits.

        Raises:
            ValueError: ``max_ttl_s`` is negative or not finite.
        """
        if not (math.isfinite(max_ttl_s) and max_ttl_s >= 0.0):
            msg = f"max_ttl_s must be finite and >= 0, not {max_ttl_s}"
            raise ValueError(msg)
        self.gaps = GapBook() if gaps is None else gaps
        self.overrides = OverrideTable() if overrides is None else overrides
        self.budgets = TenantBudgets() if budgets is None else budgets
        self.max_ttl_s = max_ttl_s

    def bound(
        self, now_s: float, *, program: str | None, tool: str | None, tenant: str | None
    ) -> TtlBound | None:
        """Return the override for a pause, for :attr:`kvtier.cost_model.PauseState.ttl_bound`."""
        return self.overrides.resolve(now_s, program=program, tool=tool, tenant=tenant)

    def max_ttl_for(self, now_s: float, *, tenant: str, n_blocks: int) -> float:
        """Return the longest TTL that the tenant's budget allows for ``n_blocks``, seconds.

        For :attr:`kvtier.cost_model.PauseState.max_ttl_s`.
        """
        left = self.budgets.left_block_s(tenant, now_s)
        return min(self.max_ttl_s, max(left, 0.0) / n_blocks) if n_blocks > 0 else self.max_ttl_s

    def choose_ttl(self, now_s: float, held: HeldPin) -> TtlChoice:
        """Choose a TTL from now on; for a new pin, or for one that has been held for a while.

        Maximises ``integral_0^tau [f(t | waited) * B - S(t | waited) * price * blocks] dt``; see
        :func:`~kvtier.ttl.holding.optimal_ttl`. Overrides and ``max_ttl_s`` count from the start of the
        pause: the time waited is taken off. The tenant's budget then shortens the TTL, but not
        below a ``fixed`` or ``floor`` override, which overdraws it.

        Args:
            now_s: the engine's clock, for overrides and budgets.
            held: the pin.
        """
        bound = self.bound(now_s, program=held.program, tool=held.tool, tenant=held.tenant)
        budget_s = self.max_ttl_for(now_s, tenant=held.tenant, n_blocks=held.n_blocks)
        if bound is not None:
            bound = TtlBound(bound.mode, max(bound.ttl_s - held.waited_s, 0.0))
            if bound.mode != "cap":
                budget_s = max(budget_s, bound.ttl_s)
        survival = self.gaps.curve(held.tool).residual(held.waited_s)
        limit_s = max(self.max_ttl_s - held.waited_s, 0.0)
        price = held.price_s_per_block_s * held.n_blocks
        choice = optimal_ttl(survival, held.miss_cost_s, price, limit_s, bound)
        if choice.ttl_s <= budget_s:
            return choice
        # V is not unimodal: the best TTL within the budget may be shorter than the budget.
        choice = optimal_ttl(survival, held.miss_cost_s, price, budget_s, bound)
        return replace(choice, reason=HoldReason.TENANT_BUDGET)


def regret_per_block_s(
    survival: SurvivalCurve,
    *,
    waited_s: float,
    horizon_s: float,
    miss_cost_s: float,
    n_blocks: int,
) -> float:
    """Return the expected regret of releasing a pin now, seconds per block given back.

    ``P(return within horizon | waited) * B / blocks``. A staged pin has a small B (a reload) and a
    long-overdue one a small probability: both go first.

    Args:
        survival: gaps of such pauses, not yet conditioned on the wait.
        waited_s: seconds since the turn ended.
        horizon_s: how far ahead a return counts: the pin's remaining TTL, or less.
        miss_cost_s: B with the copies that exist now, seconds.
        n_blocks: blocks that the release frees; without any the regret is infinite.
    """
    if n_blocks <= 0:
        return math.inf
    away = survival.survival(waited_s)
    if away <= 0.0:
        probability = 1.0 - survival.residual(waited_s).survival(horizon_s)
    else:
        probability = 1.0 - survival.survival(waited_s + horizon_s) / away
    return probability * miss_cost_s / n_blocks


def release_order_key(
    regret_s_per_block: float, *, deadline_s: float, program_arrival_s: float, key: str
) -> tuple[float, float, float, str]:
    """Return a sort key: cheapest regret first, then nearest deadline, then the youngest program.

    The name makes the order total, so that every rank of an engine releases the same pins.
    """
    return (regret_s_per_block, deadline_s, -program_arrival_s, key)


class OutputReuse:
    """How often the output part of a kept turn is really hit, per model.

    The next prompt contains the output as rendered by the client's template; a stripped thought or
    another JSON spacing changes the tokens and loses all of it. The estimate is the mean of a Beta
    posterior whose evidence decays, so that it follows a changed client; it starts at 0.75 from a
    Beta(1.5, 0.5) prior that does not decay: one hit or miss never settles it.
    """

    def __init__(self, *, decay: float = 0.98, max_models: int = 64) -> None:
        """Remember ``max_models`` models with an effective window of 1 / (1 - decay) turns.

        Raises:
            ValueError: ``decay`` is not within (0, 1).
        """
        if not 0.0 < decay < 1.0:
            msg = f"decay must be within (0, 1), not {decay}"
            raise ValueError(msg)
        self._decay = decay
        self._max_models = max_models
        self._evidence: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def observe(self, model: str, hit_tokens: int, output_tokens: int) -> None:
        """Add a return: ``hit_tokens`` of the ``output_tokens`` reusable output tokens were hit.

        Only returns whose GPU or tier copy still existed tell anything; leave out the others.
        Turns without a reusable output token are ignored.
        """
        if output_tokens <= 0:
            return
        share = min(max(hit_tokens / output_tokens, 0.0), 1.0)
        hits, misses = self._evidence.get(model, (0.0, 0.0))
        self._evidence[model] = (
            self._decay * hits + share,
            self._decay * misses + 1.0 - share,
        )
        self._evidence.move_to_end(model)
        if len(self._evidence) > self._max_models:
            self._evidence.popitem(last=False)

    def probability(self, model: str) -> float:
        """Return the probability that a kept output token is hit, for a model never seen 0.75."""
        hits, misses = self._evidence.get(model, (0.0, 0.0))
        return (hits + 1.5) / (hits + misses + 2.0)
