"""Things in the order of what they are worth, where that changes with time.

To value thousands of things whenever the cheapest is wanted would take longer the more there are. So the order is
kept, and made anew at most once in `STALE_S`; in between, what is new or has changed is put into its place, and
those that come first are valued again, `BATCH` at a time. Few things are valued each time: their order is exact.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

EXACT: Final = 32
"""Up to so many things are valued whenever their order is wanted."""
STALE_S: Final = 1.0
BATCH: Final = 16
_SLACK: Final = 64
"""Entries that may be left of things that have gone, besides one for each that is there."""


class CheapestFirst(Generic[T]):
    """See the module's docstring. Things are hashable."""

    def __init__(self) -> None:
        self._n_added = 0
        # When each was added or changed: of two that are worth the same, the older one comes first.
        self._added: dict[T, int] = {}
        self._unplaced: dict[T, None] = {}
        # Worth, tie and number, all negative: the cheapest is last, where lists are cut without moving the rest.
        self._order: list[tuple[float, float, int, T]] = []
        self._sorted_s = float("-inf")

    def __len__(self) -> int:
        """Return the number of things."""
        return len(self._added)

    def add(self, thing: T) -> None:
        """Take in a thing, or one whose worth has changed by more than time."""
        self._n_added += 1
        self._added[thing] = self._n_added
        self._unplaced[thing] = None

    def discard(self, thing: T) -> None:
        """The thing has gone. Harmless where it is not known."""
        self._added.pop(thing, None)
        self._unplaced.pop(thing, None)
        if not self._added:
            # A new list: somebody may be walking the old one.
            self._order = []

    def walk(self, worth: Callable[[T], tuple[float, float]], now_s: float | None) -> Iterator[T]:
        """All things, the cheapest first; those that go meanwhile are left out.

        Args:
            worth: What a thing is worth now, and what decides between equals.
            now_s: Monotonic time; None: value them all, whenever that was done last.
        """
        if self._must_sort(now_s):
            self._sort(worth)
            self._sorted_s = self._sorted_s if now_s is None else now_s
            yield from (e[3] for e in reversed(self._order) if self._is_there(e))
            return
        for thing in self._unplaced:
            insort(self._order, self._entry(thing, worth))
        self._unplaced.clear()
        order = self._order
        while order and not self._is_there(order[-1]):
            order.pop()
        yield from self._in_batches(worth)

    def _must_sort(self, now_s: float | None) -> bool:
        return (
            now_s is None
            or len(self) <= EXACT
            or now_s - self._sorted_s >= STALE_S
            or len(self._order) > 2 * len(self) + _SLACK
        )

    def _sort(self, worth: Callable[[T], tuple[float, float]]) -> None:
        self._unplaced.clear()
        self._order = sorted(self._entry(thing, worth) for thing in self._added)

    def _in_batches(self, worth: Callable[[T], tuple[float, float]]) -> Iterator[T]:
        order, end = self._order, len(self._order)
        while end:
            batch: list[tuple[float, float, int, T]] = []
            while end and len(batch) < BATCH:
                end -= 1
                if self._is_there(order[end]):
                    batch.append(self._entry(order[end][3], worth))
            yield from (e[3] for e in sorted(batch, reverse=True) if self._is_there(e))

    def _entry(
        self, thing: T, worth: Callable[[T], tuple[float, float]]
    ) -> tuple[float, float, int, T]:
        value, tie = worth(thing)
        return -value, -tie, -self._added[thing], thing

    def _is_there(self, entry: tuple[float, float, int, T]) -> bool:
        return self._added.get(entry[3]) == -entry[2]
