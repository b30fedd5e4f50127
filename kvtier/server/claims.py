"""What engines hold of the CPU tier's chunks: locks of those that are read, reservations of those that are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtier.server.l1_store import ChunkId


@dataclass(slots=True)
class Reservation:
    """Room for a program's chunks that an engine is writing; invisible until it is committed.

    Attributes:
        namespace: Of the keys.
        program: Whose chunks they will be.
        keys: The program's chain.
        end: Where in the chain the reserved chunks end.
        chunks: What is being written, of every rank; not what was there before.
        tag: The reservation's name in the store.
        ranks: Ranks of a chunk.
        slot_bytes: Size of one rank's slot.
        value_s: What losing the program would cost, in seconds.
        lease_s: For how long the value holds after the commit.
    """

    namespace: str
    program: str
    keys: list[bytes]
    end: int
    chunks: list[ChunkId]
    tag: str
    ranks: int
    slot_bytes: int
    value_s: float
    lease_s: float


@dataclass(slots=True)
class Lock:
    """Chunks `start` to `start + len(keys)` of a lookup's chain, which are not evicted while they are read."""

    namespace: str
    keys: list[bytes]
    start: int
    ranks: int
