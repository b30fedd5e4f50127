"""How long kvtier's hooks and vLLM's scheduler take, call by call, with the timers' own time taken off."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from bench.hooks import HOOKS

if TYPE_CHECKING:
    from collections.abc import Callable

CALIBRATION_CALLS = 10_000
TIER_CALLS = ("lookup", "trim", "reserve", "commit", "drop", "mark", "poll")


class Timers:
    """Seconds spent in kvtier's hooks, by hook, one entry a call, less the timer's own.

    Args:
        clock: What is read: the time that passes, or the processor's.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.calls: dict[str, list[float]] = defaultdict(list)
        self.total_s = 0.0
        self._depth = 0
        self._excluded_s = 0.0
        self._is_excluding = False
        self._own_s = 0.0
        self._calibrate()

    def wrap(self, owner: Any, name: str) -> None:
        """Time a method of `owner`; a hook inside a hook is counted once."""
        setattr(owner, name, self._timed(name, getattr(owner, name)))

    def exclude(self, owner: Any, name: str) -> None:
        """Take the time of a method that hooks call off theirs."""
        setattr(owner, name, self._excluded(getattr(owner, name)))

    def wrap_make_room(self, half: Any) -> None:
        """Time `make_room` without the allocations that it retries: those are the scheduler's."""
        make_room = half.make_room

        def without_retries(request: Any, retry: Callable[[], Any], need: Callable[[], int]) -> Any:
            return make_room(request, self._excluded(retry), need)

        half.make_room = self._timed("make_room", without_retries)

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        calls = self.calls[name]

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            excluded_s = self._excluded_s
            started_s = self._clock()
            try:
                return method(*args, **kwargs)
            finally:
                seconds = self._clock() - started_s - (self._excluded_s - excluded_s)
                seconds -= self._own_s
                self._depth -= 1
                calls.append(seconds)
                if not self._depth:
                    self.total_s += seconds

        return timed

    def _excluded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_excluding:
                return method(*args, **kwargs)
            self._is_excluding = True
            started_s = self._clock()
            try:
                return method(*args, **kwargs)
            finally:
                self._excluded_s += self._clock() - started_s
                self._is_excluding = False

        return timed

    def _calibrate(self) -> None:
        """What the timer reports of a call that does nothing."""
        nothing = self._timed("nothing", lambda: None)
        for _ in range(CALIBRATION_CALLS):
            nothing()
        self._own_s = statistics.median(self.calls.pop("nothing"))
        self.total_s = 0.0


def time_hooks(timers: Timers, engine: Any, tier: Any) -> None:
    """Time what kvtier does in an engine, without what its CPU tier and vLLM's own freeing of blocks take.

    Args:
        timers: Where to.
        engine: Of `tests.engine.scheduler_harness`; without a connector nothing is timed.
        tier: Its CPU tier, in production another process; None without one.
    """
    if engine.connector is None:
        return
    for hook in HOOKS:
        timers.wrap(engine.connector, hook)
    timers.wrap_make_room(engine.half)
    for call in TIER_CALLS if tier is not None else ():
        timers.exclude(tier, call)
    timers.exclude(engine.scheduler.kv_cache_manager.block_pool, "free_blocks")


class StepClock:
    """Time inside the scheduler's own entry points, step by step."""

    def __init__(self, scheduler: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._current_s = 0.0
        self._inside = False
        self.total_s: list[float] = []
        self.kvtier_s: list[float] = []
        for name in ("schedule", "update_from_output", "has_requests", "has_unfinished_requests"):
            self._wrap(scheduler, name)

    def _wrap(self, scheduler: Any, name: str) -> None:
        method = getattr(scheduler, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside = True
            started_s = self._clock()
            try:
                return method(*args, **kwargs)
            finally:
                self._current_s += self._clock() - started_s
                self._inside = False

        setattr(scheduler, name, timed)

    def close_step(self, kvtier_s: float) -> None:
        """End a step, of which `kvtier_s` were kvtier's."""
        self.total_s.append(self._current_s)
        self.kvtier_s.append(kvtier_s)
        self._current_s = 0.0


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest, in microseconds."""
    if len(seconds) < 2:  # noqa: PLR2004 - statistics.quantiles needs two
        value = seconds[0] * 1e6 if seconds else 0.0
        return {"p50_us": value, "p99_us": value, "max_us": value}
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_us": cuts[49] * 1e6, "p99_us": cuts[98] * 1e6, "max_us": max(seconds) * 1e6}
