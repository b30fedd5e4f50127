"""Link, prefill and queue estimators."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.costs.estimators import (
    GenerationEstimator,
    PrefillEstimator,
    PrefillModel,
    QueueEstimator,
    Thinning,
)
from kvtier.costs.link_model import LinkEstimator, LinkModel

LINK = LinkModel(1e-3, ((4096, 1e9), (65536, 8e9)))
PREFILL = PrefillModel(0.01, 1e-4, 2e-9)
positive = st.integers(1, 10**9)


def test_link_interpolates_in_log_log_and_clamps() -> None:
    assert LINK.bytes_per_s(1) == 1e9
    assert LINK.bytes_per_s(10**9) == 8e9
    # 16384 is half way between 4096 and 65536 in log space: the geometric mean of the rates.
    assert LINK.bytes_per_s(16384) == pytest.approx(math.sqrt(8.0) * 1e9)
    assert LINK.seconds(8_000_000_000, 65536) == pytest.approx(1.001)
    assert LINK.seconds(4_000_000_000, 65536, 4_000_000_000) == pytest.approx(1.001)
    assert LINK.seconds(0, 65536, 10**9) == 0.0


@given(positive, positive, positive, positive)
def test_link_time_grows_with_bytes_and_backlog(a: int, b: int, run: int, backlog: int) -> None:
    small, large = sorted((a, b))
    assert LINK.seconds(small, run, backlog) <= LINK.seconds(large, run, backlog)
    assert LINK.seconds(small, run) <= LINK.seconds(small, run, backlog)


@pytest.mark.parametrize(
    ("latency_s", "points"),
    [
        (0.0, ()),
        (-1.0, ((1, 1.0),)),
        (math.nan, ((1, 1.0),)),
        (0.0, ((2, 1.0), (1, 1.0))),
        (0.0, ((1, 0.0),)),
    ],
)
def test_link_rejects_nonsense(latency_s: float, points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match=r"link model|latency_s|points"):
        LinkModel(latency_s, points)


def test_link_estimator_recovers_latency_and_rate() -> None:
    estimator = LinkEstimator(LINK)
    rng = random.Random(1)
    for _ in range(200):
        n_bytes = rng.randrange(1_000_000, 200_000_000)
        estimator.observe(n_bytes, 65536, 5e-3 + n_bytes / 2e9)
    model = estimator.model()
    assert model.latency_s == pytest.approx(5e-3, rel=0.05)
    assert model.bytes_per_s(65536) == pytest.approx(2e9, rel=0.02)
    # The shape over run sizes is the calibrated one.
    assert model.bytes_per_s(4096) == pytest.approx(0.25e9, rel=0.02)


def test_link_estimator_scales_the_curve_when_all_transfers_are_alike() -> None:
    estimator = LinkEstimator(LINK)
    for _ in range(60):
        estimator.observe(8_000_000, 65536, 2 * LINK.seconds(8_000_000, 65536))
    model = estimator.model()
    assert model.latency_s == pytest.approx(2e-3, rel=0.15)
    assert model.seconds(80_000_000, 65536) == pytest.approx(0.022, rel=0.1)


@pytest.mark.parametrize("factor", [1000.0, 0.001])
def test_one_outlier_does_not_wreck_the_link(factor: float) -> None:
    estimator = LinkEstimator(LINK)
    rng = random.Random(2)
    for _ in range(50):
        n_bytes = rng.randrange(1_000_000, 200_000_000)
        estimator.observe(n_bytes, 65536, LINK.seconds(n_bytes, 65536))
    estimator.observe(100_000_000, 65536, factor * LINK.seconds(100_000_000, 65536))
    predicted_s = estimator.model().seconds(100_000_000, 65536)
    assert predicted_s == pytest.approx(LINK.seconds(100_000_000, 65536), rel=0.25)


@pytest.mark.parametrize("factor", [0.2, 3.0, 10.0])
def test_a_wrong_start_is_corrected_without_overshooting(factor: float) -> None:
    estimator = LinkEstimator(LINK)
    rng = random.Random(4)
    for i in range(120):
        n_bytes = rng.randrange(20_000_000, 100_000_000)
        seconds = factor * LINK.seconds(n_bytes, 65536) * rng.uniform(0.98, 1.02)
        ratio = estimator.model().seconds(n_bytes, 65536) / seconds
        assert min(1.0, 1 / factor) / 1.3 < ratio < max(1.0, 1 / factor) * 1.3
        assert i < 60 or 1 / 1.3 < ratio < 1.3
        estimator.observe(n_bytes, 65536, seconds)


def test_a_few_small_transfers_among_large_ones_tell_the_latency() -> None:
    true = LinkModel(2e-3, LINK.points)
    estimator = LinkEstimator(LinkModel(1e-4, LINK.points))
    rng = random.Random(5)
    for _ in range(100):
        n_bytes = 1 << 20 if rng.random() < 0.2 else 256 << 20
        estimator.observe(n_bytes, 65536, true.seconds(n_bytes, 65536) * rng.uniform(0.98, 1.02))
    predicted_s = estimator.model().seconds(1 << 20, 65536)
    assert predicted_s == pytest.approx(true.seconds(1 << 20, 65536), rel=0.1)


def test_the_first_transfers_are_believed_when_enough_of_them_agree() -> None:
    estimator = LinkEstimator(LINK)
    n_bytes = 30_000_000
    calibrated_s = LINK.seconds(n_bytes, 65536)
    for _ in range(2):
        estimator.observe(n_bytes, 65536, 5 * calibrated_s)
        assert estimator.model().seconds(n_bytes, 65536) <= 1.25 * calibrated_s
    for _ in range(14):
        estimator.observe(n_bytes, 65536, 1.5 * calibrated_s)
    assert estimator.model().seconds(n_bytes, 65536) == pytest.approx(1.5 * calibrated_s, rel=0.1)


def test_what_is_predicted_is_a_transfer_that_nothing_interrupts() -> None:
    """One in four takes two to three times as long, as beside a busy engine on a CPU."""
    estimator = LinkEstimator(LINK)
    rng = random.Random(3)
    errors = []
    for _ in range(200):
        n_bytes = rng.randrange(20_000_000, 100_000_000)
        seconds = 0.8 * LINK.seconds(n_bytes, 65536) * rng.uniform(0.95, 1.05)
        if rng.random() < 0.25:
            seconds *= rng.uniform(2.0, 3.0)
        errors.append(abs(estimator.model().seconds(n_bytes, 65536) / seconds - 1))
        estimator.observe(n_bytes, 65536, seconds)
    assert statistics.median(errors[20:]) < 0.1


def test_a_lasting_change_of_the_link_is_followed() -> None:
    estimator = LinkEstimator(LINK)
    for _ in range(50):
        estimator.observe(100_000_000, 65536, LINK.seconds(100_000_000, 65536))
    for _ in range(120):
        estimator.observe(100_000_000, 65536, 20 * LINK.seconds(100_000_000, 65536))
    predicted_s = estimator.model().seconds(100_000_000, 65536)
    assert predicted_s == pytest.approx(20 * LINK.seconds(100_000_000, 65536), rel=0.1)


@given(
    st.lists(
        st.tuples(positive, positive, st.floats(0.0, 1e6)),
        min_size=1,
        max_size=30,
    )
)
def test_link_estimator_always_yields_a_usable_model(
    samples: list[tuple[int, int, float]],
) -> None:
    estimator = LinkEstimator(LINK)
    for n_bytes, run_bytes, seconds in samples:
        estimator.observe(n_bytes, run_bytes, seconds)
    model = estimator.model()
    assert 0.0 <= model.latency_s <= 10.0
    assert 8e9 / 65 <= model.bytes_per_s(65536) <= 8e9 * 65


@pytest.mark.parametrize("sample", [(0, 1, 1.0), (1, 1, -1.0), (1, 1, math.nan), (1, 1, math.inf)])
def test_link_estimator_rejects_nonsense(sample: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match=r"n_bytes|seconds"):
        LinkEstimator(LINK).observe(*sample)


def test_prefill_from_flops_counts_operations() -> None:
    model = PrefillModel.from_flops(8e9, 32, 4096, 4e14)
    cached, new = 20_000, 3_000
    flops = 2 * 8e9 * new + 4 * 32 * 4096 * new * (cached + new / 2)
    assert model.seconds(cached, new) == pytest.approx(flops / 4e14)
    assert model.seconds(cached, 0) == 0.0
    with pytest.raises(ValueError, match="flops_per_s"):
        PrefillModel.from_flops(1.0, 1, 1, 0.0)


def test_prefill_in_pieces_costs_what_it_costs_at_once() -> None:
    model = PrefillModel.from_flops(8e9, 32, 4096, 4e14)
    pieces = sum(model.seconds(cached, 500) for cached in range(0, 5000, 500))
    assert pieces == pytest.approx(model.seconds(0, 5000))


def test_prefill_estimator_recovers_a_quadratic_under_noise() -> None:
    truth = PrefillModel(0.03, 4e-4, 5e-8)
    estimator = PrefillEstimator(PREFILL)
    rng = random.Random(3)
    for _ in range(400):
        cached, new = rng.randrange(0, 60_000), rng.randrange(16, 16_000)
        estimator.observe(cached, new, truth.seconds(cached, new) * rng.uniform(0.95, 1.05))
    for cached, new in [(0, 2000), (0, 16_000), (50_000, 200), (50_000, 10_000)]:
        assert estimator.model().seconds(cached, new) == pytest.approx(
            truth.seconds(cached, new), rel=0.12
        )


def test_prefill_estimator_keeps_the_scaled_initial_shape_without_spread() -> None:
    estimator = PrefillEstimator(PREFILL)
    for _ in range(80):
        estimator.observe(0, 2048, 3 * PREFILL.seconds(0, 2048))
    model = estimator.model()
    # Never seen: no cached token before; and eight times as many new ones.
    assert model.seconds(30_000, 2048) == pytest.approx(3 * PREFILL.seconds(30_000, 2048), rel=0.15)
    assert model.seconds(0, 16_384) == pytest.approx(3 * PREFILL.seconds(0, 16_384), rel=0.15)


def test_long_prompts_are_known_from_the_steps_they_take() -> None:
    """A step takes 8,192 tokens at most: what 100,000 take is only ever seen in pieces, and beside requests that decode."""
    truth = PrefillModel.from_flops(70e9, 80, 8192, 1.6e15)
    estimator = PrefillEstimator(PrefillModel.from_flops(70e9, 80, 8192, 3e14))
    rng = random.Random(5)
    for n_prompts in range(40):
        prompt = rng.randrange(1000, 100_000)
        for cached in range(0, prompt, 8192):
            new = min(8192, prompt - cached)
            decoding_s = rng.uniform(0.0, 0.03)
            estimator.observe(cached, new, truth.seconds(cached, new) + decoding_s)
        for tokens in (8192, 20_000, 50_000, 100_000) if n_prompts >= 5 else ():
            assert estimator.model().seconds(0, tokens) == pytest.approx(
                truth.seconds(0, tokens), rel=0.25
            )


def test_prefill_outlier_is_bounded() -> None:
    estimator = PrefillEstimator(PREFILL)
    rng = random.Random(4)
    for _ in range(60):
        cached, new = rng.randrange(0, 60_000), rng.randrange(16, 16_000)
        estimator.observe(cached, new, PREFILL.seconds(cached, new))
    estimator.observe(0, 4000, 500.0)
    assert estimator.model().seconds(0, 4000) == pytest.approx(PREFILL.seconds(0, 4000), rel=0.35)


@given(
    st.lists(
        st.tuples(st.integers(0, 200_000), st.integers(1, 50_000), st.floats(0.0, 1e4)),
        min_size=1,
        max_size=20,
    )
)
def test_prefill_coefficients_stay_non_negative(samples: list[tuple[int, int, float]]) -> None:
    estimator = PrefillEstimator(PREFILL)
    for sample in samples:
        estimator.observe(*sample)
    assert all(value >= 0.0 for value in estimator.model().coefficients)


def test_prefill_estimator_rejects_nonsense() -> None:
    with pytest.raises(ValueError, match="all zero"):
        PrefillEstimator(PrefillModel(0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="new_tokens"):
        PrefillEstimator(PREFILL).observe(0, 0, 1.0)
    with pytest.raises(ValueError, match="coefficients"):
        PrefillModel(-1.0, 0.0, 0.0)


def test_queue_throughput_is_that_of_full_steps() -> None:
    queue = QueueEstimator(initial_tokens_per_s=100.0)
    for _ in range(50):
        queue.observe_step(4096, 0.4)
        for _ in range(20):
            queue.observe_step(8, 0.03)
        queue.observe_step(0, 5.0)
    assert queue.throughput_tokens_per_s == pytest.approx(10_240, rel=0.05)
    assert queue.delay_s(20_480) == pytest.approx(2.0, rel=0.05)
    assert queue.delay_s(0) == 0.0


def test_queue_correction_follows_waits_and_is_bounded() -> None:
    queue = QueueEstimator(initial_tokens_per_s=1000.0)
    for _ in range(60):
        queue.observe_wait(queue.delay_s(4000), 8.0)
    assert queue.delay_s(4000) == pytest.approx(8.0, rel=0.02)
    before = queue.correction
    queue.observe_wait(1e-6, 1e6)
    assert queue.correction <= before * 1.16
    for _ in range(1000):
        queue.observe_wait(0.0, 1e9)
    assert queue.correction == pytest.approx(8.0)
    for _ in range(1000):
        queue.observe_wait(1e9, 0.0)
    assert queue.correction == pytest.approx(1 / 8)


def test_queue_survives_a_stalled_step() -> None:
    queue = QueueEstimator()
    for _ in range(100):
        queue.observe_step(4096, 0.4)
    queue.observe_step(8, 3600.0)
    assert queue.throughput_tokens_per_s > 8000


def test_queue_rejects_nonsense() -> None:
    with pytest.raises(ValueError, match="initial_tokens_per_s"):
        QueueEstimator(0.0)
    with pytest.raises(ValueError, match="seconds"):
        QueueEstimator().observe_step(1, math.nan)


def test_a_turns_output_costs_its_share_of_decode_steps() -> None:
    generation = GenerationEstimator()
    generation.observe_turn(100)
    assert generation.turn_s() == 0.0, "no step was seen"
    for _ in range(20):
        generation.observe_step(4, 0.08)
    assert generation.turn_s() == pytest.approx(100 * 0.02)
    for _ in range(300):
        generation.observe_turn(50)
    assert generation.turn_s() == pytest.approx(50 * 0.02, rel=0.01), "the past fades"
    with pytest.raises(ValueError, match="tokens"):
        generation.observe_step(0, 0.1)


def test_thinning_takes_the_first_and_then_every_so_manieth() -> None:
    thinning = Thinning(every=3, first=2)
    taken = [thinning.takes() for _ in range(9)]
    assert taken == [True, True, False, False, True, False, False, True, False]
