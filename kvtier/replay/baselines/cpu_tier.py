"""A CPU tier as stock software has it: an LRU of KV blocks by their hash.

After vLLM's offloading and LMCache: what is being read or written stays, what was used longest ago goes, and
where nothing can go a store is refused. No room is made by value, and none is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class CpuTier:
    """Blocks in CPU memory.

    Args:
        capacity_blocks: As many fit; 0 for no tier.

    Attributes:
        refused_blocks: Blocks that found no room, because all others were in use.
        evicted_blocks: Blocks that made room for others.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity_blocks = capacity_blocks
        # Readable and not in use, the one used longest ago first.
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        # Readable, and read right now: by how many.
        self._read: dict[bytes, int] = {}
        self._written: set[bytes] = set()
        self.refused_blocks = 0
        self.evicted_blocks = 0

    def __len__(self) -> int:
        """Blocks that take up memory."""
        return len(self._idle) + len(self._read) + len(self._written)

    @property
    def capacity_blocks(self) -> int:
        """Blocks that fit."""
        return self._capacity_blocks

    def has(self, block_hash: bytes) -> bool:
        """Whether a block can be read."""
        return block_hash in self._idle or block_hash in self._read

    def n_leading(self, block_hashes: Sequence[bytes], first: int, end: int) -> int:
        """How many of the blocks from `first` to `end` can be read, up to the first that can not."""
        idle, read = self._idle, self._read
        for i in range(first, end):
            block_hash = block_hashes[i]
            if block_hash not in idle and block_hash not in read:
                return i - first
        return max(0, end - first)

    def begin_write(self, block_hashes: Iterable[bytes]) -> list[bytes]:
        """Take room for the blocks that are not there, as far as there is any; returns those to be copied."""
        taken: list[bytes] = []
        for block_hash in block_hashes:
            if block_hash in self._written or self.has(block_hash):
                continue
            if len(self) >= self._capacity_blocks:
                if not self._idle:
                    self.refused_blocks += 1
                    continue
                self._idle.popitem(last=False)
                self.evicted_blocks += 1
            self._written.add(block_hash)
            taken.append(block_hash)
        return taken

    def end_write(self, block_hashes: Iterable[bytes]) -> None:
        """The blocks have been copied and can be read."""
        for block_hash in block_hashes:
            self._written.discard(block_hash)
            self._idle[block_hash] = None

    def begin_read(self, block_hashes: Iterable[bytes]) -> None:
        """Keep blocks that can be read until `end_read`."""
        for block_hash in block_hashes:
            self._idle.pop(block_hash, None)
            self._read[block_hash] = self._read.get(block_hash, 0) + 1

    def end_read(self, block_hashes: Sequence[bytes]) -> None:
        """One reader less. The blocks, given in the order of the text, have just been used."""
        for block_hash in reversed(block_hashes):
            self._read[block_hash] -= 1
            if not self._read[block_hash]:
                del self._read[block_hash]
                self._idle[block_hash] = None

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        """A text has been used: of its blocks the last shall go first, since those before it are needed for it."""
        for block_hash in reversed(block_hashes):
            if block_hash in self._idle:
                self._idle.move_to_end(block_hash)
