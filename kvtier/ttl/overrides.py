"""What people decide about TTLs: overrides by operators and clients, and budgets per tenant."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from kvtier.ttl.holding import TtlBound

Scope = Literal["program", "tool", "tenant", "all"]
_MOST_SPECIFIC_FIRST: tuple[Scope, ...] = ("program", "tool", "tenant", "all")


@dataclass(frozen=True, slots=True)
class TtlOverride:
    """A TTL rule for a program, a tool, a tenant or everything.

    Attributes:
        scope: what ``key`` names.
        key: program id, tool name or tenant; ignored (use "") for ``all``.
        mode: ``fixed`` replaces the chosen TTL, ``cap`` and ``floor`` bound it.
        ttl_s: seconds, finite and >= 0.
        expires_at_s: when the rule ends, on the engine's clock; inf for never.

    Raises:
        ValueError: ``ttl_s`` is negative or not finite, or ``expires_at_s`` is NaN.
    """

    scope: Scope
    key: str
    mode: Literal["fixed", "cap", "floor"]
    ttl_s: float
    expires_at_s: float = math.inf

    def __post_init__(self) -> None:
        """Check the numbers, which come from clients."""
        if not (math.isfinite(self.ttl_s) and self.ttl_s >= 0.0) or math.isnan(self.expires_at_s):
            msg = f"an override needs a finite ttl_s >= 0 and a real expiry: {self}"
            raise ValueError(msg)


class OverrideTable:
    """The overrides in force. The most specific wins: program, tool, tenant, all."""

    def __init__(self, max_overrides: int = 4096) -> None:
        """Keep at most ``max_overrides``; the oldest makes room."""
        self._max = max_overrides
        self._overrides: OrderedDict[tuple[Scope, str], TtlOverride] = OrderedDict()

    def __len__(self) -> int:
        """Return how many are kept, expired ones that nobody asked for included."""
        return len(self._overrides)

    def set(self, override: TtlOverride) -> None:
        """Add an override; it replaces the one of the same scope and key."""
        address = _address(override.scope, override.key)
        self._overrides.pop(address, None)
        if len(self._overrides) >= self._max:
            self._overrides.popitem(last=False)
        self._overrides[address] = override

    def clear(self, scope: Scope, key: str) -> bool:
        """Remove an override; return whether there was one."""
        return self._overrides.pop(_address(scope, key), None) is not None

    def in_force(self, now_s: float) -> list[TtlOverride]:
        """Return the overrides that have not expired, oldest first."""
        return [item for item in self._overrides.values() if now_s < item.expires_at_s]

    def resolve(
        self, now_s: float, *, program: str | None, tool: str | None, tenant: str | None
    ) -> TtlBound | None:
        """Return the bound that the most specific unexpired override sets, or None."""
        keys: dict[Scope, str | None] = {
            "program": program,
            "tool": tool,
            "tenant": tenant,
            "all": "",
        }
        for scope in _MOST_SPECIFIC_FIRST:
            key = keys[scope]
            if key is None:
                continue
            override = self._overrides.get((scope, key))
            if override is None:
                continue
            if now_s < override.expires_at_s:
                return TtlBound(override.mode, override.ttl_s)
            del self._overrides[scope, key]
        return None


class TenantBudgets:
    """Block-seconds that each tenant may hold in pins: a token bucket per tenant.

    A tenant earns ``blocks`` block-seconds per second, up to ``blocks * burst_s``; it starts full.
    Holding ``blocks`` pinned all the time is thus sustainable. A pin reserves its whole TTL and
    gets back what it did not use. Tenants are named by clients, so only the last ``max_tenants``
    are remembered; a forgotten one starts full again.
    """

    def __init__(
        self, blocks: float = math.inf, burst_s: float = 60.0, max_tenants: int = 4096
    ) -> None:
        """Give every tenant the same budget; ``blocks=inf`` switches budgets off."""
        self._blocks = blocks
        self._capacity = blocks * burst_s
        self._max_tenants = max_tenants
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of tenants remembered."""
        return len(self._left)

    def left_block_s(self, tenant: str, now_s: float) -> float:
        """Return the block-seconds that ``tenant`` may reserve now."""
        if math.isinf(self._capacity):
            return math.inf
        left, since_s = self._left.get(tenant, (self._capacity, now_s))
        return min(left + max(now_s - since_s, 0.0) * self._blocks, self._capacity)

    def reserve(self, tenant: str, now_s: float, n_blocks: int, ttl_s: float) -> None:
        """Take ``n_blocks * ttl_s`` off; an override's pin may overdraw."""
        self._set(tenant, now_s, self.left_block_s(tenant, now_s) - n_blocks * ttl_s)

    def refund(self, tenant: str, now_s: float, n_blocks: int, unused_s: float) -> None:
        """Give back ``n_blocks * unused_s`` of a pin that ended early."""
        left = self.left_block_s(tenant, now_s) + n_blocks * max(unused_s, 0.0)
        self._set(tenant, now_s, min(left, self._capacity))

    def _set(self, tenant: str, now_s: float, left: float) -> None:
        if math.isinf(self._capacity):
            return
        self._left[tenant] = (left, now_s)
        self._left.move_to_end(tenant)
        if len(self._left) > self._max_tenants:
            self._left.popitem(last=False)


def _address(scope: Scope, key: str) -> tuple[Scope, str]:
    return (scope, "" if scope == "all" else key)
