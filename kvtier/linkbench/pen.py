"""Lines and words on a picture, with Pillow where it is installed."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SCALE: Final = 2
"""Pixels for each unit, so that lines are smooth on dense screens."""
INK: Final = "#222222"
GRID: Final = "#e3e3e3"


class PlotError(RuntimeError):
    """No picture can be drawn; the message says what is missing."""


class Pen:
    """Draws a picture of so many units, of which each is `SCALE` pixels wide.

    Raises:
        PlotError: Pillow is not installed.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        try:
            from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 - wanted for this alone
        except ImportError as error:
            raise PlotError("--png needs Pillow: pip install pillow") from error
        self._image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
        self._draw: Any = ImageDraw.Draw(self._image)
        self._fonts: Any = ImageFont

    def save(self, path: Path) -> None:
        """Write it as PNG.

        Raises:
            OSError: the file cannot be written.
        """
        self._image.save(path, format="PNG")

    def text(
        self, at: tuple[float, float], text: str, *, size: int = 11, anchor: str = "la"
    ) -> float:
        """Write; the width."""
        font = self._fonts.load_default(size=size * SCALE)
        self._draw.text(_scaled(at), text, fill=INK, font=font, anchor=anchor)
        return float(font.getlength(text)) / SCALE

    def line(
        self, points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False
    ) -> None:
        """Join points, and mark each."""
        for a, b in itertools.pairwise(points):
            n_dashes = max(1, round(math.dist(a, b) / 5)) if dashed else 1
            for k in range(0, n_dashes, 2):
                ends = [
                    (a[0] + (b[0] - a[0]) * t / n_dashes, a[1] + (b[1] - a[1]) * t / n_dashes)
                    for t in (k, k + 1)
                ]
                self._draw.line([_scaled(p) for p in ends], fill=colour, width=2 * SCALE)
        if not dashed:
            for x, y in points:
                self._draw.ellipse(
                    [_scaled((x - 2.5, y - 2.5)), _scaled((x + 2.5, y + 2.5))], fill=colour
                )

    def rule(self, a: tuple[float, float], b: tuple[float, float], colour: str) -> None:
        """A thin straight line."""
        self._draw.line([_scaled(a), _scaled(b)], fill=colour, width=SCALE)


def _scaled(at: tuple[float, float]) -> tuple[float, float]:
    return at[0] * SCALE, at[1] * SCALE
