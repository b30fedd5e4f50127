"""How fast a figure grows with the number of programs, and a picture of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtier.linkbench.pen import GRID, INK, Pen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    Points = Sequence[tuple[int, float]]

COLOURS = ("#0b6bcb", "#c4320a", "#2f9e44")
REFERENCE = "#888888"
_FIELD = (440, 300)
_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 74, 18, 36


class Growth(NamedTuple):
    """A fit of ``log(figure) = exponent * log(size) + constant``, with the 95 % interval of the exponent."""

    exponent: float
    low: float
    high: float


def n_log_n(n: float) -> float:
    """What work on `n` things may take that are kept in order."""
    return n * math.log2(n)


def fit(points: Points, size: Callable[[float], float]) -> Growth:
    """How the figures of `points` (programs, figure) grow with `size` of their programs."""
    from scipy import stats  # noqa: PLC0415 - slow to load

    x = [math.log(size(n)) for n, _ in points]
    line = stats.linregress(x, [math.log(figure) for _, figure in points])
    half = float(stats.t.ppf(0.975, len(points) - 2)) * float(line.stderr)
    exponent = float(line.slope)
    return Growth(exponent, exponent - half, exponent + half)


def medians(points: Points) -> list[tuple[int, float]]:
    """The median figure of each number of programs."""
    found: dict[int, list[float]] = {}
    for n, figure in points:
        found.setdefault(n, []).append(figure)
    return [(n, sorted(figures)[len(figures) // 2]) for n, figures in sorted(found.items())]


def write_png(
    path: Path, title: str, fields: Sequence[tuple[str, dict[str, Points], bool]]
) -> None:
    """Draw figures over programs, both axes logarithmic.

    Args:
        path: Where to.
        title: Above all.
        fields: Of each diagram its unit, its lines by name, and whether a line for n log n is wanted.
    """
    pen = Pen((_FIELD[0] * len(fields), _FIELD[1]))
    pen.text((16, 10), title, size=14)
    for i, (unit, lines, has_reference) in enumerate(fields):
        _field(pen, i * _FIELD[0], unit, lines, has_reference=has_reference)
    pen.save(path)


def _field(
    pen: Pen, left: int, unit: str, lines: dict[str, Points], *, has_reference: bool
) -> None:
    shown = {name: medians(points) for name, points in lines.items()}
    if has_reference:
        first = next(iter(shown.values()))
        n, figure = first[-1]
        shown["n log n"] = [(k, figure * n_log_n(k) / n_log_n(n)) for k, _ in first]
    sizes = sorted({n for points in shown.values() for n, _ in points})
    figures = [figure for points in shown.values() for _, figure in points]
    x = _scale(sizes, left + _LEFT, left + _FIELD[0] - _RIGHT)
    y = _scale(figures, _FIELD[1] - _BOTTOM, _TOP)
    ends = left + _LEFT, left + _FIELD[0] - _RIGHT
    for power in range(
        math.floor(math.log10(min(figures))), math.ceil(math.log10(max(figures))) + 1
    ):
        if min(figures) <= 10.0**power <= max(figures):
            at = y(10.0**power)
            pen.rule((ends[0], at), (ends[1], at), GRID)
            pen.text((ends[0] - 6, at), f"{10.0**power:g}", anchor="rm", size=10)
    pen.rule((ends[0], _FIELD[1] - _BOTTOM), (ends[1], _FIELD[1] - _BOTTOM), INK)
    for n in sizes:
        pen.text((x(n), _FIELD[1] - _BOTTOM + 7), f"{n:,}", anchor="ma", size=10)
    pen.text((left + 16, _TOP - 38), unit, size=11)
    at = left + _LEFT
    for i, (name, points) in enumerate(shown.items()):
        is_reference = name == "n log n"
        colour = REFERENCE if is_reference else COLOURS[i % len(COLOURS)]
        pen.line([(at, _TOP - 12), (at + 18, _TOP - 12)], colour, dashed=is_reference)
        at += 24 + int(pen.text((at + 24, _TOP - 19), name)) + 14
        pen.line([(x(n), y(figure)) for n, figure in points], colour, dashed=is_reference)


def _scale(values: Iterable[Any], low: float, high: float) -> Callable[[float], float]:
    logs = [math.log(value) for value in values]
    first, width = min(logs), (max(logs) - min(logs)) or 1.0
    return lambda value: low + (math.log(value) - first) / width * (high - low)
