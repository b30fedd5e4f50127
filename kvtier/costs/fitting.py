"""The fit behind the link's and the prefill's model.

Exponentially decayed least squares of the *relative* error, pulled towards the initial model times a
running scale. As long as the samples do not tell two coefficients apart (all transfers equally long,
no cached tokens yet) the result is therefore the scaled initial model; with spread samples the pull
vanishes. The influence of one sample is bounded (``OUTLIER_RATIO``), and a streak of equal outliers,
which is a change and not an outlier, is believed quickly.
"""

import math
from collections.abc import Sequence

REFIT_EVERY = 8
"""Samples between two fits: where there is one a step, the coefficients change slowly."""
OUTLIER_RATIO = 2.0
"""One sample counts at most as this many times slower or faster than predicted."""
DECAY = 0.97
"""Weight of the past after each sample: an effective window of 1 / (1 - 0.97) = 33 samples."""
INITIAL_WEIGHT = 1.0
"""Samples that the initial model's scale is worth; decays like a sample."""
RIDGE_WEIGHT = 0.1
"""Samples that the pull to the scaled initial model is worth, in every direction."""


class DecayedFit:
    """Non-negative decayed least squares of seconds over features; see the module's docstring.

    Args:
        initial: Coefficients to start from, not all zero.
        decay: Weight of the past after each sample.
        refit_every: Samples between two fits, once there are more than that.
    """

    def __init__(
        self, initial: Sequence[float], *, decay: float = DECAY, refit_every: int = REFIT_EVERY
    ) -> None:
        size = len(initial)
        self._decay = decay
        self._refit_every = refit_every
        self._initial = tuple(initial)
        self.coefficients = tuple(initial)
        # Lists while samples come in: for so few numbers faster than arrays.
        self._normal = [[0.0] * size for _ in range(size)]
        self._target = [0.0] * size
        self._weight = 0.0
        self._unsolved = 0
        self._scale_weight = INITIAL_WEIGHT
        self._log_scale_sum = 0.0
        self._outlier_streak = 0

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Add one sample; refit for each while there are few, then for every `refit_every`-th."""
        check_seconds(seconds)
        expected_s = max(sumprod(self._initial, features), 1e-9)
        believed_s = self._believe(seconds, max(sumprod(self.coefficients, features), 1e-9))
        decay = self._decay
        self._scale_weight = decay * self._scale_weight + 1.0
        self._log_scale_sum = decay * self._log_scale_sum + math.log(believed_s / expected_s)
        self._weight = decay * self._weight + 1.0
        # Rows are divided by the initial model's time, so that long samples do not dominate and
        # the weights stay comparable when the speed itself changes.
        row = [value / expected_s for value in features]
        ratio = believed_s / expected_s
        for i, left in enumerate(row):
            self._target[i] = decay * self._target[i] + left * ratio
            sums = self._normal[i]
            for j, right in enumerate(row):
                sums[j] = decay * sums[j] + left * right
        self._unsolved += 1
        if self._weight < self._refit_every or self._unsolved >= self._refit_every:
            self._unsolved = 0
            self.coefficients = self._solve()

    def _believe(self, seconds: float, predicted_s: float) -> float:
        """Clip one sample's time around the prediction; repeated outliers widen the clip."""
        limit = OUTLIER_RATIO * 2.0 ** abs(self._outlier_streak)
        ratio = seconds / predicted_s
        if 1.0 / OUTLIER_RATIO <= ratio <= OUTLIER_RATIO:
            self._outlier_streak = 0
            return seconds
        side = 1 if ratio > 1.0 else -1
        if side * self._outlier_streak < 0:
            self._outlier_streak, limit = 0, OUTLIER_RATIO
        self._outlier_streak = min(max(self._outlier_streak + side, -8), 8)
        return predicted_s * min(max(ratio, 1.0 / limit), limit)

    def _solve(self) -> tuple[float, ...]:
        """Solve the ridge system, leaving out coefficients that would become negative."""
        scale = math.exp(self._log_scale_sum / self._scale_weight)
        solution = [scale * value for value in self._initial]
        norm = [math.sqrt(self._normal[i][i]) for i in range(len(solution))]
        # A feature that was zero in every sample keeps its scaled initial coefficient.
        active = [i for i, length in enumerate(norm) if length > 0.0]
        ridge = RIDGE_WEIGHT / self._weight
        while active:
            matrix = [
                [self._normal[i][j] / (norm[i] * norm[j]) + ridge * (i == j) for j in active]
                for i in active
            ]
            right = [self._target[i] / norm[i] + ridge * solution[i] * norm[i] for i in active]
            values = _solve_definite(matrix, right)
            worst = min(range(len(values)), key=values.__getitem__)
            if values[worst] >= 0.0:
                for i, value in zip(active, values, strict=True):
                    solution[i] = value / norm[i]
                break
            solution[active.pop(worst)] = 0.0
        return tuple(solution)


def _solve_definite(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a symmetric positive definite system by elimination, in place.

    For the two or three unknowns here, ten times as fast as numpy's solver.
    """
    size = len(right)
    for i, row in enumerate(matrix):
        for k in range(i + 1, size):
            factor = matrix[k][i] / row[i]
            for j in range(i, size):
                matrix[k][j] -= factor * row[j]
            right[k] -= factor * right[i]
    for i in reversed(range(size)):
        later = sum(matrix[i][j] * right[j] for j in range(i + 1, size))
        right[i] = (right[i] - later) / matrix[i][i]
    return right


def sumprod(left: Sequence[float], right: Sequence[float]) -> float:
    """Sum of products (`math.sumprod` comes with Python 3.12)."""
    return sum(a * b for a, b in zip(left, right, strict=True))


def check_seconds(seconds: float) -> None:
    """Refuse what cannot be a duration; raises ValueError."""
    if not (math.isfinite(seconds) and seconds >= 0.0):
        msg = f"seconds must be finite and >= 0, not {seconds}"
        raise ValueError(msg)
