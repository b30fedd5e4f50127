"""Overrides of TTLs: what an operator says about some programs' pauses. The most specific one holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvtier.ttl.holding import TtlBound

if TYPE_CHECKING:
    from collections.abc import Iterable

Scope = Literal["program", "tool", "tenant", "all"]


@dataclass(frozen=True, slots=True)
class TtlOverride:
    """A TTL for a program, a tool, a tenant or everything.

    Attributes:
        scope: What `key` names.
        key: Program, tool or tenant; ignored for `all`.
        mode: `fixed` replaces the chosen TTL, `cap` and `floor` bound it.
        ttl_s: Finite, at least 0.
        expires_s: When it ends, on the clock of those who ask; inf: never.

    Raises:
        ValueError: `ttl_s` is negative or not finite, or `expires_s` is NaN.
    """

    scope: Scope
    key: str
    mode: Literal["fixed", "cap", "floor"]
    ttl_s: float
    expires_s: float = math.inf

    def __post_init__(self) -> None:
        """Check the numbers, which come from clients."""
        if not (math.isfinite(self.ttl_s) and self.ttl_s >= 0.0) or math.isnan(self.expires_s):
            raise ValueError(f"an override needs a finite ttl_s >= 0 and a real expiry: {self}")


class OverrideTable:
    """The overrides in force, replaced as a whole."""

    def __init__(self) -> None:
        self._overrides: dict[tuple[Scope, str], TtlOverride] = {}

    def __len__(self) -> int:
        """Return how many there are, those included that have expired and that nobody asked for."""
        return len(self._overrides)

    def replace(self, overrides: Iterable[TtlOverride]) -> None:
        """These hold now, and no others. Of several for one scope and key the last one counts."""
        self._overrides = {(o.scope, "" if o.scope == "all" else o.key): o for o in overrides}

    def bound(
        self, now_s: float, *, program: str, tool: str | None, tenant: str | None
    ) -> TtlBound | None:
        """What the most specific override that has not expired says about a pause; None: nothing."""
        if not self._overrides:
            return None
        keys: tuple[tuple[Scope, str | None], ...] = (
            ("program", program),
            ("tool", tool),
            ("tenant", tenant),
            ("all", ""),
        )
        for scope, key in keys:
            override = None if key is None else self._overrides.get((scope, key))
            if override is None:
                continue
            if now_s < override.expires_s:
                return TtlBound(override.mode, override.ttl_s)
            del self._overrides[scope, override.key if scope != "all" else ""]
        return None


def joined(override: TtlBound | None, asked_s: float | None) -> TtlBound | None:
    """What holds of an operator's override and of a TTL that the settings or the client ask for.

    A fixed override replaces what was asked for; a cap or a floor bounds it.
    """
    if asked_s is None:
        return override
    if override is None:
        return TtlBound("fixed", asked_s)
    match override.mode:
        case "fixed":
            return override
        case "cap":
            return TtlBound("fixed", min(asked_s, override.ttl_s))
        case "floor":
            return TtlBound("fixed", max(asked_s, override.ttl_s))


def bounded_s(bound: TtlBound | None, ttl_s: float) -> float:
    """A TTL within what holds for it."""
    match bound:
        case TtlBound("fixed"):
            return bound.ttl_s
        case TtlBound("cap"):
            return min(ttl_s, bound.ttl_s)
        case TtlBound("floor"):
            return max(ttl_s, bound.ttl_s)
        case _:
            return ttl_s
