"""Passes on what happens to those who watch, none of whom can hold up another or the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from kvtier.link_messages import ProgramKey

T = TypeVar("T")

BUFFER_EVENTS: Final = 4096
"""Events that wait for one watcher."""
MAX_WATCHERS: Final = 64


class TooManyWatchersError(Exception):
    """The limit on watchers is reached."""


class HubClosedError(Exception):
    """The server stops: there will be no more events."""


@dataclass(frozen=True, slots=True)
class Interest:
    """What a watcher wants to see.

    Attributes:
        kinds: Kinds of events; empty: all.
        name: Of programs; None: any.
        tenant: Of programs, None being those without one; counts with `by_tenant`.
        by_tenant: Only programs of `tenant`: what concerns no program is left out too.
    """

    kinds: frozenset[str] = frozenset()
    name: str | None = None
    tenant: str | None = None
    by_tenant: bool = False

    @property
    def is_all(self) -> bool:
        """Whether the watcher wants every event."""
        return not self.kinds and self.name is None and not self.by_tenant

    def covers(self, kind: str, program: ProgramKey | None) -> bool:
        """Whether the watcher wants this event."""
        if self.kinds and kind not in self.kinds:
            return False
        if self.name is None and not self.by_tenant:
            return True
        if program is None:
            return False
        if self.by_tenant and program.tenant != self.tenant:
            return False
        return self.name is None or program.name == self.name


class Watcher(Generic[T]):
    """One reader's buffer. Full, it loses the oldest event, and counts."""

    def __init__(self, interest: Interest, capacity: int) -> None:
        self.interest = interest
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._lost = 0
        self._changed = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        """Return how many events wait."""
        return len(self._items)

    def put(self, item: T) -> int:
        """Add an event; return how many were lost for it."""
        lost = 0
        if len(self._items) >= self._capacity:
            self._items.popleft()
            lost = 1
        self._items.append(item)
        self._lost += lost
        self._changed.set()
        return lost

    def lose(self, count: int) -> None:
        """Count events that never came here."""
        self._lost += count
        self._changed.set()

    def close(self) -> None:
        """Let the reader end, when it has read what is here."""
        self._closed = True
        self._changed.set()

    async def read(self) -> AsyncGenerator[T | int, None]:
        """Yield events, and before those that follow a hole the number of lost ones.

        Raises:
            HubClosedError: The server stops.
        """
        while True:
            while self._lost or self._items:
                if self._lost:
                    lost, self._lost = self._lost, 0
                    yield lost
                else:
                    yield self._items.popleft()
            if self._closed:
                raise HubClosedError
            self._changed.clear()
            await self._changed.wait()


class EventHub(Generic[T]):
    """The watchers.

    Args:
        lost: Told how many events a watcher has lost.
        capacity: Of a watcher's buffer.
        max_watchers: Most watchers at a time.
    """

    def __init__(
        self,
        lost: Callable[[int], None],
        *,
        capacity: int = BUFFER_EVENTS,
        max_watchers: int = MAX_WATCHERS,
    ) -> None:
        self._tell_lost = lost
        self._capacity = capacity
        self._max_watchers = max_watchers
        self._watchers: set[Watcher[T]] = set()
        self._closed = False

    def __len__(self) -> int:
        """Return the number of watchers."""
        return len(self._watchers)

    @contextlib.contextmanager
    def watching(self, interest: Interest) -> Iterator[Watcher[T]]:
        """Be a watcher within the context.

        Raises:
            TooManyWatchersError: The limit is reached.
            HubClosedError: The server stops.
        """
        if self._closed:
            raise HubClosedError
        if len(self._watchers) >= self._max_watchers:
            raise TooManyWatchersError(f"{self._max_watchers} watchers are connected")
        watcher = Watcher[T](interest, self._capacity)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def publish(self, kind: str, program: ProgramKey | None, make: Callable[[], T]) -> None:
        """Tell those who are interested; `make` is called once, and only if there are any."""
        item: T | None = None
        for watcher in self._watchers:
            if watcher.interest.covers(kind, program):
                if item is None:
                    item = make()
                if lost := watcher.put(item):
                    self._tell_lost(lost)

    def lose(self, count: int) -> None:
        """Tell all watchers that events were lost before they came here.

        Nobody knows whose these were: who watches a part is told that there is a hole, and not how much others do.
        """
        for watcher in self._watchers:
            watcher.lose(count if watcher.interest.is_all else min(count, 1))

    def close(self) -> None:
        """End all watchers."""
        self._closed = True
        for watcher in self._watchers:
            watcher.close()
