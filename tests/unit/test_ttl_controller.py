"""What TTLs and the release order are learned from: gaps, broken pins, reuse of outputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.cost_model import HoldReason
from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.gpu_pin import Pin
from kvtier.ttl.holding import optimal_ttl
from kvtier.ttl_controller import MIN_LEASE_S, OutputReuse, TtlController

MISS_S = 2.0
PRICE_S_PER_S = 0.1


@pytest.fixture(scope="module")
def learned() -> TtlController:
    controller = TtlController()
    for i in range(200):
        controller.observe_gap("bash", 1.0 + 0.01 * (i % 100))
        controller.observe_gap("build", 100.0 + i)
    return controller


def test_ttl_follows_the_tool(learned: TtlController) -> None:
    fast = optimal_ttl(learned.away("bash"), MISS_S, PRICE_S_PER_S, 300.0, None)
    assert fast.reason is HoldReason.RETURN_EXPECTED
    assert fast.hit_probability == pytest.approx(0.98, abs=0.03)
    assert 1.9 <= fast.ttl_s <= 2.1
    slow = optimal_ttl(learned.away("build"), MISS_S, PRICE_S_PER_S, 300.0, None)
    assert (slow.ttl_s, slow.reason) == (0.0, HoldReason.MEMORY_SCARCE)


def test_programs_that_never_return_make_a_tool_slow() -> None:
    controller = TtlController()
    for _ in range(100):
        controller.observe_gap("bash", 1.0)
    before = controller.away("bash").survival(5.0)
    for _ in range(100):
        controller.observe_censored("bash", 1000.0)
    assert controller.away("bash").survival(5.0) > before + 0.3


def test_the_operators_ttl_comes_before_the_clients() -> None:
    assert TtlController().bound(None) is None
    hint = TtlController().bound(7.0)
    assert hint is not None
    assert (hint.mode, hint.ttl_s) == ("fixed", 7.0)
    fixed = TtlController(fixed_ttl_s=0.0).bound(7.0)
    assert fixed is not None
    assert fixed.ttl_s == 0.0


def test_broken_pins_are_counted_from_a_guess() -> None:
    controller = TtlController()
    assert controller.pin_break_probability == pytest.approx(0.1)
    for _ in range(300):
        controller.observe_pin_end(broken=True)
    assert controller.pin_break_probability > 0.95
    for _ in range(300):
        controller.observe_pin_end(broken=False)
    assert controller.pin_break_probability < 0.05


def pin(
    *, pinned_s: float = 0.0, ttl_s: float = 2.0, n_blocks: int = 10, tool: str = "bash"
) -> Pin:
    data = PinnedTurn(tool, 100, 5, 1.0, 50, miss_unstaged_s=1.0, miss_staged_s=0.1)
    return Pin("r", "p", np.arange(n_blocks, dtype=np.int64), pinned_s, pinned_s + ttl_s, data)


class TestRegret:
    def test_is_the_chance_of_a_return_times_the_miss(self, learned: TtlController) -> None:
        curve = learned.away("bash")
        expected = (1 - curve.survival(2.0) / curve.survival(1.5)) * 1.0 / 10
        assert learned.regret_s_per_block(pin(), 1.5, staged=False) == pytest.approx(expected)

    def test_directions(self, learned: TtlController) -> None:
        def regret(of: Pin, now_s: float = 1.5, *, staged: bool = False) -> float:
            return learned.regret_s_per_block(of, now_s, staged=staged)

        assert 0 < regret(pin(), staged=True) < regret(pin())
        assert regret(pin(n_blocks=100)) < regret(pin()), "large"
        assert regret(pin(ttl_s=1.51)) < regret(pin()), "about to expire"
        assert regret(pin(tool="build")) < regret(pin()), "a slow tool"
        assert regret(pin(ttl_s=100.0), 90.0) < regret(pin()), "overdue"

    def test_a_pin_of_somebody_else_is_worth_nothing(self, learned: TtlController) -> None:
        other = pin()
        other.data = None
        assert learned.regret_s_per_block(other, 1.0, staged=False) == 0.0

    @given(st.floats(0.0, 1e4), st.floats(0.0, 1e4), st.integers(1, 1000))
    def test_is_a_share_of_the_miss(self, now_s: float, ttl_s: float, n_blocks: int) -> None:
        controller = TtlController()
        of = pin(ttl_s=ttl_s, n_blocks=n_blocks)
        regret = controller.regret_s_per_block(of, now_s, staged=False)
        assert -1e-12 <= regret <= 1.0 / n_blocks + 1e-12


class TestOutputReuse:
    def test_starts_undecided_and_learns(self) -> None:
        reuse = OutputReuse()
        assert reuse.probability("m") == 0.75
        reuse.observe("m", 0, 100)
        assert reuse.probability("m") > 0.4
        for _ in range(100):
            reuse.observe("m", 0, 100)
            reuse.observe("good", 100, 100)
        assert reuse.probability("m") < 0.1
        assert reuse.probability("good") > 0.95
        assert reuse.probability("other") == 0.75

    def test_follows_a_changed_client(self) -> None:
        reuse = OutputReuse()
        for _ in range(1000):
            reuse.observe("m", 0, 100)
        for _ in range(100):
            reuse.observe("m", 100, 100)
        assert reuse.probability("m") > 0.8

    def test_edges(self) -> None:
        reuse = OutputReuse(max_models=3)
        reuse.observe("m", 5, 0)
        assert reuse.probability("m") == 0.75
        reuse.observe("m", 500, 100)
        assert reuse.probability("m") == pytest.approx(2.5 / 3)
        for i in range(10):
            reuse.observe(f"m{i}", 0, 1)
        assert reuse.probability("m") == 0.75, "forgotten"
        with pytest.raises(ValueError, match="decay"):
            OutputReuse(decay=1.0)


def test_lease_covers_most_returns_and_no_more() -> None:
    ttl = TtlController()
    assert ttl.lease_s("bash", 600.0) == pytest.approx(60.0, rel=0.1), (
        "the prior: nine of ten within 30 s"
    )
    for _ in range(200):
        ttl.observe_gap("bash", 1.0)
        ttl.observe_gap("build", 50.0)
    assert ttl.lease_s("bash", 600.0) == MIN_LEASE_S
    assert ttl.lease_s("build", 600.0) == pytest.approx(100.0, rel=0.1)
    assert ttl.lease_s("build", 20.0) == 20.0
