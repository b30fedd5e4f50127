"""How long steps take, and when all ranks have reported an order."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from kvtier.orders import OrderResult, merge_results

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvtier.turns.engine_facts import StepFacts

MAX_STEPS_IN_FLIGHT = 8


class StepTimes:
    """Durations of steps from when they were scheduled and when their output came.

    Workers name the step that they report: a step in which nothing was computed may have no report.
    With asynchronous scheduling a step is scheduled while the one before runs: it begins when that
    one ends.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[int, StepFacts]] = deque(maxlen=MAX_STEPS_IN_FLIGHT)
        self._last_id = 0
        self._last_end_s = 0.0

    def scheduled(self, step: StepFacts, now_s: float) -> int:
        """A step was scheduled; returns its id, from 1."""
        step.built_s = now_s
        self._last_id += 1
        self._steps.append((self._last_id, step))
        return self._last_id

    def ended(self, step_id: int, now_s: float) -> tuple[StepFacts, float] | None:
        """A step has ended: the step and its seconds; None for one that is not known any more."""
        while self._steps and self._steps[0][0] < step_id:
            self._steps.popleft()
        begin_s, self._last_end_s = self._last_end_s, now_s
        if not self._steps or self._steps[0][0] != step_id:
            return None
        _, step = self._steps.popleft()
        return step, now_s - max(step.built_s, begin_s)


class RankResults:
    """Collects an order's results from all ranks."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._partial: dict[int, list[OrderResult]] = {}

    def complete(self, results: Iterable[OrderResult]) -> Iterator[OrderResult]:
        """Orders that every rank has reported, merged."""
        for result in results:
            parts = self._partial.setdefault(result.order_id, [])
            parts.append(result)
            if len(parts) == self._ranks:
                yield merge_results(self._partial.pop(result.order_id))
