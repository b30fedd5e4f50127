"""The order of worth: exact where that is cheap, and never more work than a few looks where there are many."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.cheapest_first import BATCH, EXACT, STALE_S, CheapestFirst


class Worths:
    """What things are worth, and how often somebody has asked."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}
        self.asked = 0

    def __call__(self, thing: str) -> tuple[float, float]:
        self.asked += 1
        return self.of[thing], 0.0


def many(n_things: int) -> tuple[CheapestFirst[str], Worths]:
    order: CheapestFirst[str] = CheapestFirst()
    worths = Worths()
    for i in random.Random(1).sample(range(n_things), n_things):
        worths.of[f"t{i}"] = float(i)
        order.add(f"t{i}")
    return order, worths


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 120), st.integers(0, 2**32))
def test_everything_that_is_there_comes_once(n_things: int, seed: int) -> None:
    chance = random.Random(seed)
    order, worths = many(n_things)
    now_s = 0.0
    for i in range(8):
        now_s += chance.choice((0.0, 0.3, 2.0))
        for thing in chance.sample(sorted(worths.of), min(len(worths.of), 5)):
            if chance.random() < 0.5:
                del worths.of[thing]
                order.discard(thing)
            else:
                worths.of[thing] = chance.random() * 100
                order.add(thing)
        worths.of[f"n{i}"] = chance.random() * 100
        order.add(f"n{i}")
        found = list(order.walk(worths, chance.choice((now_s, None))))
        # Nothing has changed but what was said: the order is exact.
        assert found == sorted(found, key=lambda thing: worths.of[thing])
        assert set(found) == worths.of.keys()
        assert len(found) == len(order)


def test_what_goes_meanwhile_is_left_out() -> None:
    for n_things in (EXACT, 10 * EXACT):
        order, worths = many(n_things)
        next(order.walk(worths, 0.0))
        found = []
        for thing in order.walk(worths, 0.1):
            found.append(thing)
            order.discard(f"t{int(thing[1:]) + 1}")
        assert found == [f"t{i}" for i in range(0, n_things, 2)]


def test_all_may_go_while_they_are_walked() -> None:
    order, worths = many(3 * EXACT)
    list(order.walk(worths, 0.0))
    for thing in list(worths.of):
        # Their first entries are still there, dearer than all others.
        worths.of[thing] -= 1000.0
        order.add(thing)
    for thing in order.walk(worths, 0.1):
        order.discard(thing)
    assert len(order) == 0
    order.add("t0")
    assert list(order.walk(worths, 0.2)) == ["t0"]


def test_the_cheapest_of_many_are_found_without_a_look_at_all() -> None:
    order, worths = many(10_000)
    assert next(order.walk(worths, 0.0)) == "t0"
    assert worths.asked == 10_000
    worths.asked = 0
    for i in range(100):
        worths.of["new"] = i + 0.5
        order.add("new")
        found = order.walk(worths, 0.5)
        assert [next(found), next(found)] == [f"t{i}", "new"]
        order.discard(f"t{i}")
    assert worths.asked <= 100 * (BATCH + 1)


def test_time_changes_the_order_at_once_for_those_that_come_first_and_soon_for_all() -> None:
    order, worths = many(10_000)
    next(order.walk(worths, 0.0))
    worths.of["t0"], worths.of["t9999"] = 5.5, -1.0
    assert next(order.walk(worths, STALE_S / 2)) == "t1"
    assert next(order.walk(worths, STALE_S)) == "t9999"


def test_of_few_things_the_order_is_always_exact() -> None:
    order, worths = many(EXACT)
    next(order.walk(worths, 0.0))
    worths.of[f"t{EXACT - 1}"] = -1.0
    assert next(order.walk(worths, 0.0)) == f"t{EXACT - 1}"


def test_of_equals_the_older_comes_first() -> None:
    order: CheapestFirst[str] = CheapestFirst()
    for name in "cab":
        order.add(name)
    assert list(order.walk(lambda _: (1.0, 2.0), 0.0)) == ["c", "a", "b"]


def test_what_has_gone_is_not_remembered() -> None:
    order, worths = many(1000)
    list(order.walk(worths, 0.0))
    for i in range(1000):
        order.discard(f"t{i}")
    assert not order._order
    assert not order._unplaced
    assert len(order) == 0
