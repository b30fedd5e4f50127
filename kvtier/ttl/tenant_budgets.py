"""Budgets of tenants: how much pinned GPU memory each may use, in bytes times seconds.

A token bucket a tenant: it holds at most one period's byte-seconds, starts full and refills evenly. A pin
is charged for all that it can use, its bytes times its TTL, and what it did not use is given back when it
ends: so a tenant never uses more than it has, whatever its programs do. Never more is given back than was
charged, as pins may be older than the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable


SHORTEST_PIN_S: Final = 0.1
"""What is left for less than this is not worth a pin."""


@dataclass(frozen=True, slots=True)
class TenantBudget:
    """What a tenant may use.

    Attributes:
        tenant: vLLM's `cache_salt`; None: requests without one.
        byte_seconds: Bytes of pinned GPU memory times seconds, in each period.
        period_s: In which `byte_seconds` are refilled.

    Raises:
        ValueError: a number is not finite, `byte_seconds` is negative, or `period_s` is not positive.
    """

    tenant: str | None
    byte_seconds: float
    period_s: float

    def __post_init__(self) -> None:
        """Check the numbers, which come from clients."""
        if not (math.isfinite(self.byte_seconds) and self.byte_seconds >= 0):
            raise ValueError(f"byte_seconds must be finite and at least 0, not {self.byte_seconds}")
        if not (math.isfinite(self.period_s) and self.period_s > 0):
            raise ValueError(f"period_s must be finite and positive, not {self.period_s}")


@dataclass(slots=True)
class _Account:
    left: float
    since_s: float
    charged: dict[str, float] = field(default_factory=dict)
    """By pin, what it was charged for."""


class TenantBudgets:
    """The tenants that have a budget; others are not limited."""

    def __init__(self) -> None:
        self._budgets: dict[str | None, TenantBudget] = {}
        self._accounts: dict[str | None, _Account] = {}

    def __len__(self) -> int:
        """Return the number of tenants with a budget."""
        return len(self._budgets)

    def all(self) -> list[TenantBudget]:
        """All budgets."""
        return list(self._budgets.values())

    def replace(self, budgets: Iterable[TenantBudget]) -> None:
        """These hold now, and no others. What a tenant has used already stays used."""
        self._budgets = {budget.tenant: budget for budget in budgets}
        for tenant in list(self._accounts):
            if tenant not in self._budgets:
                del self._accounts[tenant]

    def ttl_limit_s(self, tenant: str | None, n_bytes: int, now_s: float) -> float:
        """For how long the tenant may pin so many bytes; inf where it is not limited.

        0 where it is less than `SHORTEST_PIN_S`.
        """
        if tenant not in self._budgets or n_bytes <= 0:
            return math.inf
        limit_s = self._account(tenant, now_s).left / n_bytes
        return limit_s if limit_s >= SHORTEST_PIN_S else 0.0

    def left(self, tenant: str | None, now_s: float) -> float:
        """Byte-seconds that the tenant may still use; inf where it is not limited."""
        return self._account(tenant, now_s).left if tenant in self._budgets else math.inf

    def charge(self, tenant: str | None, pin: str, byte_seconds: float, now_s: float) -> None:
        """A pin may use so much more than it could before; less, where it is negative."""
        if tenant not in self._budgets:
            return
        account = self._account(tenant, now_s)
        charged = account.charged.get(pin, 0.0)
        byte_seconds = max(byte_seconds, -charged)
        account.left = min(self._budgets[tenant].byte_seconds, account.left - byte_seconds)
        account.charged[pin] = charged + byte_seconds

    def ended(self, tenant: str | None, pin: str, unused: float, now_s: float) -> None:
        """A pin has ended, and so many byte-seconds before its TTL."""
        if tenant in self._budgets:
            self.charge(tenant, pin, -max(0.0, unused), now_s)
            del self._accounts[tenant].charged[pin]

    def _account(self, tenant: str | None, now_s: float) -> _Account:
        budget = self._budgets[tenant]
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(budget.byte_seconds, now_s)
        elapsed_s = max(0.0, now_s - account.since_s)
        refilled = account.left + elapsed_s * budget.byte_seconds / budget.period_s
        account.left, account.since_s = min(budget.byte_seconds, refilled), now_s
        return account
