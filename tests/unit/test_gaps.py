"""Kaplan-Meier curves and the book of observed gaps."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.ttl.gaps import (
    _LEVELS,
    TOOL_PRIOR,
    TURN_PRIOR,
    GapBook,
    SurvivalCurve,
    kaplan_meier,
    lognormal_curve,
)

gap = st.floats(0.0, 1e5) | st.just(math.inf)
observations = st.lists(st.tuples(gap, st.booleans()), max_size=200)


def _curve(samples: list[tuple[float, bool]], prior: SurvivalCurve | None = None) -> SurvivalCurve:
    return kaplan_meier([t for t, _ in samples], [seen for _, seen in samples], prior=prior)


def test_kaplan_meier_matches_a_hand_computed_example() -> None:
    # At risk 6 at 1 s; one censored at 2 s still counts at 2 s; then 3, of whom one leaves at 4 s.
    curve = kaplan_meier([1, 2, 2, 3, 4, 5], [True, True, False, False, True, False])
    assert curve.times == (1.0, 2.0, 4.0)
    assert curve.survivals == pytest.approx((5 / 6, 5 / 6 * 4 / 5, 5 / 6 * 4 / 5 * 1 / 2))
    assert curve.survival(0.5) == 1.0
    assert curve.survival(1.0) == pytest.approx(5 / 6)
    assert curve.survival(3.9) == pytest.approx(2 / 3)


def test_ties_count_together_and_censoring_raises_survival() -> None:
    assert kaplan_meier([2, 2, 2, 4], [True] * 4).survivals == pytest.approx((0.25, 0.0))
    seen = kaplan_meier([1, 2, 3, 4], [True] * 4)
    censored = kaplan_meier([1, 2, 3, 4], [True, False, True, True])
    assert censored.survival(2.5) > seen.survival(2.5)


@given(
    samples=observations,
    with_prior=st.booleans(),
    times=st.lists(st.floats(0.0, 1e7), min_size=2, max_size=20),
)
def test_survival_is_a_survival_function(
    *, samples: list[tuple[float, bool]], with_prior: bool, times: list[float]
) -> None:
    curve = _curve(samples, TOOL_PRIOR if with_prior else None)
    values = [curve.survival(t) for t in sorted(times)]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert all(a >= b - 1e-12 for a, b in pairwise(values))
    assert curve.survival(0.0) == 1.0
    assert curve.hazard(times[0]) >= 0.0


@given(observations, st.floats(0.0, 1e4), st.floats(0.0, 1e4), st.floats(0.0, 1e4))
def test_residual_is_the_conditional_curve(
    samples: list[tuple[float, bool]], first: float, second: float, t: float
) -> None:
    curve = _curve(samples, TOOL_PRIOR)
    residual = curve.residual(first)
    # Not at an event: there rounding decides on which side of the step a sum falls.
    if min((abs(first + t - time) for time in curve.times), default=1.0) > 1e-6:
        expected = curve.survival(first + t) / curve.survival(first)
        assert residual.survival(t) == pytest.approx(expected, rel=1e-9)
    twice, once = residual.residual(second), curve.residual(first + second)
    if min((abs(first + second + t - time) for time in curve.times), default=1.0) > 1e-6:
        assert twice.survival(t) == pytest.approx(once.survival(t), rel=1e-6)


def test_residual_after_the_last_event_is_the_tail() -> None:
    curve = kaplan_meier([1.0, 2.0, 3.0], [True, True, False])
    late = curve.residual(10.0)
    assert late.times == ()
    assert late.survival(10.0) == pytest.approx(0.5)
    # Every gap seen was shorter: the longer the wait already was, the longer it will still be.
    gone = kaplan_meier([1.0, 2.0], [True, True]).residual(4.0)
    assert gone.survival(4.0) == pytest.approx(0.5)


@given(observations, st.floats(0.0, 1e4))
def test_restricted_mean_is_the_integral_of_survival(
    samples: list[tuple[float, bool]], horizon: float
) -> None:
    curve = _curve(samples, TOOL_PRIOR)
    edges = [t for t in (0.0, *curve.times) if t < horizon] + [horizon]
    total = sum(curve.survival(a) * (b - a) for a, b in pairwise(edges) if b <= curve.last_s)
    if horizon > curve.last_s:
        n = 2000
        ratio = (horizon / curve.last_s) ** (1 / n)
        points = [curve.last_s * ratio**i for i in range(n + 1)]
        total += sum(
            (curve.survival(a) + curve.survival(b)) / 2 * (b - a) for a, b in pairwise(points)
        )
    assert curve.mean_restricted(horizon) == pytest.approx(total, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_tail_integral_for_every_exponent(alpha: float) -> None:
    curve = SurvivalCurve((2.0,), (0.5,), alpha)
    width = 1e-3
    total = sum(curve.survival(2.0 + (i + 0.5) * width) * width for i in range(20_000))
    assert curve.tail_integral(22.0) == pytest.approx(total, rel=1e-4)


def test_quantiles() -> None:
    curve = kaplan_meier([1.0, 2.0, 3.0, 4.0], [True, True, True, False])
    assert curve.quantile(0.0) == 0.0
    assert curve.quantile(0.25) == 1.0
    assert curve.quantile(0.75) == 3.0
    # Tail: S = 0.25 * 3 / t = 0.1.
    assert curve.quantile(0.9) == pytest.approx(7.5)
    assert curve.quantile(1.0) == math.inf
    assert SurvivalCurve((), ()).quantile(0.5) == math.inf
    with pytest.raises(ValueError, match="q must"):
        curve.quantile(1.5)


def test_hazard_of_an_exponential_is_flat() -> None:
    n = 2000
    times = [-math.log(1 - (i + 0.5) / n) / 0.2 for i in range(n)]
    curve = kaplan_meier(times, [True] * n)
    for t in (1.0, 3.0, 6.0):
        assert curve.hazard(t) == pytest.approx(0.2, rel=0.15)
    assert SurvivalCurve((1.0,), (0.0,)).hazard(5.0) == 0.0
    assert SurvivalCurve((1.0,), (0.5,), 1.0).hazard(100.0) == pytest.approx(0.01, rel=0.1)


def test_empty_history_and_infinite_gaps() -> None:
    never = kaplan_meier([math.inf, math.inf], [True, True])
    assert never.survival(1e9) == 1.0
    assert never.residual(10.0).survival(1e9) == 1.0
    assert never.mean_restricted(10.0) == 10.0
    assert kaplan_meier([], []).survival(5.0) == 1.0
    prior_only = kaplan_meier([], [], prior=TOOL_PRIOR)
    assert 1.0 < prior_only.quantile(0.5) < 4.0
    with pytest.raises(ValueError, match=">= 0"):
        kaplan_meier([-1.0], [True])
    with pytest.raises(ValueError, match="flags"):
        kaplan_meier([1.0], [])


def test_prior_hits_its_quantiles_and_yields_to_data() -> None:
    prior = lognormal_curve(2.0, 30.0)
    assert prior.quantile(0.5) == pytest.approx(2.0, rel=0.05)
    assert prior.quantile(0.9) == pytest.approx(30.0, rel=0.12)
    curve = kaplan_meier([100.0] * 200, [True] * 200, prior=prior, prior_weight=4.0)
    assert curve.survival(99.0) > 0.97
    assert 0.0 < curve.survival(101.0) < 0.02
    with pytest.raises(ValueError, match="median_s"):
        lognormal_curve(3.0, 2.0)


@given(st.lists(st.floats(0.01, 1e4), min_size=100, max_size=1000))
def test_thinning_keeps_the_curve(times: list[float]) -> None:
    curve = kaplan_meier(times, [True] * len(times))
    assert len(curve.times) <= 68
    for t in sorted(times)[:: len(times) // 20]:
        exact = sum(other > t for other in times) / len(times)
        # Too high by less than the widest distance between two levels that keep a step.
        assert exact - 1e-9 <= curve.survival(t) <= exact + max(-np.diff(_LEVELS))


def test_book_falls_back_from_tool_to_pool_to_prior() -> None:
    book = GapBook(min_tool_events=16)
    assert book.curve("bash").quantile(0.5) == pytest.approx(TOOL_PRIOR.quantile(0.5), rel=0.3)
    for _ in range(40):
        book.record("search", 50.0)
    assert book.curve("never seen").survival(49.0) > 0.8
    for _ in range(15):
        book.record("bash", 0.1)
    assert book.curve("bash").survival(40.0) > 0.5, "15 returns: still the pool"
    book.record("bash", 0.1)
    assert book.curve("bash").survival(1.0) < 0.25, "16 returns: its own"


def test_human_turns_are_kept_apart() -> None:
    book = GapBook()
    for _ in range(100):
        book.record(None, 1000.0)
    assert book.curve("bash").quantile(0.5) < 5.0
    assert book.curve(None).quantile(0.5) == 1000.0
    assert GapBook().curve(None).quantile(0.5) == pytest.approx(TURN_PRIOR.quantile(0.5), rel=0.4)


def test_censored_records_lengthen_the_curve_and_are_not_returns() -> None:
    plain, censored = GapBook(), GapBook()
    for _ in range(30):
        plain.record("bash", 1.0)
        censored.record("bash", 1.0)
        censored.record_censored("bash", 60.0)
    assert censored.curve("bash").survival(10.0) > plain.curve("bash").survival(10.0) + 0.3
    only = GapBook()
    for _ in range(50):
        only.record_censored("bash", 1e-3)
    assert only.curve("bash") == only.curve("other"), "no return seen: the pool's curve"


def test_book_is_bounded_and_keeps_recent_tools() -> None:
    book = GapBook(max_tools=8, tool_window=4, pool_window=16)
    for i in range(100):
        book.record(f"tool-{i}" * 1000, 1.0)
        book.record("steady", 1.0)
    assert book.n_tools == 8
    book.curve("unknown")
    assert book.n_tools == 8
    kept = GapBook(max_tools=8)
    for i in range(100):
        kept.record(f"tool-{i}", 100.0)
        kept.record("steady", 1.0)
    assert kept.curve("steady").survival(50.0) < 0.1 < kept.curve("tool-0").survival(50.0)
    small = GapBook(tool_window=4, min_tool_events=2)
    for seconds in (1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0):
        small.record("x", seconds)
    assert small.curve("x").survival(8.0) > 0.6, "the old gaps have left the window"


def test_window_counts_returns_that_leave_it() -> None:
    book = GapBook(tool_window=16, min_tool_events=16)
    for _ in range(16):
        book.record("x", 0.5)
    own = book.curve("x")
    assert own != book.curve("other")
    book.record_censored("x", 1.0)
    assert book.curve("x") == book.curve("other")


def test_curves_are_rebuilt_at_bounded_rate_but_follow() -> None:
    book = GapBook()
    for _ in range(400):
        book.record("bash", 1.0)
    before = book.curve("bash")
    for _ in range(31):
        book.record("bash", 500.0)
    assert book.curve("bash") is before
    book.record("bash", 500.0)
    assert book.curve("bash").survival(100.0) > before.survival(100.0)


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_book_rejects_nonsense(seconds: float) -> None:
    with pytest.raises(ValueError, match="gap"):
        GapBook().record("x", seconds)
    with pytest.raises(ValueError, match="gap"):
        GapBook().record_censored(None, seconds)
