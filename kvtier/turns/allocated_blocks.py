"""The ids of the blocks that vLLM has given a request, without a list of them.

Of 6,000 blocks mostly one or two are looked at; to list them all takes a quarter of a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload


class AllocatedBlocks(Sequence[int]):
    """Block ids in token order.

    Args:
        blocks: vLLM's `KVCacheBlock`s.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> list[int]: ...

    def __getitem__(self, at: int | slice) -> int | list[int]:
        """The id at a place, or a list of those at some."""
        if isinstance(at, slice):
            return [block.block_id for block in self._blocks[at]]
        return int(self._blocks[at].block_id)
