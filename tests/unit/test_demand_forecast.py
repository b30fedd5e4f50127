"""The forecast: programs grow, end and pause, and what they will want follows."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtier.demand_forecast import (
    AHEAD_TURNS,
    DECAY,
    EXACT,
    PRIOR_GROWTH,
    PRIOR_GROWTH_TURNS,
    STALE_S,
    DemandForecast,
)
from kvtier.shared_blocks import Beginning, beginning


def turn(
    forecast: DemandForecast[str],
    program: str,
    blocks: tuple[int, int],
    *,
    at_s: float = 0.0,
    turn_s: float = 10.0,
    gap_s: float = 0.0,
    goes_on: bool = True,
) -> None:
    """A whole turn, from a prompt of so many blocks to a context of so many."""
    forecast.turn_waits(program, at_s)
    forecast.turn_starts(program, blocks[0], at_s)
    forecast.turn_ends(program, blocks[1], at_s + turn_s, goes_on=goes_on, gap_s=gap_s)


def episode(
    forecast: DemandForecast[str],
    program: str,
    n_turns: int,
    *,
    at_s: float = 0.0,
    growth: int = 10,
) -> None:
    """A whole episode, without pauses."""
    for i in range(n_turns):
        blocks = 10 + growth * i, 10 + growth * (i + 1)
        turn(forecast, program, blocks, at_s=at_s + 10.0 * i, goes_on=i + 1 < n_turns)


def test_where_nothing_is_known_a_program_grows_by_a_part_of_its_prompt() -> None:
    forecast: DemandForecast[str] = DemandForecast()
    lasting = forecast._estimate()
    wanted = max(100 * (1 + PRIOR_GROWTH * d) * lasting[d] for d in AHEAD_TURNS)
    assert 110 < wanted < 300
    assert forecast.peak_blocks(100, 0.0) == pytest.approx(wanted, rel=1e-6)


INSTRUCTIONS = [b"%d" % i for i in range(90)]


def begins(program: int, *, alike: bool = True) -> Beginning:
    """100 blocks, of which programs that are alike share 90."""
    own = [b"%d %d" % (program, block) for block in range(100)]
    return beginning([*INSTRUCTIONS, *own[90:]] if alike else own)


def test_what_programs_share_is_wanted_once() -> None:
    alike: DemandForecast[str] = DemandForecast()
    strangers: DemandForecast[str] = DemandForecast()
    for i in range(10):
        alike.turn_starts(f"p{i}", 100, 0.0, begins(i))
        strangers.turn_starts(f"p{i}", 100, 0.0, begins(i, alike=False))
    found = alike.repeated_blocks(begins(99))
    assert 80 <= found <= 90
    assert strangers.repeated_blocks(begins(99)) == 0
    apart = strangers.peak_blocks(100, 0.0)
    together = alike.peak_blocks(100, 0.0, repeated_blocks=found)
    # When contexts are largest, half of the programs have ended: five times the instructions, of which one counts.
    assert together < apart - 2 * found
    assert together > 11 * 10 + found
    for i in range(10):
        alike.program_ends(f"p{i}")
    assert alike.repeated_blocks(begins(99)) == 0


kinds = st.tuples(st.booleans(), st.sampled_from([0.0, 1.0, 100.0, 10_000.0]))


@settings(deadline=None)
@given(st.lists(kinds, max_size=30), kinds)
@example([(True, 1.0)], (True, 10_000.0))
def test_with_one_program_more_hardly_less_is_wanted(
    programs: list[tuple[bool, float]], another: tuple[bool, float]
) -> None:
    """Whoever has something in common with whom, and however long each is away.

    Not never: the second one that shares, even if it hardly runs, tells that what the first one has is shared.
    """
    lasting = DemandForecast[str]()._estimate()

    def peak_blocks(programs: list[tuple[bool, float]]) -> float:
        forecast: DemandForecast[str] = DemandForecast()
        for number, (alike, gap_s) in enumerate(programs):
            forecast.turn_starts(str(number), 100, 0.0, begins(number, alike=alike))
            if gap_s:
                forecast.turn_ends(str(number), 100, 10.0, goes_on=True, gap_s=gap_s)
        forecast._turn_s.add(10.0)
        # How long episodes last, and how much they grow, is not what is asked here.
        forecast._lasting, forecast._estimated_s = lasting, 10.0
        forecast._see_what_repeats()
        repeated_blocks = forecast.repeated_blocks(begins(99))
        return forecast.peak_blocks(100, 10.0, repeated_blocks=repeated_blocks)

    assert peak_blocks([*programs, another]) >= peak_blocks(programs) * 0.97


def test_who_grows_will_want_more() -> None:
    forecast: DemandForecast[str] = DemandForecast()
    for i in range(4):
        turn(forecast, "A", (10 + 50 * i, 50 + 50 * i), at_s=10.0 * i)
    alone = forecast.peak_blocks(0, 40.0)
    # 200 blocks now and 50 more a turn; the new program is expected to grow alike.
    assert 300 < alone < 1000
    turn(forecast, "A", (1210, 1250), at_s=40.0)
    assert forecast.peak_blocks(0, 50.0) > alone + 1000


def test_the_peak_is_that_of_the_formula() -> None:
    forecast: DemandForecast[str] = DemandForecast()
    # Twenty episodes of 3 turns: S is near 1 up to 2 turns, and small from 3 on.
    for i in range(20):
        episode(forecast, f"old{i}", 3, at_s=100.0 * i)
    turn(forecast, "A", (10, 40), at_s=3000.0)
    lasting = forecast._estimate()
    assert lasting[2] > 0.9
    assert lasting[3] < 0.2
    # Each of them has grown by 10 blocks in both of its later turns.
    seen = sum(DECAY**i for i in range(40))
    known = seen / (seen + PRIOR_GROWTH_TURNS)
    mine, newcomers = (known * 10 + (1 - known) * PRIOR_GROWTH * blocks for blocks in (40, 15))
    wanted = [
        (40 + mine * d) * lasting[1 + d] / lasting[1]
        + (15 + newcomers * d) * lasting[d] / lasting[0]
        for d in AHEAD_TURNS
    ]
    assert forecast.peak_blocks(15, 3010.0) == pytest.approx(max(wanted), rel=1e-6)


def test_episodes_that_end_early_leave_room() -> None:
    short: DemandForecast[str] = DemandForecast()
    long: DemandForecast[str] = DemandForecast()
    for i in range(20):
        episode(short, f"s{i}", 2, at_s=1000.0 * i)
        episode(long, f"l{i}", 30, at_s=1000.0 * i)
    assert short.peak_blocks(100, 50_000.0) < 130
    assert long.peak_blocks(100, 50_000.0) > 250


def test_episodes_under_way_are_known_to_last() -> None:
    forecast: DemandForecast[str] = DemandForecast()
    for i in range(30):
        turn(forecast, f"p{i}", (10, 20))
    assert forecast._estimate()[20] < 0.6
    for i in range(30):
        for k in range(1, 21):
            turn(forecast, f"p{i}", (10 + 10 * k, 20 + 10 * k), at_s=10.0 * k)
    assert forecast._estimate()[20] > 0.9


def test_who_is_away_for_longer_counts_less() -> None:
    forecast: DemandForecast[str] = DemandForecast()
    for i in range(50):
        turn(forecast, "B", (10, 10), at_s=11.0 * i)
    forecast.program_ends("B")
    turn(forecast, "A", (100, 1000), gap_s=10.0)
    at_once = forecast.peak_blocks(1, 10.0)
    later = forecast.peak_blocks(1, 110.0)
    assert at_once == pytest.approx(500, rel=0.1)
    assert later == pytest.approx(91, rel=0.1)
    # It is back, and waits: whether its turn has begun makes no difference.
    forecast.turn_waits("A", 110.0)
    assert forecast.peak_blocks(1, 110.0) > 5 * later


def test_an_answer_ends_the_episode() -> None:
    forecast: DemandForecast[str] = DemandForecast()
    turn(forecast, "A", (100, 1000), goes_on=False)
    assert len(forecast) == 0
    assert forecast.peak_blocks(10, 20.0) < 20


def test_a_sub_agents_answer_does_not_end_the_episode_of_its_program() -> None:
    forecast: DemandForecast[str] = DemandForecast()
    forecast.turn_starts("A", 100, 0.0)
    forecast.turn_starts("A", 50, 0.0)
    forecast.turn_ends("A", 60, 5.0, goes_on=False, gap_s=0.0)
    assert len(forecast) == 1
    forecast.turn_ends("A", 110, 9.0, goes_on=False, gap_s=0.0)
    assert len(forecast) == 0


def test_what_vanishes_leaves_nothing_running() -> None:
    forecast: DemandForecast[str] = DemandForecast()
    turn(forecast, "A", (100, 1000), gap_s=10.0)
    paused = forecast.peak_blocks(1, 110.0)
    forecast.turn_waits("A", 100.0)
    forecast.turn_vanishes("A", 20.0, started=False)
    forecast.turn_waits("A", 100.0)
    forecast.turn_starts("A", 1000, 100.0)
    forecast.turn_vanishes("A", 20.0, started=True)
    assert forecast.peak_blocks(1, 110.0) < 1.5 * paused


def test_the_estimate_is_made_anew_once_a_second_at_most() -> None:
    forecast: DemandForecast[str] = DemandForecast()
    n_made = 0
    make = forecast._estimate

    def counted() -> object:
        nonlocal n_made
        n_made += 1
        return make()

    forecast._estimate = counted  # type: ignore[method-assign, assignment]
    for i in range(10):
        forecast.peak_blocks(1, 100.0 + i * STALE_S / 10)
    assert n_made == 1
    forecast.peak_blocks(1, 101.0)
    assert n_made == 2


def crowd(n_programs: int) -> DemandForecast[str]:
    """Programs of one turn each, at time 10."""
    forecast: DemandForecast[str] = DemandForecast()
    for i in range(n_programs):
        turn(forecast, f"p{i}", (10 + i, 20 + i))
    return forecast


def test_of_many_programs_those_are_looked_at_to_which_something_has_happened() -> None:
    forecast = crowd(5000)
    looked_at = 0
    wanted = forecast._wanted_by

    def counted(columns: Any, *rest: Any) -> Any:
        nonlocal looked_at
        looked_at += columns.shape[1]
        return wanted(columns, *rest)

    forecast._wanted_by = counted  # type: ignore[method-assign]
    forecast.peak_blocks(1, 100.0)
    assert looked_at == 5000 + 1
    looked_at = 0
    for i in range(100):
        forecast.turn_waits(f"p{i}", 100.0 + i / 1000)
        forecast.turn_starts(f"p{i}", 40, 100.0 + i / 1000)
        forecast.program_ends(f"p{i + 1000}")
        forecast.peak_blocks(1, 100.0 + i / 1000)
    assert looked_at == 100 * 2
    forecast.peak_blocks(1, 100.0 + STALE_S)
    assert looked_at == 100 * 2 + 4900 + 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_the_sum_of_many_is_what_it_would_be_if_it_were_made_anew(seed: int) -> None:
    chance = random.Random(seed)
    forecast = crowd(3 * EXACT)
    forecast.peak_blocks(1, 100.0)
    for _ in range(chance.randrange(30)):
        program = f"p{chance.randrange(4 * EXACT)}"
        match chance.randrange(3):
            case 0:
                # The means that all share have not changed.
                forecast.turn_waits(program, 100.0)
                forecast._gap_s = type(forecast._gap_s)()
            case 1:
                forecast.turn_starts(program, chance.randrange(500), 100.0)
            case _:
                forecast.program_ends(program)
        if chance.random() < 0.5:
            forecast.peak_blocks(1, 100.0)
    kept = forecast.peak_blocks(1, 100.0)
    forecast._forget_sum()
    assert kept == pytest.approx(forecast.peak_blocks(1, 100.0), rel=1e-9)


def test_a_sum_that_nobody_asks_for_is_not_kept() -> None:
    forecast = crowd(3 * EXACT)
    forecast.peak_blocks(1, 100.0)
    for i in range(10 * EXACT):
        turn(forecast, f"n{i}", (10, 20), at_s=100.0, goes_on=False)
    assert not forecast._terms
    assert not forecast._changed


_EVENTS = (
    "waits",
    "starts",
    "ends",
    "answers",
    "vanishes",
    "vanishes waiting",
    "program ends",
    "ask",
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(_EVENTS), max_size=80), st.integers(0, 2**32))
def test_whatever_happens_the_forecast_is_a_number(events: list[str], seed: int) -> None:
    chance = random.Random(seed)
    forecast: DemandForecast[str] = DemandForecast()
    now_s = 0.0
    for event in events:
        program = f"p{chance.randrange(3)}"
        blocks = chance.choice((0, 1, 10, 10_000))
        now_s += chance.choice((0.0, 0.1, 3.0, 5000.0))
        match event:
            case "waits":
                forecast.turn_waits(program, now_s)
            case "starts":
                forecast.turn_starts(program, blocks, now_s)
            case "ends" | "answers":
                forecast.turn_ends(program, blocks, now_s, goes_on=event == "ends", gap_s=2.0)
            case "vanishes" | "vanishes waiting":
                forecast.turn_vanishes(program, now_s, started=event == "vanishes")
            case "program ends":
                forecast.program_ends(program)
        peak = forecast.peak_blocks(blocks, now_s)
        assert math.isfinite(peak)
        assert peak >= 0
    for i in range(3):
        forecast.program_ends(f"p{i}")
    assert len(forecast) == 0


def test_no_context_is_expected_to_outgrow_the_memory() -> None:
    forecast: DemandForecast[str] = DemandForecast()
    for i in range(5):
        episode(forecast, f"p{i}", 40, growth=60, at_s=1000.0 * i)
    assert forecast.peak_blocks(100, 9000.0) > 1000
    assert forecast.peak_blocks(100, 9000.0, 800) <= 800
