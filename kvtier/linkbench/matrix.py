"""Which copies are measured: sizes, counts, layouts of the blocks, directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

Layout = Literal["contiguous", "runs4", "scattered"]
"""How the blocks of one copy lie in the KV cache: side by side, in fours, each for itself."""
Way = Literal["d2h", "h2d", "both"]
"""``d2h``: KV cache to host memory. ``h2d``: back. ``both``: half of the blocks each way at once."""

LAYOUTS: Final[tuple[Layout, ...]] = ("contiguous", "runs4", "scattered")
WAYS: Final[tuple[Way, ...]] = ("d2h", "h2d", "both")
KIB: Final = 1 << 10
MIB: Final = 1 << 20
BLOCK_BYTES: Final = tuple(KIB << i for i in range(3, 13))  # 8 KiB to 4 MiB
QUICK_BLOCK_BYTES: Final = (8 * KIB, 32 * KIB, 256 * KIB, MIB)
SMALL_COUNTS: Final = (16, 128)
CHUNK_BLOCKS: Final = 8
"""Blocks a slot; every count is a multiple of it, and of twice of it where both ways are copied."""
_RUN_BLOCKS: Final = 4


@dataclass(frozen=True, order=True)
class Cell:
    """One kind of copy.

    Attributes:
        block_bytes: contiguous bytes of one block.
        blocks: blocks copied, both ways together.
        layout: see `Layout`.
        way: see `Way`.
    """

    block_bytes: int
    blocks: int
    layout: Layout
    way: Way

    @property
    def n_bytes(self) -> int:
        """Bytes copied, both ways together."""
        return self.block_bytes * self.blocks

    @property
    def n_runs(self) -> int:
        """Contiguous runs after merging, both ways together."""
        parts = 2 if self.way == "both" else 1
        per_run = {"contiguous": self.blocks // parts, "runs4": _RUN_BLOCKS, "scattered": 1}
        return self.blocks // per_run[self.layout]


def cells(total_bytes: int, *, quick: bool = False) -> list[Cell]:
    """All cells; the largest of each block size copies ``total_bytes``.

    Args:
        total_bytes: at least 16 of the largest blocks, 64 MiB.
        quick: few sizes, large copies only, one way at a time.

    Raises:
        ValueError: ``total_bytes`` is too small.
    """
    sizes = QUICK_BLOCK_BYTES if quick else BLOCK_BYTES
    least = SMALL_COUNTS[0] * max(sizes)
    if total_bytes < least:
        raise ValueError(f"{total_bytes} bytes a copy; at least {least} are needed")
    ways = WAYS[:2] if quick else WAYS
    return [
        Cell(size, blocks, layout, way)
        for size in sizes
        for blocks in _counts(total_bytes // size, quick=quick)
        for layout in LAYOUTS
        for way in ways
    ]


def _counts(largest: int, *, quick: bool) -> list[int]:
    largest -= largest % (2 * CHUNK_BLOCKS)
    return [*(n for n in SMALL_COUNTS if n < largest and not quick), largest]


def block_tables(
    layout: Layout, blocks: int, pool_blocks: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Block ids of one copy after the other, forever; each goes on where the last one ended.

    So small copies do not find their blocks in a cache. The fours of ``runs4`` never touch, and
    no two scattered blocks follow each other.

    Args:
        layout: see `Layout`.
        blocks: ids in each table.
        pool_blocks: blocks to choose from, at least twice as many.
        seed: same seed, same tables.
    """
    run = {"contiguous": blocks, "runs4": _RUN_BLOCKS, "scattered": 1}[layout]
    # Every second group only: neighbours would merge into longer runs.
    groups = np.arange(pool_blocks // run, dtype=np.int64)[:: 2 if layout != "contiguous" else 1]
    if layout != "contiguous":
        groups = np.random.default_rng(seed).permutation(groups)
    per_table = blocks // run
    at = 0
    while True:
        if at + per_table > len(groups):
            at = 0
        starts = groups[at : at + per_table] * run
        yield (starts[:, None] + np.arange(run, dtype=np.int64)).ravel()
        at += per_table
