"""How likely a program comes back after its n-th turn, against programs in general."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.ttl.gaps import SurvivalCurve, lognormal_curve
from kvtier.ttl.return_chance import MAX_OPEN, MAX_TURNS, ReturnChance

GAPS = lognormal_curve(5.0, 30.0)


def curve(_: str | None) -> SurvivalCurve:
    return GAPS


def factor(chance: ReturnChance, turns: int, now_s: float) -> float:
    return chance.factor(turns, now_s, curve)


def come_and_go(chance: ReturnChance, turns: int, n_programs: int, at_s: float = 0.0) -> None:
    """So many programs return within seconds after their `turns`-th turn."""
    for i in range(n_programs):
        key = f"back {turns} {i}"
        chance.paused(key, turns, "bash", at_s)
        chance.returned(key)


def test_nothing_is_known_at_first() -> None:
    chance = ReturnChance()
    assert factor(chance, 3, 0.0) == 1.0
    chance.paused("a", 3, "bash", 0.0)
    assert factor(chance, 3, 1.0) > 0.9, "it has hardly gone"


def test_programs_that_stop_after_as_many_turns_are_expected_to() -> None:
    chance = ReturnChance()
    for turns in range(1, 16):
        come_and_go(chance, turns, 4)
    for i in range(4):
        chance.paused(f"limit {i}", 16, "bash", 10.0 * i)
    assert factor(chance, 16, 400.0) < 0.4
    assert factor(chance, 15, 400.0) == 1.0
    # They come back after all.
    for i in range(4):
        chance.returned(f"limit {i}")
    assert factor(chance, 16, 400.0) == 1.0


def test_the_longer_programs_stay_away_the_more_have_ended() -> None:
    chance = ReturnChance()
    come_and_go(chance, 5, 20)
    for i in range(3):
        chance.paused(f"limit {i}", 8, None, 0.0)
    seen = [factor(chance, 8, now_s) for now_s in (0.0, 10.0, 60.0, 600.0, 6000.0)]
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 0.9
    assert seen[-1] < 0.5


def test_one_that_is_given_up_counts_as_ended() -> None:
    chance = ReturnChance()
    come_and_go(chance, 2, 20)
    for i in range(3):
        chance.paused(f"limit {i}", 8, None, 0.0)
        chance.gone(f"limit {i}")
    assert factor(chance, 8, 0.0) < 0.5
    assert len(chance) == 0


def test_one_that_is_forgotten_counts_as_neither() -> None:
    chance = ReturnChance()
    chance.paused("a", 8, None, 0.0)
    chance.forget("a")
    chance.returned("a")
    chance.gone("a")
    assert factor(chance, 8, 1e6) == 1.0
    assert len(chance) == 0


def test_what_programs_in_general_do_is_nothing_special() -> None:
    """How many of them never return is in the gaps' curve, and does not count twice."""
    chance = ReturnChance()
    for turns in range(1, 30):
        come_and_go(chance, turns, 3)
        chance.paused(f"gone {turns}", turns, None, 0.0)
        chance.gone(f"gone {turns}")
    assert all(factor(chance, turns, 0.0) > 0.95 for turns in range(1, 30))


def test_memory_is_bounded() -> None:
    chance = ReturnChance()
    for i in range(1000):
        chance.paused(str(i), i, None, 0.0)
        chance.paused(f"more {i}", 7, None, 0.0)
    assert len(chance) <= MAX_TURNS + 2 * MAX_OPEN
    assert factor(chance, 7, 0.0) < 0.5


events = st.tuples(
    st.sampled_from(["paused", "returned", "gone", "forget"]),
    st.integers(0, 5).map(str),
    st.integers(0, 600),
    st.floats(0.0, 1e6),
)


@given(st.lists(events, max_size=60), st.integers(0, 600))
def test_whatever_happens_a_factor_is_a_share(
    happened: list[tuple[str, str, int, float]], turns: int
) -> None:
    chance, now_s = ReturnChance(), 0.0
    for what, key, of_turns, passed_s in happened:
        now_s += passed_s
        if what == "paused":
            chance.paused(key, of_turns, None, now_s)
        else:
            getattr(chance, what)(key)
    assert 0.0 <= factor(chance, turns, now_s) <= 1.0
    assert sum(len(seen.lasting) for seen in chance._seen.values()) == len(chance)


@pytest.mark.parametrize("share", [0.2, 0.7, 1.0])
def test_a_thinned_curve_has_so_many_who_return(share: float) -> None:
    thinned = GAPS.thinned(share)
    for time in (0.5, 5.0, 30.0, GAPS.last_s):
        expected = 1.0 - share * (1.0 - GAPS.survival(time))
        assert thinned.survival(time) == pytest.approx(expected)
    assert thinned.hazard(1e4) <= GAPS.hazard(1e4) * 1.0001
    assert (thinned is GAPS) == (share == 1.0)
