"""Which way a copy goes: by DMA or by kernel, from what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtier.copies.plan import Direction

Mover = Literal["dma", "kernel"]
"""``dma``: the copy engines of the GPU, no multiprocessor. ``kernel``: a few multiprocessors."""
MOVERS: Final[tuple[Mover, ...]] = ("dma", "kernel")


class LinkTime(Protocol):
    """What a link model tells; `kvtier.costs.link_model.LinkModel` is one."""

    def seconds(self, n_bytes: int, run_bytes: int, /) -> float:
        """Seconds of a copy of so many bytes in runs of so many."""


@dataclass(frozen=True)
class Switch:
    """Times of both ways in each direction.

    Attributes:
        times: by direction and mover. What is missing is not chosen.
    """

    times: Mapping[tuple[Direction, Mover], LinkTime] = field(default_factory=dict)

    def choose(self, direction: Direction, n_bytes: int, run_bytes: float) -> Mover:
        """The faster way; DMA, which disturbs nobody, where nothing was measured or both take as long.

        The number of runs counts by the part of a copy's time that does not depend on its bytes.
        """
        dma = self.times.get((direction, "dma"))
        kernel = self.times.get((direction, "kernel"))
        if dma is None or kernel is None:
            return "dma"
        run = max(1, round(run_bytes))
        return "kernel" if kernel.seconds(n_bytes, run) < dma.seconds(n_bytes, run) else "dma"


def always(mover: Mover) -> Switch:
    """A switch that does not choose: for measuring each way by itself."""

    class _Time:
        def __init__(self, seconds: float) -> None:
            self._seconds = seconds

        def seconds(self, _: int, __: int, /) -> float:
            return self._seconds

    directions: tuple[Direction, ...] = ("store", "load")
    return Switch({(d, m): _Time(float(m != mover)) for d in directions for m in MOVERS})
