"""The meter that the model checker holds against kvtier's own accounts of tenants."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from kvtier.ttl.tenant_budgets import TenantBudget
from tests.model.meter import Meter

if TYPE_CHECKING:
    from tests.model.meter import Pins

BYTES = 100


class Watched(Meter):
    """One whose pins are set."""

    def __init__(self) -> None:
        self.now_s, self.pins = 10.0, {}  # type: float, Pins
        budgets = SimpleNamespace(all=lambda: [TenantBudget("red", 1000.0, 100.0)])
        half = SimpleNamespace(policy=SimpleNamespace(ttl=SimpleNamespace(budgets=budgets)))
        engine = SimpleNamespace(clock=lambda: self.now_s)
        super().__init__(SimpleNamespace(half=half, engine=engine))  # type: ignore[arg-type]
        assert not self.overuse()

    def _seen(self) -> Pins:
        return dict(self.pins)

    def after(self, seconds: float, **until_s: float) -> str:
        """So much later these pins are seen; what is said then."""
        self.now_s += seconds
        self.pins = {key: ("red", BYTES, until) for key, until in until_s.items()}
        return self.overuse()


def test_what_is_refilled_may_be_used_again() -> None:
    meter = Watched()
    assert not meter.after(0.0, a=20.0)
    assert "red has used 100 byte-seconds too many" in meter.after(0.0, a=20.0, b=11.0)
    meter = Watched()
    assert not meter.after(0.0, a=20.0)
    assert not meter.after(10.0, a=20.0)
    assert not meter.after(0.0, b=21.0)
    assert "too many" in meter.after(0.0, b=21.0, c=20.5)


def test_what_is_given_back_may_be_used_again() -> None:
    meter = Watched()
    assert not meter.after(0.0, a=20.0)
    assert not meter.after(0.0)
    assert not meter.after(0.0, b=20.0)


def test_a_pin_may_have_ended_just_before_its_time_was_up() -> None:
    meter = Watched()
    assert not meter.after(0.0, a=20.0)
    assert not meter.after(10.0)
    assert not meter.after(0.0, b=30.0)


def test_a_pin_that_ends_and_begins_anew_gives_back_first() -> None:
    # What is left is 100. Ended at once, `a` gives back 900, which its successor takes with that: at the end of the
    # transition the two would differ by more, as one has more bytes than the other.
    meter = Watched()
    assert not meter.after(0.0, a=19.0)
    meter.now_s += 1.0
    meter.pins = {"a": ("red", BYTES // 2, 30.0)}
    assert not meter.overuse()
