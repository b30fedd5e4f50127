"""Invariant 5: what the pins of tenants with a budget have cost, from what can be seen of the pins alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvtier.costs.pinned_turn import PinnedTurn

if TYPE_CHECKING:
    from tests.model.life import Life

ROUNDING: Final = 1e-6

Limits = dict[str | None, tuple[float, float]]
Pin = tuple[str | None, int, float]
"""The tenant, bytes, and until when they are pinned."""
Pins = dict[str, Pin]


class Meter:
    """What tenants with a budget may still use, in byte-seconds.

    A bucket that begins full, is refilled evenly and never holds more than a period's share. A pin takes all that it
    can use when it begins or changes, and gives back what it has not used. When in a transition something came is
    not known: it was when it cost least.
    """

    def __init__(self, life: Life) -> None:
        self._life = life
        self._limits: Limits = {}
        self._left: dict[str | None, float] = {}
        # By pin, what it has taken: those from before their tenant had a budget have taken nothing.
        self._taken: dict[str, float] = {}
        self._pins: Pins = {}
        self._then_s = life.engine.clock()

    def overuse(self) -> str:
        """Look at the pins once more; who has used too much, or an empty string."""
        half, now_s = self._life.half, self._life.engine.clock()
        limits: Limits = {
            b.tenant: (float(b.byte_seconds), b.period_s) for b in half.policy.ttl.budgets.all()
        }
        pins = self._seen() if limits else {}
        if limits == self._limits:
            self._settle(pins, now_s)
        else:
            self._change(limits, pins, now_s)
        self._pins, self._then_s = pins, now_s
        for tenant, left in self._left.items():
            if left < -ROUNDING * max(1.0, limits[tenant][0]):
                return f"5: tenant {tenant} has used {-left:g} byte-seconds too many"
        return ""

    def _seen(self) -> Pins:
        half = self._life.half
        return {
            pin.key: (pin.data.tenant, len(pin.block_ids) * half.facts.block_bytes, pin.deadline_s)
            for pin in half.pins.pins()
            if isinstance(pin.data, PinnedTurn)
        }

    def _settle(self, pins: Pins, now_s: float) -> None:
        """Refill the buckets; take for pins that have begun or grown, give back for those that have ended."""
        for tenant, (whole, period_s) in self._limits.items():
            self._left[tenant] += (now_s - self._then_s) * whole / period_s
        for key in self._pins.keys() | pins.keys():
            tenant = (pins.get(key) or self._pins[key])[0]
            if tenant not in self._limits:
                continue
            taken = self._taken.get(key, 0.0)
            more = max(-taken, self._least_more(self._pins.get(key), pins.get(key), now_s))
            self._left[tenant] -= more
            self._taken[key] = taken + more
            if key not in pins:
                del self._taken[key]
        for tenant, (whole, _) in self._limits.items():
            self._left[tenant] = min(whole, self._left[tenant])

    def _least_more(self, before: Pin | None, after: Pin | None, now_s: float) -> float:
        """What a pin took more than it gave back, at the moment of the transition at which that was least."""
        ends = (pin[2] for pin in (before, after) if pin is not None)
        moments = (min(max(self._then_s, at_s), now_s) for at_s in (self._then_s, now_s, *ends))
        return min(_rest(after, at_s) - _rest(before, at_s) for at_s in moments)

    def _change(self, limits: Limits, pins: Pins, now_s: float) -> None:
        """Other budgets hold now. What came first in this transition, pin or budget, is not known: it is free."""
        for key in list(self._taken):
            if key not in pins or pins[key][0] not in limits:
                del self._taken[key]
        for key, pin in pins.items():
            if pin[0] in self._limits and pin[0] in limits:
                self._taken[key] = _rest(pin, now_s)
        self._left = {tenant: whole for tenant, (whole, _) in limits.items()}
        self._limits = limits


def _rest(pin: Pin | None, from_s: float) -> float:
    """What a pin can still use."""
    return pin[1] * max(0.0, pin[2] - from_s) if pin is not None else 0.0
