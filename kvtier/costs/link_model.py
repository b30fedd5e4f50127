"""How long a copy between GPU and CPU memory takes: measured at start, corrected from the transfers that the worker reports."""

import math
import statistics
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass

from kvtier.costs.fitting import DecayedFit, check_seconds

MAX_RATE_CORRECTION = 64.0
"""The link's measured rate stays within this factor of the initial curve."""
MAX_LATENCY_S = 10.0
"""Upper clamp of a link's fitted latency."""
TYPICAL_TRANSFERS = 15
"""Transfers whose median error says what is typical of a link now."""
SIZE_CLASS_BITS = 3
"""Transfers are alike whose sizes have the same number of bits, in steps of so many: a factor of eight."""
STEADYING_VOTES = 3
"""So many votes in that median are for the model as it is: two transfers that were interrupted move it by a quarter at most."""
DECAY = 0.9
"""Weight of the past after each transfer, a window of ten: transfers are few, and the link changes with what runs beside them."""
OUTLIER = 1.15
"""A transfer counts as no further than this factor from what is typical."""


@dataclass(frozen=True, slots=True)
class LinkModel:
    """Time of a copy between GPU and CPU memory in one direction.

    Attributes:
        latency_s: fixed cost of one transfer, seconds.
        points: ascending ``(run_bytes, bytes_per_s)``: the measured rate for copies made of
            contiguous runs of that many bytes. Between points the rate is interpolated linearly in
            log-log space, outside them it is the end point's.

    Raises:
        ValueError: no point, points not ascending, or a value not finite and positive.
    """

    latency_s: float
    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        """Check the curve."""
        if not self.points:
            msg = "a link model needs at least one point"
            raise ValueError(msg)
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            msg = f"latency_s must be finite and >= 0, not {self.latency_s}"
            raise ValueError(msg)
        previous = 0
        for run_bytes, rate in self.points:
            if run_bytes <= previous or not math.isfinite(rate) or rate <= 0:
                msg = f"points must ascend and have finite positive rates: {self.points}"
                raise ValueError(msg)
            previous = run_bytes

    def bytes_per_s(self, run_bytes: int) -> float:
        """Return the rate in bytes/s for contiguous runs of ``run_bytes``."""
        points = self.points
        if run_bytes <= points[0][0]:
            return points[0][1]
        if run_bytes >= points[-1][0]:
            return points[-1][1]
        i = bisect_right(points, run_bytes, key=lambda point: point[0])
        (x0, y0), (x1, y1) = points[i - 1], points[i]
        share = math.log(run_bytes / x0) / math.log(x1 / x0)
        return y0 * math.exp(share * math.log(y1 / y0))

    def seconds(self, n_bytes: int, run_bytes: int, backlog_bytes: int = 0) -> float:
        """Return the seconds until ``n_bytes`` have arrived behind ``backlog_bytes`` queued ones.

        ``latency + (backlog + n) / rate(run)``; the backlog is taken to have the same run size.
        Zero bytes take zero seconds.
        """
        if n_bytes <= 0:
            return 0.0
        return self.latency_s + (n_bytes + max(backlog_bytes, 0)) / self.bytes_per_s(run_bytes)


class LinkEstimator:
    """Corrects a calibrated link model from the transfers the worker reports.

    The fit is one of least squares, which a few transfers that were interrupted (another process had the
    core) would drag away from all others. So each is first brought to within ``OUTLIER`` of what the median
    of the last ``TYPICAL_TRANSFERS`` of about its size says of the model of now (winsorised). A lasting change
    moves the median; and the sizes are kept apart, as small transfers tell the latency, and large ones the rate.
    """

    def __init__(self, initial: LinkModel) -> None:
        """Start from ``initial``; its shape over run sizes is kept, latency and rate are fitted."""
        self._initial = initial
        # Coefficients: latency in s, and slowdown against the initial rate (1 = as calibrated).
        self._fit = DecayedFit((initial.latency_s, 1.0), decay=DECAY, refit_every=1)
        self._latency_s, self._slowdown = initial.latency_s, 1.0
        self._model: LinkModel | None = initial
        # Of the last transfers, by size class: seconds at the initial rate, and those that they took.
        self._last: dict[int, deque[tuple[float, float]]] = {}

    def observe(self, n_bytes: int, run_bytes: int, seconds: float) -> None:
        """Add one finished transfer.

        Args:
            n_bytes: bytes moved, > 0.
            run_bytes: typical contiguous run of it.
            seconds: its own service time, without waiting for transfers before it.

        Raises:
            ValueError: ``n_bytes`` <= 0, or ``seconds`` negative or not finite.
        """
        if n_bytes <= 0:
            msg = f"n_bytes must be > 0, not {n_bytes}"
            raise ValueError(msg)
        check_seconds(seconds)
        alike = self._last.setdefault(
            n_bytes.bit_length() // SIZE_CLASS_BITS, deque(maxlen=TYPICAL_TRANSFERS)
        )
        at_initial_rate_s = n_bytes / self._initial.bytes_per_s(run_bytes)
        alike.append((at_initial_rate_s, seconds))
        latency_s, slowdown = self._latency_s, self._slowdown
        ratios = [taken_s / (latency_s + slowdown * bytes_s) for bytes_s, taken_s in alike]
        typical = statistics.median([1.0] * STEADYING_VOTES + ratios)
        typical_s = (latency_s + slowdown * at_initial_rate_s) * typical
        seconds = min(max(seconds, typical_s / OUTLIER), typical_s * OUTLIER)
        self._fit.observe((1.0, at_initial_rate_s), seconds)
        latency_s, slowdown = self._fit.coefficients
        self._latency_s = min(latency_s, MAX_LATENCY_S)
        self._slowdown = min(max(slowdown, 1.0 / MAX_RATE_CORRECTION), MAX_RATE_CORRECTION)
        self._model = None

    def model(self) -> LinkModel:
        """Return the current model."""
        if self._model is None:
            points = tuple((run, rate / self._slowdown) for run, rate in self._initial.points)
            self._model = LinkModel(self._latency_s, points)
        return self._model
