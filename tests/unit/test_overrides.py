"""TTL overrides, tenants' budgets and announcements: pure policy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.ttl.announcements import DEFAULT_SPREAD, Announcement, Announcements, announced_curve
from kvtier.ttl.holding import TtlBound
from kvtier.ttl.overrides import OverrideTable, TtlOverride, joined
from kvtier.ttl.tenant_budgets import TenantBudget, TenantBudgets

# -- overrides -------------------------------------------------------------------------------------


def table(*overrides: TtlOverride) -> OverrideTable:
    made = OverrideTable()
    made.replace(overrides)
    return made


ALL = TtlOverride("all", "", "fixed", 1.0)
TENANT = TtlOverride("tenant", "acme", "fixed", 2.0)
TOOL = TtlOverride("tool", "bash", "fixed", 3.0)
PROGRAM = TtlOverride("program", "p", "fixed", 4.0)


@pytest.mark.parametrize(
    ("overrides", "ttl_s"),
    [
        ((ALL, TENANT, TOOL, PROGRAM), 4.0),
        ((PROGRAM, TOOL, TENANT, ALL), 4.0),
        ((ALL, TENANT, TOOL), 3.0),
        ((ALL, TENANT), 2.0),
        ((ALL,), 1.0),
    ],
)
def test_the_most_specific_override_wins(overrides: tuple[TtlOverride, ...], ttl_s: float) -> None:
    bound = table(*overrides).bound(0.0, program="p", tool="bash", tenant="acme")
    assert bound == TtlBound("fixed", ttl_s)


def test_an_override_is_for_nobody_else() -> None:
    overrides = table(TENANT, TOOL, PROGRAM)
    assert overrides.bound(0.0, program="q", tool="grep", tenant="other") is None
    assert overrides.bound(0.0, program="q", tool=None, tenant=None) is None


def test_an_override_ends_and_uncovers_the_next() -> None:
    short = TtlOverride("program", "p", "cap", 9.0, expires_s=10.0)
    overrides = table(short, ALL)
    assert overrides.bound(9.9, program="p", tool=None, tenant=None) == TtlBound("cap", 9.0)
    assert overrides.bound(10.0, program="p", tool=None, tenant=None) == TtlBound("fixed", 1.0)
    assert len(overrides) == 1


def test_replacing_forgets_what_was_there() -> None:
    overrides = table(PROGRAM, ALL)
    overrides.replace([TOOL])
    assert overrides.bound(0.0, program="p", tool=None, tenant=None) is None
    assert len(overrides) == 1


@pytest.mark.parametrize("ttl_s", [-1.0, math.inf, math.nan])
def test_impossible_overrides_are_refused(ttl_s: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        TtlOverride("all", "", "fixed", ttl_s)


@pytest.mark.parametrize(
    ("override", "asked_s", "expected"),
    [
        (None, None, None),
        (None, 5.0, TtlBound("fixed", 5.0)),
        (TtlBound("cap", 3.0), None, TtlBound("cap", 3.0)),
        (TtlBound("fixed", 3.0), 5.0, TtlBound("fixed", 3.0)),
        (TtlBound("cap", 3.0), 5.0, TtlBound("fixed", 3.0)),
        (TtlBound("cap", 9.0), 5.0, TtlBound("fixed", 5.0)),
        (TtlBound("floor", 9.0), 5.0, TtlBound("fixed", 9.0)),
        (TtlBound("floor", 3.0), 5.0, TtlBound("fixed", 5.0)),
    ],
)
def test_an_override_comes_before_what_was_asked_for(
    override: TtlBound | None, asked_s: float | None, expected: TtlBound | None
) -> None:
    assert joined(override, asked_s) == expected


# -- budgets ---------------------------------------------------------------------------------------


def test_only_tenants_with_a_budget_are_limited() -> None:
    budgets = TenantBudgets()
    assert not budgets
    budgets.replace([TenantBudget("acme", 1000.0, 10.0)])
    assert budgets.ttl_limit_s("other", 10**9, 0.0) == math.inf
    assert budgets.ttl_limit_s(None, 10**9, 0.0) == math.inf
    assert budgets.ttl_limit_s("acme", 100, 0.0) == 10.0


def test_a_pin_uses_the_budget_and_gives_back_what_it_did_not_use() -> None:
    budgets = TenantBudgets()
    budgets.replace([TenantBudget("acme", 1000.0, 1e9)])
    budgets.charge("acme", "r1", 1000.0, 0.0)
    assert budgets.ttl_limit_s("acme", 100, 0.0) == 0.0
    budgets.ended("acme", "r1", 400.0, 6.0)
    assert budgets.ttl_limit_s("acme", 100, 6.0) == pytest.approx(4.0, abs=1e-3)


def test_no_more_is_given_back_than_was_charged() -> None:
    budgets = TenantBudgets()
    budgets.replace([TenantBudget("acme", 1000.0, 1e9)])
    budgets.charge("acme", "r1", 600.0, 0.0)
    budgets.ended("acme", "r0", 500.0, 0.0)
    assert budgets.left("acme", 0.0) == 400.0
    budgets.charge("acme", "r1", -700.0, 0.0)
    budgets.ended("acme", "r1", 500.0, 0.0)
    assert budgets.left("acme", 0.0) == 1000.0


def test_a_budget_is_refilled_evenly_and_never_overflows() -> None:
    budgets = TenantBudgets()
    budgets.replace([TenantBudget("acme", 1000.0, 10.0)])
    budgets.charge("acme", "r1", 1000.0, 0.0)
    assert budgets.ttl_limit_s("acme", 1, 5.0) == pytest.approx(500.0)
    assert budgets.ttl_limit_s("acme", 1, 1e6) == pytest.approx(1000.0)


def test_a_change_of_budget_does_not_forget_what_was_used() -> None:
    budgets = TenantBudgets()
    budgets.replace([TenantBudget("acme", 1000.0, 10.0)])
    budgets.charge("acme", "r1", 1000.0, 0.0)
    budgets.replace([TenantBudget("acme", 2000.0, 10.0)])
    assert budgets.ttl_limit_s("acme", 1, 0.0) == 0.0
    budgets.replace([])
    assert budgets.ttl_limit_s("acme", 1, 0.0) == math.inf


@given(
    st.lists(
        st.tuples(st.floats(0.0, 50.0), st.integers(1, 1000), st.floats(0.0, 1.0)), max_size=40
    )
)
def test_a_tenant_never_uses_more_than_its_budget(
    pins: list[tuple[float, int, float]],
) -> None:
    """Whatever TTLs are asked for and however early pins end: byte-seconds <= budget + refill."""
    whole, period_s = 10_000.0, 20.0
    budgets = TenantBudgets()
    budgets.replace([TenantBudget("t", whole, period_s)])
    now_s = used = 0.0
    for i, (asked_s, n_bytes, share) in enumerate(pins):
        ttl_s = min(asked_s, budgets.ttl_limit_s("t", n_bytes, now_s))
        budgets.charge("t", f"r{i}", n_bytes * ttl_s, now_s)
        lasted_s = share * ttl_s
        now_s += lasted_s
        used += lasted_s * n_bytes
        budgets.ended("t", f"r{i}", n_bytes * (ttl_s - lasted_s), now_s)
        assert used <= whole + now_s * whole / period_s + 1e-6 * (1 + used)


@pytest.mark.parametrize(
    ("byte_seconds", "period_s"), [(-1.0, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, math.nan)]
)
def test_impossible_budgets_are_refused(byte_seconds: float, period_s: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        TenantBudget("t", byte_seconds, period_s)


# -- announcements ---------------------------------------------------------------------------------


def test_an_announced_distribution_has_the_announced_quantiles() -> None:
    curve = announced_curve(10.0, 40.0)
    assert curve is not None
    assert curve.quantile(0.5) == pytest.approx(10.0, rel=0.05)
    assert curve.quantile(0.9) == pytest.approx(40.0, rel=0.1)


def test_one_duration_stands_for_a_distribution() -> None:
    curve = announced_curve(10.0, None)
    assert curve is not None
    assert curve.quantile(0.9) == pytest.approx(10.0 * DEFAULT_SPREAD, rel=0.1)
    assert announced_curve(None, None) is None


@given(st.floats(0.0, 1e6), st.one_of(st.none(), st.floats(0.0, 1e6)))
def test_any_announced_durations_make_a_curve(p50_s: float, p90_s: float | None) -> None:
    curve = announced_curve(p50_s, p90_s)
    assert curve is not None
    assert 0.0 <= curve.survival(1.0) <= 1.0


def test_an_announcement_lasts_for_one_pause() -> None:
    announcements = Announcements()
    first = Announcement("bash", 1.0, None)
    announcements.announce("p", ["r1", "r2"], first)
    assert announcements.of("p", "r1") is first
    assert announcements.of("p", "r3") is None
    assert announcements.of("q", "r1") is None
    announcements.turns_over("p", ["r1"])
    assert announcements.of("p", "r1") is None
    assert announcements.of("p", "r2") is first
    announcements.forget("p")
    assert announcements.n_turns == len(announcements) == 0
