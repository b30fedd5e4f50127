"""How likely a program comes back after its n-th turn, against programs in general."""

from __future__ import annotations

import random
from heapq import heapify, heappop, heappush

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.ttl.gaps import SurvivalCurve, lognormal_curve
from kvtier.ttl.return_chance import MAX_LASTING, STALE_S, ReturnChance

GAPS = lognormal_curve(5.0, 30.0)


class Rig:
    """Pauses of one second each way of `ReturnChance`, whose programs are named by the test."""

    def __init__(self) -> None:
        self.chance = ReturnChance()
        self.now_s = 0.0

    def pause(self, program: str, turns: int) -> None:
        self.chance.paused(program, f"{program}.{turns}", turns, self.now_s, GAPS)

    def come_back(self, program: str, turns: int) -> None:
        self.chance.returned(program, f"{program}.{turns}")

    def work(self, program: str, first: int, last: int) -> None:
        """Turns that a program returns from."""
        for turns in range(first, last + 1):
            self.pause(program, turns)
            self.now_s += 1.0
            self.come_back(program, turns)

    def share(self, turns: int, after_s: float = STALE_S) -> float:
        """What is estimated a while later."""
        self.now_s += after_s
        return self.chance.share(turns, self.now_s, GAPS)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_nothing_is_known_at_first(rig: Rig) -> None:
    assert rig.share(3) == 1.0
    rig.pause("a", 3)
    assert rig.share(3, 1.0) > 0.9, "it has hardly gone"


def test_programs_that_stop_after_as_many_turns_are_expected_to(rig: Rig) -> None:
    for program in "abcd":
        rig.work(program, 1, 15)
        rig.pause(program, 16)
    assert rig.share(16, 400.0) < 0.4
    assert rig.share(15) == pytest.approx(1.0, abs=0.05)
    # They come back after all.
    for program in "abcd":
        rig.come_back(program, 16)
    assert rig.share(16) == pytest.approx(1.0, abs=0.05)


def test_the_longer_programs_stay_away_the_more_have_ended(rig: Rig) -> None:
    rig.work("a", 1, 20)
    for program in "bcd":
        rig.pause(program, 8)
    seen = [rig.share(8, after_s) for after_s in (STALE_S, 10.0, 60.0, 600.0, 3600.0)]
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 0.9
    assert seen[-1] < 0.6


def test_one_that_is_given_up_counts_as_ended(rig: Rig) -> None:
    rig.work("a", 1, 20)
    for program in "bcd":
        rig.pause(program, 8)
        rig.chance.gone(program, f"{program}.8")
    assert rig.share(8) < 0.6
    assert len(rig.chance) == 0


@pytest.mark.parametrize("by", ["request", "program"])
def test_one_that_is_forgotten_counts_as_neither(rig: Rig, by: str) -> None:
    rig.pause("a", 8)
    if by == "request":
        rig.chance.forget("a", ["a.8", "another"])
    else:
        rig.chance.forget_program("a")
    rig.come_back("a", 8)
    rig.chance.gone("a", "a.8")
    assert rig.share(8, 1e6) == 1.0
    assert len(rig.chance) == 0


def test_two_programs_may_have_requests_of_the_same_name(rig: Rig) -> None:
    rig.chance.paused("a", "r", 3, 0.0, GAPS)
    rig.chance.paused("b", "r", 8, 0.0, GAPS)
    rig.chance.gone("b", "r")
    rig.chance.returned("a", "r")
    assert rig.chance._seen[3].returned == 1.0
    assert rig.chance._seen[8].gone == 1.0


