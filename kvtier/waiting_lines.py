"""Who waits, in the orders that admission goes by: each kind by program, and by waiting time; and who runs, by priority.

A line holds requests that may hold others back. Who no longer does is taken out when it comes to the top.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING, Final, Generic

from kvtier.admission_facts import Key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.admission_facts import Waiting
    from kvtier.waiting_front import Order

_COMPACT_FROM: Final = 64
RETURNING, NEW, RETURNING_LINE, NEW_LINE = range(4)
"""Returning turns and first turns by the arrival of their program; the same by waiting time."""
LINES_OF_EACH: Final = 2
"""Each request is in so many, while it may hold others back."""
BY_PROGRAM: Final = RETURNING, NEW
BY_WAITING: Final = RETURNING_LINE, NEW_LINE

_Item = tuple["Order", "Waiting[Key]"]


class WaitingLines(Generic[Key]):
    """Lines of waiting requests. Each call costs O(log n) amortised in the number of waiting requests."""

    def __init__(self) -> None:
        self._heaps: tuple[list[_Item[Key]], ...] = ([], [], [], [])

    def heap(self, line: int) -> Sequence[_Item[Key]]:
        """A line as a heap, the first at its top."""
        return self._heaps[line]

    def put(self, entry: Waiting[Key]) -> None:
        """Let a request hold others back; harmless where it does."""
        for heap in (NEW, NEW_LINE) if entry.is_new_program else (RETURNING, RETURNING_LINE):
            if heap not in entry.in_heaps:
                entry.in_heaps.add(heap)
                key = entry.line if heap in BY_WAITING else entry.order
                heapq.heappush(self._heaps[heap], (key, entry))

    def first(self, heap: int, competes: Callable[[Waiting[Key]], bool]) -> Waiting[Key] | None:
        """Return the first request that competes, parking those before it until they are put in again."""
        items = self._heaps[heap]
        while items:
            entry = items[0][1]
            if not entry.gone and competes(entry):
                return entry
            heapq.heappop(items)
            entry.in_heaps.discard(heap)
        return None

    def trim(self, n_waiting: int) -> None:
        """Take out who has gone where there are many of them."""
        for items in self._heaps:
            if len(items) > _COMPACT_FROM + 2 * n_waiting:
                items[:] = [item for item in items if not item[1].gone]
                heapq.heapify(items)


class Priorities:
    """How many of the requests that have started have which of vLLM's priorities."""

    def __init__(self) -> None:
        self._count: Counter[int] = Counter()
        # None: to be found out.
        self._least_urgent: int | None = None

    def add(self, priority: int) -> None:
        """One has started."""
        self._count[priority] += 1
        self._least_urgent = None

    def remove(self, priority: int) -> None:
        """One that had started is over."""
        self._count[priority] -= 1
        if not self._count[priority]:
            del self._count[priority]
        self._least_urgent = None

    def least_urgent(self, default: int) -> int:
        """The largest; `default` where nothing runs."""
        if not self._count:
            return default
        if self._least_urgent is None:
            self._least_urgent = max(self._count)
        return self._least_urgent
