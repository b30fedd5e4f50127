"""The link between GPU and CPU memory in virtual time: one queue each way."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["store", "load"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One copy that has ended.

    Attributes:
        direction: "store" to CPU memory, "load" from it.
        n_bytes: Its size.
        seconds: Its own time, without waiting for those before it.
        end_s: When it ended.
        what: Whose it is.
    """

    direction: Direction
    n_bytes: int
    seconds: float
    end_s: float
    what: Any


class Link:
    """Copies one after the other in each direction; the directions do not slow each other.

    A copy of ``n`` bytes takes ``latency + n / bandwidth``, which for a stream of many copies of some size gives
    the efficiency of that size.

    Args:
        bytes_per_s: Bandwidth each way.
        latency_s: Fixed cost of a copy.

    Attributes:
        busy_s: Time in use, by direction.
        moved_bytes: Bytes of copies that have been started, by direction.
    """

    def __init__(self, bytes_per_s: float, latency_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._free_s: dict[Direction, float] = {"store": 0.0, "load": 0.0}
        self._running: list[tuple[float, int, Transfer]] = []
        self._n_started = 0
        self.busy_s: dict[Direction, float] = {"store": 0.0, "load": 0.0}
        self.moved_bytes: dict[Direction, int] = {"store": 0, "load": 0}

    def start(self, direction: Direction, n_bytes: int, now_s: float, what: Any) -> float:
        """Queue a copy behind those of its direction; returns when it will end."""
        seconds = self._latency_s + n_bytes / self._bytes_per_s
        end_s = max(now_s, self._free_s[direction]) + seconds
        self._free_s[direction] = end_s
        self.busy_s[direction] += seconds
        self.moved_bytes[direction] += n_bytes
        self._n_started += 1
        transfer = Transfer(direction, n_bytes, seconds, end_s, what)
        heapq.heappush(self._running, (end_s, self._n_started, transfer))
        return end_s

    def ended(self, now_s: float) -> list[Transfer]:
        """Copies that have ended since the last call, in order."""
        done = []
        while self._running and self._running[0][0] <= now_s:
            done.append(heapq.heappop(self._running)[2])
        return done

    @property
    def next_end_s(self) -> float:
        """When the next copy ends; infinite without one."""
        return self._running[0][0] if self._running else float("inf")