@pytest.mark.parametrize("ending", [0.05, 0.3])
@pytest.mark.parametrize("n_programs", [20, 80])
def test_where_no_number_of_turns_is_special_none_is_taken_for_it(
    ending: float, n_programs: int
) -> None:
    """Programs that end with the same probability after any turn, and are forgotten an hour later."""
    rng, chance = random.Random(1), ReturnChance()
    turns = {str(i): 0 for i in range(n_programs)}
    due = [(rng.uniform(0.0, 60.0), name, "pause") for name in turns]
    heapify(due)
    shares, n_named, now_s = [], n_programs, 0.0
    while now_s < 5000.0:
        now_s, name, what = heappop(due)
        if what == "gone":
            chance.gone(name, "r")
            continue
        if turns[name]:
            chance.returned(name, "r")
        turns[name] += 1
        if now_s > 4000.0 and turns[name] < 1 / ending:
            shares.append(chance.share(turns[name], now_s, GAPS))
        chance.paused(name, "r", turns[name], now_s, GAPS)
        if rng.random() < ending:
            heappush(due, (now_s + 3600.0, name, "gone"))
            name, n_named = str(n_named), n_named + 1
            turns[name] = 0
        heappush(due, (now_s + 10.0 + rng.lognormvariate(1.6, 1.4), name, "pause"))
    assert sum(shares) / len(shares) > 0.9


def test_many_pauses_at_a_time_are_not_taken_for_ends(rig: Rig) -> None:
    """More than are watched, and all of them end."""
    waiting: list[str] = []
    for i in range(20 * MAX_LASTING):
        rig.now_s += 0.02
        rig.pause(str(i), 5)
        waiting.append(str(i))
        if len(waiting) > 4 * MAX_LASTING:
            rig.come_back(waiting.pop(0), 5)
    rig.work("other", 1, 4)
    assert rig.share(5) > 0.9


def test_memory_is_bounded(rig: Rig) -> None:
    for i in range(3000):
        rig.pause(str(i), 7)
    assert len(rig.chance._seen[7].lasting) == len(rig.chance._all.lasting) == MAX_LASTING
    for i in range(3000):
        rig.chance.forget_program(str(i))
    assert len(rig.chance) == len(rig.chance._all.lasting) == 0


events = st.tuples(
    st.sampled_from(["pause", "returned", "gone", "forget"]),
    st.integers(0, 5).map(str),
    st.integers(0, 600),
    st.floats(0.0, 1e6),
)


@given(st.lists(events, max_size=60), st.integers(0, 600))
def test_whatever_happens_it_is_a_share(
    happened: list[tuple[str, str, int, float]], turns: int
) -> None:
    rig = Rig()
    for what, program, of_turns, passed_s in happened:
        rig.now_s += passed_s
        if what == "pause":
            rig.chance.paused(program, "r", of_turns, rig.now_s, GAPS)
        elif what == "forget":
            rig.chance.forget_program(program)
        else:
            getattr(rig.chance, what)(program, "r")
    assert 0.0 <= rig.share(turns) <= 1.0
    lasting = [pause for seen in rig.chance._seen.values() for pause in seen.lasting]
    assert sorted(lasting) == sorted(rig.chance._all.lasting)
    assert len(lasting) == len(rig.chance)


@pytest.mark.parametrize("share", [0.2, 0.7, 1.0])
def test_a_thinned_curve_has_so_many_who_return(share: float) -> None:
    thinned = GAPS.thinned(share)
    for time in (0.5, 5.0, 30.0, GAPS.last_s):
        expected = 1.0 - share * (1.0 - GAPS.survival(time))
        assert thinned.survival(time) == pytest.approx(expected)
    # Right behind the last event, the mixture's tail: per second, this part of those who are left returns.
    left = share * GAPS.last_survival / thinned.survival(GAPS.last_s)
    assert thinned.tail_alpha == pytest.approx(GAPS.tail_alpha * left)
    assert (thinned is GAPS) == (share == 1.0)


def test_a_curve_whose_tail_hardly_falls_has_quantiles() -> None:
    assert SurvivalCurve((1.0,), (0.99,), tail_alpha=1e-4).quantile(0.9) == float("inf")
    assert GAPS.thinned(0.02).quantile(0.5) > GAPS.quantile(0.5)
