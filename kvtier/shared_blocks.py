"""Blocks that programs have in common, so that sums over programs can count them once.

Agents of one kind begin alike: tens of thousands of tokens of instructions and tools, which vLLM keeps once however
many requests use them. Who has which blocks in common is told by their hashes, as one hash of vLLM stands for its
block and all before it.

Not every block is looked at. Places at which two prompts are compared lie further and further apart, by a twelfth
of their distance from the beginning, so that a prompt of 100,000 tokens is some 80 hashes. What two programs have
in common is found too small by as much at most.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

Key = TypeVar("Key", bound=Hashable)
Beginning = tuple[bytes, ...]
"""Hashes of a prompt's blocks at the places of `PLACES`."""

_COARSENESS: Final = 12
_MOST_BLOCKS: Final = 1 << 20


def _places() -> tuple[int, ...]:
    places = [1]
    while places[-1] < _MOST_BLOCKS:
        places.append(places[-1] + max(1, places[-1] // _COARSENESS))
    return tuple(places)


PLACES: Final = _places()
"""Numbers of leading blocks that are compared."""
_WIDTHS: Final = (PLACES[0], *(later - earlier for earlier, later in pairwise(PLACES)))
"""Blocks between a place and the one before it."""


def beginning(block_hashes: Sequence[bytes]) -> Beginning:
    """What `SharedBlocks` goes by of a prompt, given the hashes of its full blocks."""
    found = []
    n_blocks = len(block_hashes)
    for place in PLACES:
        if place > n_blocks:
            break
        found.append(block_hashes[place - 1])
    return tuple(found)


class SharedBlocks(Generic[Key]):
    """The beginnings of a set of programs. A call costs O(places of the beginning).

    Attributes:
        repeated_blocks: Blocks that several programs have, counted for each of them.
        distinct_blocks: The same, counted once.
    """

    def __init__(self) -> None:
        self._beginnings: dict[Key, Beginning] = {}
        self._holders: dict[bytes, int] = {}
        self.repeated_blocks = 0
        self.distinct_blocks = 0

    def __len__(self) -> int:
        """Return the number of programs."""
        return len(self._beginnings)

    @property
    def excess_blocks(self) -> int:
        """By how much a sum over the programs' blocks is too large."""
        return self.repeated_blocks - self.distinct_blocks

    def put(self, program: Key, beginning: Beginning) -> None:
        """Count a program, or what its longest prompt begins with: of requests side by side, one counts."""
        known = self._beginnings.get(program, ())
        kept = len(known)
        if len(beginning) < kept or beginning == known:
            self._beginnings.setdefault(program, ())
            return
        if beginning[:kept] != known:
            self._forget(known)
            kept = 0
        self._beginnings[program] = beginning
        holders = self._holders
        for at in range(kept, len(beginning)):
            n_holders = holders[beginning[at]] = holders.get(beginning[at], 0) + 1
            if n_holders > 1:
                width = _WIDTHS[at]
                self.repeated_blocks += width
                if n_holders == 2:  # noqa: PLR2004 - the first one's count, too, now
                    self.repeated_blocks += width
                    self.distinct_blocks += width

    def drop(self, program: Key) -> None:
        """Count a program no more. Harmless where it is not counted."""
        self._forget(self._beginnings.pop(program, ()))

    def found_blocks(self, beginning: Beginning, least_holders: int = 1) -> int:
        """How many of a prompt's leading blocks so many programs of the set have."""
        # Who has a block of a text has those before it, so holders only become fewer.
        n_places = bisect_left(
            beginning, True, key=lambda block_hash: self._holders.get(block_hash, 0) < least_holders
        )
        return PLACES[n_places - 1] if n_places else 0

    def repeated_of(self, program: Key) -> int:
        """How many of a program's blocks others have, too."""
        return self.found_blocks(self._beginnings.get(program, ()), 2)

    def _forget(self, beginning: Beginning) -> None:
        holders = self._holders
        for at, block_hash in enumerate(beginning):
            n_holders = holders[block_hash] - 1
            if not n_holders:
                del holders[block_hash]
                continue
            holders[block_hash] = n_holders
            width = _WIDTHS[at]
            self.repeated_blocks -= width
            if n_holders == 1:
                self.repeated_blocks -= width
                self.distinct_blocks -= width
