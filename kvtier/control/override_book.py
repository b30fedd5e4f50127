"""The TTL overrides that hold, by scope: one for each, the most specific scopes first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvtier.link_messages import TtlOverride

MAX_OVERRIDES: Final = 1000
MAX_PER_TENANT: Final = 100
"""Of those that a caller bound to a tenant may set."""

ScopeKey = tuple[int, str, str]
"""Rank of the scope, then what it names: sorts in the order of `TtlService.ListTtlOverrides`."""

PROGRAM, TOOL, TENANT, ALL = range(4)


class TooManyOverridesError(Exception):
    """There is no room for another override."""


def scope_key(override: TtlOverride) -> ScopeKey:
    """Return what an override is for. Two overrides with the same key replace each other."""
    if override.program is not None:
        return PROGRAM, override.program.tenant or "", override.program.name
    if override.tool is not None:
        return TOOL, override.tool, ""
    if override.tenant is not None:
        return TENANT, override.tenant, ""
    return ALL, "", ""


def tenant_of(key: ScopeKey) -> str | None:
    """The tenant whose programs alone an override is for; None: those of more than one, or without."""
    return (key[1] or None) if key[0] in {PROGRAM, TENANT} else None


class OverrideBook:
    """The overrides. `version` grows with every change.

    Args:
        clock: Unix time.
        overrides: Those to begin with; what has expired is left out.
    """

    def __init__(self, clock: Callable[[], float], overrides: Iterable[TtlOverride] = ()) -> None:
        self._clock = clock
        self._overrides: dict[ScopeKey, TtlOverride] = {}
        for override in overrides:
            self._overrides[scope_key(override)] = override
        self.version = 1
        self.drop_expired()

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._overrides)

    def all(self) -> list[TtlOverride]:
        """All that hold now, the most specific scopes first."""
        now_s = self._clock()
        return [
            self._overrides[key]
            for key in sorted(self._overrides)
            if not _expired(self._overrides[key], now_s)
        ]

    def set(self, override: TtlOverride, *, limit_per_tenant: bool = False) -> None:
        """Let an override hold, in place of the one of its scope.

        Raises:
            TooManyOverridesError: A limit is reached.
        """
        key = scope_key(override)
        if key not in self._overrides:
            self.drop_expired()
            if len(self._overrides) >= MAX_OVERRIDES:
                raise TooManyOverridesError(f"{MAX_OVERRIDES} overrides are set")
            tenant = tenant_of(key)
            others = sum(1 for other in self._overrides if tenant_of(other) == tenant)
            if limit_per_tenant and others >= MAX_PER_TENANT:
                raise TooManyOverridesError(f"{MAX_PER_TENANT} overrides of the tenant are set")
        self._overrides[key] = override
        self.version += 1

    def delete(self, key: ScopeKey) -> bool:
        """End an override; False if there is none."""
        override = self._overrides.pop(key, None)
        if override is None:
            return False
        self.version += 1
        return not _expired(override, self._clock())

    def drop_expired(self) -> bool:
        """Forget what has expired; True if anything has."""
        now_s = self._clock()
        expired = [key for key, o in self._overrides.items() if _expired(o, now_s)]
        for key in expired:
            del self._overrides[key]
        self.version += bool(expired)
        return bool(expired)


def _expired(override: TtlOverride, now_s: float) -> bool:
    return override.expires_s is not None and override.expires_s <= now_s
