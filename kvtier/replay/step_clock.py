"""How long steps take by measurement: fitted to steps of a real engine, or to a profile of `kvtier calibrate`.

A step's time is linear in what it computes: a fixed part, its tokens, its requests, and the pairs of tokens that
attend to each other. On a machine that was measured this takes the place of the roofline in `machine.step_s`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvtier.replay.machine import Scheduled

    Sample = tuple[Sequence[Scheduled], float]


@dataclass(frozen=True, slots=True)
class StepClock:
    """Seconds of a step: ``base + per_token * new + per_pair * new * (cached + new / 2) + per_request * n``.

    Sums go over the step's requests.
    """

    base_s: float
    per_token_s: float
    per_pair_s: float
    per_request_s: float = 0.0

    def step_s(self, parts: Iterable[Scheduled]) -> float:
        """Seconds of a step with these parts."""
        terms = (self.base_s, self.per_token_s, self.per_pair_s, self.per_request_s)
        return sum(a * b for a, b in zip(terms, _features(parts), strict=True))


def fit(samples: Sequence[Sample]) -> StepClock:
    """The clock that explains measured steps best, no term below 0.

    Each step is weighted by one over its time: many short ones count as much as a long one of their sum.

    Args:
        samples: Steps with their seconds.

    Raises:
        ValueError: There is none.
    """
    if not samples:
        message = "a step clock needs at least one measured step"
        raise ValueError(message)
    rows = np.array([_features(parts) for parts, _ in samples], dtype=np.float64)
    seconds = np.array([taken for _, taken in samples], dtype=np.float64)
    weights = 1.0 / np.sqrt(np.maximum(seconds, 1e-6))
    # A column that is never used, or a copy of another one, says nothing.
    active = [i for i in range(rows.shape[1]) if rows[:, i].any()]
    if len(set(rows[:, 3])) == 1:
        active.remove(3)
    solution = np.zeros(rows.shape[1])
    while active:
        scale = np.abs(rows[:, active] * weights[:, None]).max(axis=0)
        matrix = rows[:, active] * weights[:, None] / scale
        found = np.linalg.lstsq(matrix, seconds * weights, rcond=None)[0] / scale
        if found.min() >= 0.0:
            solution[active] = found
            break
        active.pop(int(found.argmin()))
    return StepClock(*map(float, solution))


def _features(parts: Iterable[Scheduled]) -> tuple[float, float, float, float]:
    tokens = pairs = n_requests = 0.0
    for part in parts:
        tokens += part.new_tokens
        pairs += part.new_tokens * (part.cached_tokens + part.new_tokens / 2)
        n_requests += 1.0
    return 1.0, tokens, pairs, n_requests
