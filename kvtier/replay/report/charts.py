"""Charts as numbers and SVG paths: what a template draws, with axes at round values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH: Final = 1000.0
LEFT: Final = 70.0
BOTTOM: Final = 34.0
TOP: Final = 8.0
RIGHT: Final = 16.0
MAX_POINTS: Final = 300
"""More points of a curve than a screen shows."""
_LEAST_S: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Tick:
    """A value on an axis: where, and its text."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """One curve or area."""

    label: str
    css: str
    path: str


@dataclass(slots=True)
class Chart:
    """Curves or areas on two axes."""

    title: str
    x_label: str
    y_label: str
    height: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark] = field(default_factory=list)

    @property
    def floor(self) -> float:
        """Where the x axis is."""
        return self.height - BOTTOM


@dataclass(frozen=True, slots=True)
class Axis:
    """Places values between two ends of the drawing, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value is."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, unit: str = "") -> list[Tick]:
        """Round values on it, ends included where they are round."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            values = [10.0**power for power in range(first, last + 1)]
        else:
            step = _round_step((self.high - self.low) / 12)
            n_steps = math.floor((self.high - self.low) / step + 1e-9)
            values = [self.low + i * step for i in range(n_steps + 1)]
        return [Tick(self.at(value), f"{value:,.6g}{unit}") for value in values]


def x_axis(high: float) -> Axis:
    """Time or the like from 0."""
    return Axis(0.0, high or 1.0, LEFT, WIDTH - RIGHT)


def log_axis(values: Sequence[float]) -> Axis:
    """Positive values, between powers of ten."""
    low = 10.0 ** math.floor(math.log10(max(min(values), _LEAST_S)))
    highest = max(values)
    high = 10.0 ** math.ceil(math.log10(max(highest, low * 10)))
    return Axis(low, high, LEFT, WIDTH - RIGHT, log=True)


def y_axis(high: float, height: float) -> Axis:
    """From 0 at the bottom."""
    return Axis(0.0, high or 1.0, height - BOTTOM, TOP)


def line(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    """A path through points, each with a small square."""
    places = [(x.at(a), y.at(b)) for a, b in points]
    squares = "".join(f"M{a - 3:.1f} {b - 3:.1f}h6v6h-6z" for a, b in places)
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places) + squares


def ecdf(values: Sequence[float], x: Axis, y: Axis) -> str:
    """The share of values up to each, as a path of steps."""
    ordered = sorted(values)
    n = len(ordered)
    kept = sorted(
        {math.ceil((i + 1) * n / min(n, MAX_POINTS)) - 1 for i in range(min(n, MAX_POINTS))}
    )
    steps = [f"M{x.at(ordered[0]):.1f} {y.at(0.0):.1f}"]
    steps += [f"H{x.at(ordered[i]):.1f}V{y.at((i + 1) / n):.1f}" for i in kept]
    return "".join(steps) + f"H{x.end:.1f}"


def band(
    at: Sequence[float], lower: Sequence[float], upper: Sequence[float], x: Axis, y: Axis
) -> str:
    """The area between two curves over the same values."""
    there = [f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in zip(at, upper, strict=True)]
    back = [f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in zip(at, lower, strict=True)]
    return "M" + "L".join(there + back[::-1]) + "Z"


def bars(spans: Sequence[tuple[float, float]], x: Axis, top: float, height: float) -> str:
    """Rectangles of one row as one path; the shortest can still be seen."""
    path = []
    for begin, end in spans:
        width = max(x.at(end) - x.at(begin), 0.4)
        path.append(f"M{x.at(begin):.1f} {top:.1f}h{width:.1f}v{height:.1f}h-{width:.1f}z")
    return "".join(path)


def thinned(n: int) -> list[int]:
    """Indices of at most `MAX_POINTS` of so many points, evenly, with the first and the last."""
    if n <= MAX_POINTS:
        return list(range(n))
    return [round(i * (n - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)]


def _round_step(least: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is at least this."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))
