"""TTL choice, release order, output reuse, overrides and tenant budgets."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.cost_model import HoldReason
from kvtier.ttl.gaps import TOOL_PRIOR, SurvivalCurve, kaplan_meier
from kvtier.ttl_controller import (
    HeldPin,
    OutputReuse,
    OverrideTable,
    TenantBudgets,
    TtlController,
    TtlOverride,
    regret_per_block_s,
    release_order_key,
)

PIN = HeldPin(
    program="p1",
    tool="bash",
    tenant="t1",
    waited_s=0.0,
    n_blocks=1000,
    miss_cost_s=2.0,
    price_s_per_block_s=1e-4,
)


def _controller(**parts: object) -> TtlController:
    controller = TtlController(**parts)  # type: ignore[arg-type]
    for i in range(200):
        controller.gaps.record("bash", 1.0 + 0.01 * (i % 100))
        controller.gaps.record("build", 100.0 + i)
    return controller


def test_ttl_follows_the_tool() -> None:
    controller = _controller()
    fast = controller.choose_ttl(0.0, PIN)
    assert fast.reason is HoldReason.RETURN_EXPECTED
    assert fast.hit_probability == pytest.approx(0.98, abs=0.03)
    assert 1.9 <= fast.ttl_s <= 2.1
    slow = controller.choose_ttl(0.0, replace(PIN, tool="build"))
    assert (slow.ttl_s, slow.reason) == (0.0, HoldReason.MEMORY_SCARCE)


def test_ttl_is_chosen_again_from_the_residual_gap() -> None:
    controller = _controller()
    early = controller.choose_ttl(0.0, replace(PIN, waited_s=1.5))
    assert 0.4 <= early.ttl_s <= 0.6
    # Overdue: what is left of the distribution is the prior's long tail.
    late = controller.choose_ttl(0.0, replace(PIN, waited_s=60.0))
    assert late.ttl_s == 0.0


def test_free_memory_gives_what_is_left_of_the_longest_ttl() -> None:
    controller = _controller(max_ttl_s=120.0)
    free = replace(PIN, price_s_per_block_s=0.0, waited_s=20.0)
    assert controller.choose_ttl(0.0, free).ttl_s == 100.0
    assert controller.choose_ttl(0.0, replace(free, waited_s=500.0)).ttl_s == 0.0
    with pytest.raises(ValueError, match="max_ttl_s"):
        TtlController(max_ttl_s=math.inf)


@given(st.floats(1e-6, 1.0), st.floats(1.01, 50.0), st.floats(0.0, 200.0), st.floats(0.01, 100.0))
def test_a_larger_price_never_lengthens_the_ttl(
    price: float, factor: float, waited_s: float, miss_cost_s: float
) -> None:
    controller = TtlController()
    held = replace(PIN, waited_s=waited_s, miss_cost_s=miss_cost_s, price_s_per_block_s=price)
    cheap = controller.choose_ttl(0.0, held).ttl_s
    dear = controller.choose_ttl(0.0, replace(held, price_s_per_block_s=price * factor)).ttl_s
    assert dear <= cheap * (1 + 1e-9)


def test_the_most_specific_override_wins() -> None:
    table = OverrideTable()
    table.set(TtlOverride("all", "anything", "fixed", 1.0))
    table.set(TtlOverride("tenant", "t1", "fixed", 2.0))
    table.set(TtlOverride("tool", "bash", "fixed", 3.0, expires_at_s=50.0))
    table.set(TtlOverride("program", "p1", "fixed", 4.0, expires_at_s=10.0))
    controller = _controller(overrides=table)
    assert [controller.choose_ttl(now, PIN).ttl_s for now in (9.9, 10.0, 50.0)] == [4.0, 3.0, 2.0]
    assert len(table) == 2, "expired ones are gone"
    assert controller.choose_ttl(99.0, replace(PIN, tenant="other")).ttl_s == 1.0
    assert [item.scope for item in table.in_force(99.0)] == ["all", "tenant"]
    assert table.clear("all", "")
    assert not table.clear("all", "")
    other = replace(PIN, tenant="other", program=None, tool=None)
    assert controller.bound(99.0, program=None, tool=None, tenant="other") is None
    assert controller.choose_ttl(99.0, other).reason is not HoldReason.OVERRIDE_FIXED


def test_overrides_count_from_the_start_of_the_pause() -> None:
    table = OverrideTable()
    table.set(TtlOverride("program", "p1", "fixed", 30.0))
    controller = _controller(overrides=table)
    assert controller.choose_ttl(0.0, replace(PIN, waited_s=10.0)).ttl_s == 20.0
    assert controller.choose_ttl(0.0, replace(PIN, waited_s=40.0)).ttl_s == 0.0


def test_overrides_are_bounded_and_checked() -> None:
    table = OverrideTable(max_overrides=3)
    for i in range(10):
        table.set(TtlOverride("program", f"p{i}", "cap", 1.0))
    assert len(table) == 3
    assert table.resolve(0.0, program="p0", tool=None, tenant=None) is None
    assert table.resolve(0.0, program="p9", tool=None, tenant=None) is not None
    for ttl_s in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="ttl_s"):
            TtlOverride("all", "", "cap", ttl_s)


def test_tenant_budget_shortens_ttls_and_refills() -> None:
    budgets = TenantBudgets(blocks=100.0, burst_s=10.0)
    controller = _controller(budgets=budgets)
    free = replace(PIN, price_s_per_block_s=0.0)
    choice = controller.choose_ttl(0.0, free)
    assert (choice.ttl_s, choice.reason) == (1.0, HoldReason.TENANT_BUDGET)
    budgets.reserve("t1", 0.0, 1000, 1.0)
    assert controller.choose_ttl(0.0, free).ttl_s == 0.0
    assert controller.choose_ttl(0.0, replace(free, tenant="t2")).ttl_s == 1.0
    assert budgets.left_block_s("t1", 5.0) == 500.0
    budgets.refund("t1", 5.0, 1000, 0.25)
    assert budgets.left_block_s("t1", 5.0) == 750.0
    budgets.refund("t1", 5.0, 1000, 100.0)
    assert budgets.left_block_s("t1", 5.0) == 1000.0
    assert budgets.left_block_s("t1", 1e9) == 1000.0


def test_budget_between_events_falls_back_to_the_best_ttl_within_it() -> None:
    controller = _controller(budgets=TenantBudgets(blocks=50.0, burst_s=10.0))
    choice = controller.choose_ttl(0.0, PIN)
    # 0.5 s are affordable, but the tool never returns before 1 s and the prior's chance is small.
    assert choice.reason is HoldReason.TENANT_BUDGET
    assert choice.ttl_s <= 0.5
    assert choice.value_s >= 0.0


@pytest.mark.parametrize("mode", ["fixed", "floor"])
def test_overrides_overdraw_a_budget(mode: str) -> None:
    table = OverrideTable()
    table.set(TtlOverride("program", "p1", mode, 30.0))  # type: ignore[arg-type]
    budgets = TenantBudgets(blocks=1.0, burst_s=1.0)
    controller = _controller(overrides=table, budgets=budgets)
    free = replace(PIN, price_s_per_block_s=0.0)
    assert controller.choose_ttl(0.0, free).ttl_s == 30.0
    budgets.reserve("t1", 0.0, 1000, 30.0)
    assert budgets.left_block_s("t1", 0.0) < 0.0
    assert controller.max_ttl_for(0.0, tenant="t1", n_blocks=1) == 0.0
    assert controller.max_ttl_for(0.0, tenant="t1", n_blocks=0) == controller.max_ttl_s


def test_tenants_are_bounded_and_unlimited_ones_are_not_kept() -> None:
    budgets = TenantBudgets(blocks=1.0, max_tenants=5)
    unlimited = TenantBudgets()
    for i in range(50):
        budgets.reserve(f"t{i}", 0.0, 1, 1.0)
        unlimited.reserve(f"t{i}", 0.0, 1, 1.0)
    assert (len(budgets), len(unlimited)) == (5, 0)
    assert unlimited.left_block_s("t1", 0.0) == math.inf


class TestRegret:
    CURVE = kaplan_meier([1.0, 2.0, 3.0, 4.0], [True] * 4, prior=TOOL_PRIOR, prior_weight=1.0)

    def _regret(self, **changes: float) -> float:
        arguments = {"waited_s": 0.0, "horizon_s": 2.0, "miss_cost_s": 1.0, "n_blocks": 10}
        return regret_per_block_s(self.CURVE, **(arguments | changes))  # type: ignore[arg-type]

    def test_hand_computed(self) -> None:
        curve = SurvivalCurve((1.0, 2.0, 4.0), (0.8, 0.4, 0.1))
        regret = regret_per_block_s(curve, waited_s=1.0, horizon_s=1.5, miss_cost_s=3.0, n_blocks=6)
        assert regret == pytest.approx((1 - 0.4 / 0.8) * 3.0 / 6)

    def test_directions(self) -> None:
        assert self._regret(miss_cost_s=0.1) < self._regret(), "staged"
        assert self._regret(waited_s=100.0) < self._regret(), "overdue"
        assert self._regret(n_blocks=100) < self._regret(), "large"
        assert self._regret(horizon_s=0.1) < self._regret(), "about to expire"
        assert self._regret(n_blocks=0) == math.inf

    def test_every_seen_gap_was_shorter(self) -> None:
        curve = kaplan_meier([1.0, 2.0], [True, True])
        regret = regret_per_block_s(
            curve, waited_s=10.0, horizon_s=10.0, miss_cost_s=1.0, n_blocks=1
        )
        assert regret == pytest.approx(0.5)

    @given(st.floats(0.0, 1e4), st.floats(0.0, 1e4), st.floats(0.0, 100.0), st.integers(1, 10**6))
    def test_is_a_share_of_the_miss(
        self, waited_s: float, horizon_s: float, miss_cost_s: float, n_blocks: int
    ) -> None:
        regret = self._regret(
            waited_s=waited_s, horizon_s=horizon_s, miss_cost_s=miss_cost_s, n_blocks=n_blocks
        )
        assert -1e-12 <= regret <= miss_cost_s / n_blocks + 1e-12

    def test_order_is_total(self) -> None:
        keys = [
            release_order_key(0.2, deadline_s=1.0, program_arrival_s=0.0, key="d"),
            release_order_key(0.1, deadline_s=9.0, program_arrival_s=0.0, key="b"),
            release_order_key(0.1, deadline_s=5.0, program_arrival_s=0.0, key="x"),
            release_order_key(0.1, deadline_s=9.0, program_arrival_s=7.0, key="c"),
            release_order_key(0.1, deadline_s=9.0, program_arrival_s=0.0, key="a"),
        ]
        assert "".join(key[-1] for key in sorted(keys)) == "xcabd"


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
