"""Finds the finished turn that a prompt continues, by the hash of the turn's last block.

A block hash of vLLM covers the block and everything before it, so one hash at the right place
stands for the whole prefix. Only ends of turns are kept: a prompt that shares no more than a
system prompt with a turn does not reach its end and does not match.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

V = TypeVar("V", bound=Hashable)


class PrefixIndex(Generic[V]):
    """Ends of prefixes: (scope, number of blocks, hash of the last block) -> values.

    Several values may share one end (n > 1, forks); the one added last comes first.
    A scope keeps tenants apart even if they should ever share a hash.

    Memory is one entry per value; ``add`` and ``remove`` cost a dict operation plus, when a
    length appears or disappears, a bisection of the distinct lengths.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[Hashable, int, bytes], dict[V, None]] = {}
        self._lengths: list[int] = []
        self._count_of_length: dict[int, int] = {}

    def __len__(self) -> int:
        """Return the number of distinct ends."""
        return len(self._values)

    def add(self, scope: Hashable, blocks: int, end_hash: bytes, value: V) -> None:
        """Register an end of ``blocks`` blocks (at least 1); adding it again makes it newest."""
        key = (scope, blocks, end_hash)
        values = self._values.get(key)
        if values is None:
            self._values[key] = {value: None}
            count = self._count_of_length.get(blocks, 0)
            self._count_of_length[blocks] = count + 1
            if count == 0:
                insort(self._lengths, blocks)
            return
        values.pop(value, None)
        values[value] = None

    def remove(self, scope: Hashable, blocks: int, end_hash: bytes, value: V) -> None:
        """Forget one value of an end; KeyError if it is not there."""
        key = (scope, blocks, end_hash)
        values = self._values[key]
        del values[value]
        if values:
            return
        del self._values[key]
        self._count_of_length[blocks] -= 1
        if self._count_of_length[blocks] == 0:
            del self._count_of_length[blocks]
            del self._lengths[bisect_right(self._lengths, blocks) - 1]

    def matches(self, scope: Hashable, block_hashes: Sequence[bytes]) -> Iterator[V]:
        """Yield the values whose end is a prefix of ``block_hashes``, longest first.

        One dict lookup per distinct registered length that is not longer than the prompt.
        """
        for at in range(bisect_right(self._lengths, len(block_hashes)) - 1, -1, -1):
            blocks = self._lengths[at]
            values = self._values.get((scope, blocks, block_hashes[blocks - 1]))
            if values is not None:
                yield from reversed(values)

    def longest(self, scope: Hashable, block_hashes: Sequence[bytes]) -> V | None:
        """Return the newest value of the longest matching end, or None."""
        return next(self.matches(scope, block_hashes), None)
