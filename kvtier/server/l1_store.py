"""What residency needs of the memory it keeps books of: LMCache's L1 in the server, others in replay and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ChunkId:
    """One chunk of one rank."""

    namespace: str
    key: bytes
    rank: int


class L1Store(Protocol):
    """The operations on L1 memory that residency needs. Offsets are bytes into the shared region."""

    def allocate(
        self, chunks: list[ChunkId], slot_bytes: int, tag: str
    ) -> dict[ChunkId, int] | None:
        """Stage new chunks: all of `chunks` that are not resident get a slot, or None when full."""

    def admit(self, chunks: list[ChunkId], tag: str) -> list[ChunkId]:
        """Make staged chunks resident; returns those that are resident now."""

    def discard(self, chunks: list[ChunkId], tag: str) -> None:
        """Give up staged chunks."""

    def lock(self, chunks: list[ChunkId]) -> list[int | None]:
        """Read-lock resident chunks; the offset of each, None where it is not resident."""

    def unlock(self, chunks: list[ChunkId]) -> None:
        """Undo `lock`."""

    def resident(self, chunk: ChunkId) -> bool:
        """Whether the chunk can be read."""

    def delete(self, chunks: list[ChunkId]) -> list[ChunkId]:
        """Free resident chunks; unknown ones are ignored.

        Returns those that stay, as somebody beside residency reads them: LMCache, to write them to a disk.
        """
