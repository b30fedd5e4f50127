"""Block ids as arrays, and how often each block is listed: what makes pins cheap at long contexts.

A 100k-token turn has 6,250 blocks of 16 tokens. One walk over them in Python costs most of a
millisecond; the same in numpy, some ten microseconds.
"""

from __future__ import annotations

import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BlockIds: TypeAlias = NDArray[np.int64]
"""Block ids in token order, shape (blocks,)."""


def as_block_ids(block_ids: Sequence[int] | BlockIds) -> BlockIds:
    """An array of these ids; an array is returned as it is, not copied."""
    if isinstance(block_ids, np.ndarray):
        return block_ids
    # Twice as fast as by `array`, six times as fast as numpy's own conversion of a list.
    return np.frombuffer(struct.pack(f"{len(block_ids)}q", *block_ids), dtype=np.int64)


def common_prefix(left: BlockIds, right: BlockIds) -> int:
    """How many leading ids agree."""
    n_both = min(len(left), len(right))
    differ = left[:n_both] != right[:n_both]
    return int(differ.argmax()) if differ.any() else n_both


class BlockCounts:
    """How often each block is listed.

    Lists may share blocks; within one list each block comes once. `add` and `remove` of the same
    lists cancel out.

    Attributes:
        n_distinct: Blocks listed at least once.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(0, dtype=np.int32)
        self.n_distinct = 0

    def listed(self, block_ids: BlockIds) -> NDArray[np.bool_]:
        """For each of these blocks, whether it is listed."""
        return self.of(block_ids) > 0

    def n_listed(self, block_ids: BlockIds) -> int:
        """How many of these blocks are listed."""
        return int(np.count_nonzero(self.of(block_ids))) if self.n_distinct else 0

    def of(self, block_ids: BlockIds) -> NDArray[np.int32]:
        """For each of these blocks, how often it is listed."""
        try:
            return self._counts[block_ids]
        except IndexError:
            self._grow(int(block_ids.max()) + 1)
            return self._counts[block_ids]

    def all_listed(self) -> BlockIds:
        """The listed blocks, ascending."""
        return np.flatnonzero(self._counts).astype(np.int64)

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Try something out; at the end all is as before. Takes as long as what is tried, however many blocks there are."""
        trial = Trial(self)
        try:
            yield trial
        finally:
            trial.undo()

    def add(self, block_ids: BlockIds) -> BlockIds:
        """Count a list; returns the blocks that were not listed before."""
        counts = self.of(block_ids)
        fresh: BlockIds = block_ids[counts == 0] if counts.any() else block_ids
        self._counts[block_ids] = counts + 1
        self.n_distinct += len(fresh)
        return fresh

    def remove(self, block_ids: BlockIds) -> BlockIds:
        """Take a list out again; returns the blocks that are listed no more."""
        counts = self._counts[block_ids] - 1
        self._counts[block_ids] = counts
        gone: BlockIds = block_ids[counts == 0] if counts.any() else block_ids
        self.n_distinct -= len(gone)
        return gone

    def shift(self, block_ids: BlockIds, step: int) -> NDArray[np.int32]:
        """Add `step` to the count of each block, for a `Trial`; returns the counts."""
        counts: NDArray[np.int32] = self.of(block_ids) + np.int32(step)
        self._counts[block_ids] = counts
        return counts

    def _grow(self, n_blocks: int) -> None:
        """Count more blocks: the size of the pool need not be known."""
        grown = np.zeros(max(n_blocks, 2 * len(self._counts)), dtype=np.int32)
        grown[: len(self._counts)] = self._counts
        self._counts = grown


class Trial:
    """Changes of counts that are taken back; `BlockCounts.n_distinct` does not know of them."""

    def __init__(self, counts: BlockCounts) -> None:
        self._counts = counts
        self._done: list[tuple[BlockIds, int]] = []

    def add(self, block_ids: BlockIds) -> None:
        """Count a list."""
        self._shift(block_ids, 1)

    def remove(self, block_ids: BlockIds) -> int:
        """Take a list out again; returns how many blocks are listed no more."""
        return int(np.count_nonzero(self._shift(block_ids, -1) == 0))

    def undo(self) -> None:
        """Take everything back."""
        for block_ids, step in self._done:
            self._counts.shift(block_ids, -step)
        self._done.clear()

    def _shift(self, block_ids: BlockIds, step: int) -> NDArray[np.int32]:
        counts = self._counts.shift(block_ids, step)
        self._done.append((block_ids, step))
        return counts
