"""Keys of KV chunks in the CPU tier.

A key is a rolling BLAKE2b over everything the KV depends on besides the engine's namespace: adapter,
tenant, and all tokens up to the chunk's end. It does not use vLLM's block hashes, whose seed is random
per process unless PYTHONHASHSEED is set: keys must be the same after an engine restart.

Hashing a 100k-token prompt costs about 2 ms, so each program keeps its `ChunkChain` and only hashes what
is new; whether the prefix is unchanged is asked of vLLM's own block hashes, which it has computed anyway.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from typing import TYPE_CHECKING, Final

from kvtier.wire import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

_TOKEN_BYTES: Final = 8
_PIECE_CHUNKS: Final = 32


def namespace(**parts: object) -> str:
    """Name of a set of compatible KV: model, revision, dtype, layout, epoch... (DESIGN D7).

    Args:
        parts: Everything engine-wide that the bytes depend on; `model` is kept readable.

    Returns:
        `<model>.<digest>`, without the characters that LMCache forbids in model names.
    """
    digest = sha256(repr(sorted((k, str(v)) for k, v in parts.items())).encode()).hexdigest()[:24]
    readable = "".join(c if c.isalnum() or c in "-._" else "-" for c in str(parts.get("model", "")))
    return f"{readable[-40:]}.{digest}"


def chain_seed(*, adapter: str | None, tenant: str | None) -> bytes:
    """Start of a chain: KV of different adapters and tenants never share a key."""
    return sha256(repr((adapter or "", tenant or "")).encode()).digest()[:KEY_BYTES]


@dataclass(slots=True)
class ChunkChain:
    """The chunk keys of one token sequence, extended as it grows.

    Attributes:
        seed: See `chain_seed`.
        chunk_tokens: Tokens a chunk; a multiple of the block size.
        keys: `KEY_BYTES` a chunk, concatenated.
        marks: The engine's block hash at the end of each chunk: equal hash, equal prefix.
    """

    seed: bytes
    chunk_tokens: int
    keys: bytearray = field(default_factory=bytearray)
    marks: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.marks)

    def head(self, n_chunks: int) -> ChunkChain:
        """The chain of the first `n_chunks` chunks."""
        if n_chunks >= len(self):
            return self
        keys = self.keys[: n_chunks * KEY_BYTES]
        return ChunkChain(self.seed, self.chunk_tokens, keys, self.marks[:n_chunks])

    def common_chunks(self, other: ChunkChain) -> int:
        """How many leading chunks both chains share."""
        return _common_prefix(self.marks, other.marks, 1, len(other))

    def extended(
        self, tokens: Sequence[int], n_tokens: int, block_hashes: Sequence[bytes], block_tokens: int
    ) -> ChunkChain:
        """The chain of another sequence, re-using this one's keys where the prefix is the same.

        Args:
            tokens: Token ids, at least `n_tokens`.
            n_tokens: How many of them count; only whole chunks get a key.
            block_hashes: The engine's chained hash of each full block of `tokens`.
            block_tokens: Tokens a block.

        Returns:
            A new chain; this one is unchanged.
        """
        per_chunk = self.chunk_tokens // block_tokens
        n_chunks = min(n_tokens // self.chunk_tokens, len(block_hashes) // per_chunk)
        common = _common_prefix(self.marks, block_hashes, per_chunk, n_chunks)
        keys = self.keys[: common * KEY_BYTES]
        marks = self.marks[:common]
        key = bytes(keys[-KEY_BYTES:]) if common else self.seed
        chunk_bytes = self.chunk_tokens * _TOKEN_BYTES
        # By the piece: to pack the engine's list chunk by chunk takes a quarter longer, and so does one large piece,
        # for which memory has to be fetched from the system.
        for first in range(common, n_chunks, _PIECE_CHUNKS):
            last = min(first + _PIECE_CHUNKS, n_chunks)
            piece = tokens[first * self.chunk_tokens : last * self.chunk_tokens]
            data = struct.pack(f"{len(piece)}q", *piece)
            for start in range(0, len(data), chunk_bytes):
                hashed = key + data[start : start + chunk_bytes]
                key = blake2b(hashed, digest_size=KEY_BYTES).digest()
                keys += key
        for chunk in range(common, n_chunks):
            marks.append(bytes(block_hashes[(chunk + 1) * per_chunk - 1]))
        return ChunkChain(self.seed, self.chunk_tokens, keys, marks)


def _common_prefix(
    marks: list[bytes], block_hashes: Sequence[bytes], per_chunk: int, n_chunks: int
) -> int:
    """How many leading chunks agree: hashes are chained, so a binary search over ends is exact."""
    low, high = 0, min(len(marks), n_chunks)
    while low < high:
        middle = (low + high + 1) // 2
        if marks[middle - 1] == block_hashes[middle * per_chunk - 1]:
            low = middle
        else:
            high = middle - 1
    return low
