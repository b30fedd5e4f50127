"""What pins cost the tenants that have a budget: the memory of all ranks, for as long as each pin lasts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvtier.costs.pinned_turn import PinnedTurn

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.gpu_pin import Pin
    from kvtier.ttl.tenant_budgets import TenantBudgets
    from kvtier.turns.engine_facts import EngineFacts

ROUNDING = 1e-9
"""Of what is left, a share that makes no difference."""


class PinCharges:
    """Charges `TenantBudgets` for every pin's beginning, changes and end; free where nobody has a budget."""

    def __init__(
        self, facts: EngineFacts, budgets: TenantBudgets, clock: Callable[[], float]
    ) -> None:
        self._budgets = budgets
        self._clock = clock
        self._block_bytes = facts.block_bytes * facts.ranks

    def limit_s(
        self, tenant: str | None, n_blocks: int, now_s: float, mine: Pin | None = None
    ) -> float:
        """For how long the tenant can pay for so many blocks from now on; inf without a limit.

        Args:
            tenant: vLLM's `cache_salt`, bounded.
            n_blocks: All that are to be pinned.
            now_s: Monotonic time.
            mine: A pin that keeps some of them: the rest of its time is paid for, or was free.
        """
        if not self._budgets or not n_blocks:
            return math.inf
        n_bytes = n_blocks * self._block_bytes
        if mine is None:
            return self._budgets.ttl_limit_s(tenant, n_bytes, now_s)
        paid = len(mine.block_ids) * self._block_bytes * max(0.0, mine.deadline_s - now_s)
        return max(0.0, self._budgets.left(tenant, now_s) + paid) / n_bytes

    def affordable_blocks(self, tenant: str | None, seconds: float, now_s: float) -> float:
        """How many blocks the tenant can pay for, for so long; inf without a limit."""
        left = self._budgets.left(tenant, now_s) if self._budgets else math.inf
        if left == math.inf or seconds <= 0:
            return math.inf
        return math.floor(max(0.0, left) * (1 + ROUNDING) / (self._block_bytes * seconds))

    def begins(self, pin: Pin) -> None:
        """A pin begins."""
        self.grows(pin, len(pin.block_ids))

    def grows(self, pin: Pin, n_blocks: int) -> None:
        """So many of a pin's blocks are new."""
        self._charge(pin, n_blocks, pin.deadline_s - self._clock())

    def moves(self, pin: Pin, deadline_s: float) -> None:
        """A pin's deadline is about to change."""
        self._charge(pin, len(pin.block_ids), deadline_s - pin.deadline_s)

    def ends(self, pin: Pin) -> None:
        """A pin has ended: its tenant pays only for the time that it lasted."""
        if self._budgets and isinstance(pin.data, PinnedTurn):
            now_s = self._clock()
            unused = len(pin.block_ids) * self._block_bytes * (pin.deadline_s - now_s)
            self._budgets.ended(pin.data.tenant, pin.key, unused, now_s)

    def _charge(self, pin: Pin, n_blocks: int, seconds: float) -> None:
        if self._budgets and isinstance(pin.data, PinnedTurn):
            n_bytes = n_blocks * self._block_bytes
            self._budgets.charge(pin.data.tenant, pin.key, n_bytes * seconds, self._clock())
