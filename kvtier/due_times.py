"""When things are due: the next is found without a look at the others."""

from __future__ import annotations

import heapq
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_SLACK: Final = 64
"""Times that may be left of things that have gone, besides one for each that is there."""


class DueTimes(Generic[T]):
    """Things, each with the time at which it is due. They are hashable; every call is O(log n) amortised."""

    def __init__(self) -> None:
        self._due_s: dict[T, float] = {}
        self._heap: list[tuple[float, int, T]] = []
        self._n_set = 0

    def __len__(self) -> int:
        """Return the number of things."""
        return len(self._due_s)

    def set(self, thing: T, due_s: float) -> None:
        """The thing is due then, whatever was said before."""
        if self._due_s.get(thing) == due_s:
            return
        self._due_s[thing] = due_s
        self._n_set += 1
        heapq.heappush(self._heap, (due_s, self._n_set, thing))
        if len(self._heap) > 2 * len(self._due_s) + _SLACK:
            self._heap = [entry for entry in self._heap if self._counts(entry)]
            heapq.heapify(self._heap)

    def discard(self, thing: T) -> None:
        """The thing will not be due. Harmless where it is not known."""
        self._due_s.pop(thing, None)
        if not self._due_s:
            self._heap.clear()

    def take_due(self, now_s: float) -> list[T]:
        """The things that are due, the first first; they are known no more."""
        due = []
        while self._heap and self._heap[0][0] <= now_s:
            entry = heapq.heappop(self._heap)
            if self._counts(entry):
                due.append(entry[2])
                del self._due_s[entry[2]]
        return due

    def _counts(self, entry: tuple[float, int, T]) -> bool:
        return self._due_s.get(entry[2]) == entry[0]
