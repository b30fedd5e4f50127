"""Due times: what is due comes in order, once, and nobody else is looked at."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.due_times import DueTimes


class CountedTime(float):
    """A time that counts how often it is compared."""

    compared = 0

    def __lt__(self, other: Any) -> bool:
        CountedTime.compared += 1
        return float(self) < float(other)

    def __le__(self, other: Any) -> bool:
        CountedTime.compared += 1
        return float(self) <= float(other)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.booleans()), max_size=60))
def test_it_is_a_table_of_times(calls: list[tuple[str, int, bool]]) -> None:
    due: DueTimes[str] = DueTimes()
    table: dict[str, float] = {}
    for i, (name, at_s, is_set) in enumerate(calls):
        if is_set:
            due.set(name, at_s)
            table[name] = at_s
        else:
            due.discard(name)
            table.pop(name, None)
        if i % 5 == 4:
            found = due.take_due(at_s)
            assert sorted(found) == sorted(n for n, t in table.items() if t <= at_s)
            times = [table.pop(n) for n in found]
            assert times == sorted(times)
        assert len(due) == len(table)


def test_what_is_due_comes_first_things_first() -> None:
    due: DueTimes[str] = DueTimes()
    for name, at_s in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("d", 4.0)):
        due.set(name, at_s)
    due.set("a", 2.5)
    assert due.take_due(3.0) == ["b", "a", "c"]
    assert due.take_due(3.0) == []


def test_of_many_only_what_is_due_is_looked_at() -> None:
    due: DueTimes[int] = DueTimes()
    for i in range(10_000):
        due.set(i, CountedTime(i))
    CountedTime.compared = 0
    for i in range(100):
        assert due.take_due(i) == [i]
    assert CountedTime.compared < 100 * 100


def test_times_that_hold_no_more_are_not_kept() -> None:
    due: DueTimes[str] = DueTimes()
    for i in range(10_000):
        due.set("a", float(i))
    assert len(due._heap) < 200
    due.discard("a")
    assert not due._heap
