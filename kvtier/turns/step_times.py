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

    With asynchronous scheduling a step is scheduled while the one before runs: it begins when that
    one ends.
    """

    def __init__(self) -> None:
        self._steps: deque[StepFacts] = deque(maxlen=MAX_STEPS_IN_FLIGHT)
        self._last_end_s = 0.0

    def scheduled(self, step: StepFacts, now_s: float) -> None:
        """A step was scheduled."""
        step.built_s = now_s
        self._steps.append(step)

    def ended(self, now_s: float) -> tuple[StepFacts, float] | None:
        """The oldest scheduled step has ended: the step and its seconds."""
        begin_s, self._last_end_s = self._last_end_s, now_s
        if not self._steps:
            return None
        step = self._steps.popleft()
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
