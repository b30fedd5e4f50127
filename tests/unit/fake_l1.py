"""L1 memory with a bounded number of slots, strict about what residency may do with it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtier.server.l1_store import ChunkId


class FakeL1:
    """`L1Store` with `n_slots` slots; offsets are multiples of the slot's bytes.

    As LMCache's L1: staged chunks cannot be read, a chunk that somebody else stages gets no slot,
    and nothing is allocated when not everything fits.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._free = list(reversed(range(n_slots)))
        self.staged: dict[ChunkId, tuple[int, str]] = {}
        self.chunks: dict[ChunkId, int] = {}
        self.locks: Counter[ChunkId] = Counter()
        self.read_by_others: set[ChunkId] = set()
        self.slot_bytes = 1

    @property
    def n_free(self) -> int:
        return len(self._free)

    def allocate(
        self, chunks: list[ChunkId], slot_bytes: int, tag: str
    ) -> dict[ChunkId, int] | None:
        self.slot_bytes = slot_bytes
        wanted = [c for c in chunks if c not in self.chunks and c not in self.staged]
        assert len(set(wanted)) == len(wanted)
        if len(wanted) > len(self._free):
            return None
        for chunk in wanted:
            self.staged[chunk] = (self._free.pop(), tag)
        return {chunk: self.staged[chunk][0] * slot_bytes for chunk in wanted}

    def admit(self, chunks: list[ChunkId], tag: str) -> list[ChunkId]:
        for chunk in chunks:
            slot, by = self.staged.pop(chunk)
            assert by == tag, f"{chunk} was staged by {by}, admitted by {tag}"
            self.chunks[chunk] = slot
        return chunks

    def discard(self, chunks: list[ChunkId], tag: str) -> None:
        for chunk in chunks:
            slot, by = self.staged.pop(chunk)
            assert by == tag, f"{chunk} was staged by {by}, discarded by {tag}"
            self._free.append(slot)

    def lock(self, chunks: list[ChunkId]) -> list[int | None]:
        self.locks.update(c for c in chunks if c in self.chunks)
        return [self.chunks[c] * self.slot_bytes if c in self.chunks else None for c in chunks]

    def unlock(self, chunks: list[ChunkId]) -> None:
        for chunk in chunks:
            assert self.locks[chunk] > 0, f"{chunk} is not locked"
            self.locks[chunk] -= 1
        self.locks = +self.locks

    def resident(self, chunk: ChunkId) -> bool:
        return chunk in self.chunks

    def delete(self, chunks: list[ChunkId]) -> list[ChunkId]:
        for chunk in chunks:
            assert not self.locks[chunk], f"{chunk} was evicted while it is read"
            if chunk in self.chunks and chunk not in self.read_by_others:
                self._free.append(self.chunks.pop(chunk))
        return [chunk for chunk in chunks if chunk in self.chunks]
