"""For how long KV is pinned because somebody asks for it: within overrides, settings and the tenant's budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtier.programs import bounded_name
from kvtier.ttl.overrides import bounded_s

if TYPE_CHECKING:
    from kvtier.gpu_pin import Pin
    from kvtier.policy import Policy
    from kvtier.turns.pin_charges import PinCharges


class Granted(NamedTuple):
    """A TTL in seconds from now, and why it is not what was asked for; empty where it is."""

    ttl_s: float
    limit: str


class PinTerms:
    """See the module's docstring."""

    def __init__(self, policy: Policy, charges: PinCharges) -> None:
        self._policy = policy
        self._charges = charges

    def granted(
        self,
        program: str,
        tool: str | None,
        tenant: str | None,
        asked_s: float | None,
        n_blocks: int,
        now_s: float,
        mine: Pin | None = None,
    ) -> Granted:
        """What is granted of a TTL; 0 where it is forbidden, or cannot be paid for.

        Args:
            program: Handle of the program.
            tool: The tool that it waits for.
            tenant: vLLM's `cache_salt`, bounded.
            asked_s: Seconds from now; None: as long as programs stay away at most after such a tool.
            n_blocks: Blocks that are to be pinned, those of `mine` included.
            now_s: Monotonic time.
            mine: The pin that is there already.
        """
        ttl = self._policy.ttl
        override = ttl.overrides.bound(now_s, program=program, tool=tool, tenant=tenant)
        wanted_s = self._policy.lease_s(tool) if asked_s is None else asked_s
        ttl_s, limit = bounded_s(ttl.bound(asked_s, override), wanted_s), ""
        if ttl_s != wanted_s:
            limit = "fixed_ttl" if override is None else f"override_{override.mode}"
        if ttl_s > self._policy.config.max_ttl_s:
            ttl_s, limit = self._policy.config.max_ttl_s, "max_ttl"
        paid_s = self._charges.limit_s(tenant, n_blocks, now_s, mine)
        if ttl_s > paid_s:
            ttl_s, limit = paid_s, "tenant_budget"
        return Granted(ttl_s, limit)


def tenant_of(salt: str | None) -> str | None:
    """A request's tenant as budgets and overrides name it."""
    return bounded_name(salt) if salt else None
