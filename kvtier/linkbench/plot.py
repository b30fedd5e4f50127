"""The figures as a picture: GB/s over block size, one field for each layout and direction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvtier.linkbench.matrix import LAYOUTS, WAYS
from kvtier.linkbench.paths import CEILING
from kvtier.linkbench.pen import GRID, INK, Pen, PlotError
from kvtier.linkbench.report import path_names, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvtier.linkbench.measure import Row

_FIELD: Final = (380, 250)
_MARGIN: Final = (56, 34, 16, 40)  # left, top, right, bottom
_HEAD: Final = 60
_COLOURS: Final = ("#888888", "#0b6bcb", "#c4320a", "#2f9e44", "#9c36b5", "#e67700", "#0c8599")
_STEPS: Final = (1, 2, 5)


@dataclass(frozen=True)
class _Field:
    """One diagram: where it stands, and how values become pixels."""

    left: int
    top: int
    sizes: tuple[int, ...]
    top_gbps: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the axes."""
        left, top, right, bottom = _MARGIN
        return (
            self.left + left,
            self.top + top,
            self.left + _FIELD[0] - right,
            self.top + _FIELD[1] - bottom,
        )

    def x(self, size: int) -> float:
        """Place of a block size."""
        left, _, right, _ = self.box
        first, last = math.log2(self.sizes[0]), math.log2(self.sizes[-1])
        share = (math.log2(size) - first) / (last - first) if last > first else 0.5
        return left + share * (right - left)

    def y(self, gbps: float) -> float:
        """Place of a rate."""
        _, top, _, bottom = self.box
        return bottom - gbps / self.top_gbps * (bottom - top)


def write_png(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw the largest idle copies of each block size.

    Raises:
        PlotError: Pillow is not installed, or nothing was measured.
        OSError: the file cannot be written.
    """
    idle = [row for row in rows if row.load == "idle"]
    if not idle:
        raise PlotError("nothing was measured: there is no picture to draw")
    largest = {s: max(r.blocks for r in idle if r.block_bytes == s) for s in _sizes(idle)}
    idle = [row for row in idle if row.blocks == largest[row.block_bytes]]
    ways = [way for way in WAYS if any(row.direction == way for row in idle)]
    names = path_names(idle)
    size = (_FIELD[0] * len(LAYOUTS), _HEAD + _FIELD[1] * len(ways))
    pen = Pen(size)
    pen.text((16, 10), title, size=15)
    _legend(pen, names)
    top_gbps = _round_up(max(row.gbps for row in idle))
    for i, way in enumerate(ways):
        for j, layout in enumerate(LAYOUTS):
            mine = [row for row in idle if row.direction == way and row.layout == layout]
            field = _Field(_FIELD[0] * j, _HEAD + _FIELD[1] * i, tuple(_sizes(idle)), top_gbps)
            _axes(pen, field, f"{way}, {layout}")
            for name in names:
                points = [
                    (field.x(row.block_bytes), field.y(row.gbps))
                    for row in sorted(mine, key=lambda row: row.block_bytes)
                    if row.path == name
                ]
                pen.line(points, _colour(names, name), dashed=name == CEILING)
    pen.save(path)


def _sizes(rows: Sequence[Row]) -> list[int]:
    return sorted({row.block_bytes for row in rows})


def _colour(names: Sequence[str], name: str) -> str:
    return _COLOURS[list(names).index(name) % len(_COLOURS)]


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... so that the axis ends on a round figure."""
    power = 10.0 ** math.floor(math.log10(value))
    return next((s * power for s in _STEPS if s * power >= value), 10 * power)


def _legend(pen: Pen, names: Sequence[str]) -> None:
    x = 16.0
    for name in names:
        pen.line([(x, 44), (x + 22, 44)], _colour(names, name), dashed=name == CEILING)
        x += 28 + pen.text((x + 28, 37), name) + 18


def _axes(pen: Pen, field: _Field, title: str) -> None:
    left, top, right, bottom = field.box
    pen.text((left, top - 18), title, size=12)
    n_steps = 5
    for i in range(n_steps + 1):
        gbps = field.top_gbps * i / n_steps
        pen.rule((left, field.y(gbps)), (right, field.y(gbps)), GRID if i else INK)
        pen.text((left - 6, field.y(gbps)), f"{gbps:g}", anchor="rm", size=10)
    pen.text((left - 6, top - 18), "GB/s", anchor="ra", size=10)
    for size in field.sizes[:: max(1, len(field.sizes) // 4)]:
        pen.rule((field.x(size), bottom), (field.x(size), bottom + 4), INK)
        pen.text((field.x(size), bottom + 7), size_text(size), anchor="ma", size=10)
