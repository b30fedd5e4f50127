"""Measurements in windows in which other processes leave the machine alone."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_OTHERS: Final = 0.1
"""Part of the machine that others may take in a window."""
QUIET_S: Final = 0.5
"""How long the machine must be quiet before a window."""


class Others:
    """What other processes take of the machine's processors."""

    def __init__(self) -> None:
        """Begin a window."""
        self._process = psutil.Process()
        self._started = self._read()

    def _read(self) -> tuple[float, float, float]:
        times, own = psutil.cpu_times(), self._process.cpu_times()
        idle = times.idle + times.iowait
        return sum(times[:8]) - idle, own.user + own.system, time.perf_counter()

    def share(self) -> float:
        """Part of all processors since the window began."""
        busy, own, now_s = (b - a for a, b in zip(self._started, self._read(), strict=True))
        return max(0.0, busy - own) / (now_s * (os.cpu_count() or 1))


class Windows:
    """What was measured in windows that nobody disturbed."""

    def __init__(self, minutes: float) -> None:
        """Set when to give up on quiet windows."""
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.bytes_per_s: dict[str, list[float]] = defaultdict(list)
        self.copy_s: dict[str, list[float]] = defaultdict(list)
        self.disturbed = 0
        self._until_s = time.monotonic() + minutes * 60

    def run(self, window: Callable[[], None]) -> None:
        """Call ``window``, which adds to the fields, until nobody disturbs it."""
        while time.monotonic() < self._until_s:
            others = Others()
            time.sleep(QUIET_S)
            if others.share() > MOST_OTHERS:
                continue
            before = [dict(map(_copied, f.items())) for f in self._fields()]
            others = Others()
            window()
            if others.share() <= MOST_OTHERS:
                return
            self.disturbed += 1
            for field, old in zip(self._fields(), before, strict=True):
                field.clear()
                field.update(old)
        raise SystemExit("the machine is too busy to measure")

    def _fields(self) -> tuple[dict[str, list[float]], ...]:
        return self.seconds, self.bytes_per_s, self.copy_s


def _copied(item: tuple[str, list[float]]) -> tuple[str, list[float]]:
    return item[0], list(item[1])
