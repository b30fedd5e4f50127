"""L1 memory of a virtual LMCache server: slots that are counted, and hold nothing."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtier.server.l1_store import ChunkId


class MemoryL1:
    """An `L1Store` of `n_slots` slots, all of the same size.

    As LMCache's L1: staged chunks cannot be read, a chunk that somebody else stages gets no slot, and
    nothing is allocated where not everything fits.
    """

    def __init__(self, n_slots: int) -> None:
        self._n_free = n_slots
        self._staged: dict[ChunkId, str] = {}
        self._resident: set[ChunkId] = set()
        self._locks: Counter[ChunkId] = Counter()

    @property
    def n_free(self) -> int:
        """Slots that hold no chunk."""
        return self._n_free

    def allocate(
        self,
        chunks: list[ChunkId],
        slot_bytes: int,  # noqa: ARG002
        tag: str,
    ) -> dict[ChunkId, int] | None:
        """See `L1Store`. Offsets mean nothing here; they are 0."""
        wanted = [c for c in chunks if c not in self._resident and c not in self._staged]
        if len(wanted) > self._n_free:
            return None
        self._n_free -= len(wanted)
        self._staged.update(dict.fromkeys(wanted, tag))
        return dict.fromkeys(wanted, 0)

    def admit(self, chunks: list[ChunkId], tag: str) -> list[ChunkId]:
        """See `L1Store`."""
        mine = [chunk for chunk in chunks if self._staged.get(chunk) == tag]
        for chunk in mine:
            del self._staged[chunk]
        self._resident.update(mine)
        return mine

    def discard(self, chunks: list[ChunkId], tag: str) -> None:
        """See `L1Store`."""
        for chunk in chunks:
            if self._staged.get(chunk) == tag:
                del self._staged[chunk]
                self._n_free += 1

    def lock(self, chunks: list[ChunkId]) -> list[int | None]:
        """See `L1Store`."""
        found = [0 if chunk in self._resident else None for chunk in chunks]
        self._locks.update(c for c, slot in zip(chunks, found, strict=True) if slot is not None)
        return found

    def unlock(self, chunks: list[ChunkId]) -> None:
        """See `L1Store`."""
        for chunk in chunks:
            self._locks[chunk] -= 1
            if self._locks[chunk] <= 0:
                del self._locks[chunk]

    def resident(self, chunk: ChunkId) -> bool:
        """See `L1Store`."""
        return chunk in self._resident

    def delete(self, chunks: list[ChunkId]) -> list[ChunkId]:
        """See `L1Store`."""
        for chunk in chunks:
            if chunk in self._resident:
                assert chunk not in self._locks, f"{chunk} was evicted while it is read"
                self._resident.remove(chunk)
                self._n_free += 1
        return []
