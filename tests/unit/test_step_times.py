"""Step durations with one or two steps in flight, and results of several ranks."""

from __future__ import annotations

from itertools import permutations

import pytest

from kvtier.orders import OrderResult
from kvtier.turns.engine_facts import StepFacts
from kvtier.turns.step_times import MAX_STEPS_IN_FLIGHT, RankResults, StepTimes


def test_one_step_after_the_other() -> None:
    times = StepTimes()
    for built_s, ended_s in ((10.0, 10.5), (12.0, 12.25)):
        step = StepFacts(scheduled_tokens=7)
        assert times.ended(times.scheduled(step, built_s), ended_s) == (step, ended_s - built_s)


def test_a_step_begins_when_the_one_before_ends() -> None:
    times = StepTimes()
    first, second, third = (StepFacts(scheduled_tokens=n) for n in (1, 2, 3))
    ids = [times.scheduled(first, 0.0), times.scheduled(second, 0.1)]
    assert times.ended(ids[0], 1.0) == (first, 1.0)
    ids.append(times.scheduled(third, 1.1))
    assert times.ended(ids[1], 1.5) == (second, 0.5)
    assert times.ended(ids[2], 2.0) == (third, 0.5)


@pytest.mark.parametrize("n_silent", [1, MAX_STEPS_IN_FLIGHT - 1, 3 * MAX_STEPS_IN_FLIGHT])
def test_steps_without_a_report_do_not_shift_the_others(n_silent: int) -> None:
    times = StepTimes()
    for n in range(n_silent):
        times.scheduled(StepFacts(), float(n))
    step = StepFacts(scheduled_tokens=8000)
    step_id = times.scheduled(step, 100.0)
    after = times.scheduled(StepFacts(scheduled_tokens=1), 100.1)
    assert times.ended(step_id, 102.0) == (step, 2.0)
    ended = times.ended(after, 102.02)
    assert ended is not None
    assert (ended[0].scheduled_tokens, ended[1]) == (1, pytest.approx(0.02))


def test_an_end_without_a_step_is_no_step() -> None:
    times = StepTimes()
    assert times.ended(0, 1.0) is None
    assert times.ended(7, 1.0) is None
    step = StepFacts()
    assert times.ended(times.scheduled(step, 1.5), 2.0) == (step, 0.5)


def test_steps_that_never_end_are_forgotten() -> None:
    times = StepTimes()
    ids = [times.scheduled(StepFacts(), 0.0) for _ in range(MAX_STEPS_IN_FLIGHT + 3)]
    assert times.ended(ids[0], 1.0) is None
    assert times.ended(ids[-1], 1.0) is not None


def result(order_id: int, seconds: float = 0.1, *, ok: bool = True) -> OrderResult:
    error = "" if ok else f"failed after {seconds}"
    return OrderResult(order_id, "store", ok, 100, seconds, 50, error)


def test_one_rank_is_complete_at_once() -> None:
    assert list(RankResults(1).complete([result(1), result(2)])) == [result(1), result(2)]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_an_order_counts_when_all_ranks_have_reported(order: tuple[int, ...]) -> None:
    collected = RankResults(3)
    reports = [result(1, 0.1), result(1, 0.3), result(1, 0.2)]
    shuffled = [reports[i] for i in order]
    assert list(collected.complete(shuffled[:2])) == []
    (merged,) = collected.complete(shuffled[2:])
    assert merged == OrderResult(1, "store", True, 300, 0.3, 50)
    assert list(collected.complete([])) == []
    assert collected._partial == {}


def test_one_failed_rank_fails_the_order() -> None:
    (merged,) = RankResults(2).complete([result(1), result(1, 0.5, ok=False)])
    assert not merged.ok
    assert merged.error == "failed after 0.5"
    assert (merged.n_bytes, merged.seconds) == (200, 0.5)


def test_orders_do_not_mix() -> None:
    collected = RankResults(2)
    done = [r.order_id for r in collected.complete([result(1), result(2), result(3), result(2)])]
    assert done == [2]
    assert [r.order_id for r in collected.complete([result(3), result(1)])] == [3, 1]
