"""What a prefetch needs to know of a program's last paused turn: where its KV is kept, and under which hashes.

vLLM finds KV by the hashes of blocks of tokens, which it computes for a request and forgets with it. They
are kept here, packed: 32 bytes a block instead of an object each. To join a 100k-token turn's takes 50 us,
so they stay over the program's return, and the next pause adds only what is new.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvtier.chunk_keys import ChunkChain
    from kvtier.turns.turn import Turn

MAX_BYTES = 64 << 20
"""Hashes that are kept in all, some 300 programs of 100k tokens; who paused longest ago gives way."""


@dataclass(slots=True)
class PausedTurn:
    """A finished turn.

    Attributes:
        request_id: The turn's request; its pin is named so.
        tool: The tool that the program waits for.
        salt: vLLM's `cache_salt`, None without one.
        prompt_blocks: How many of its blocks hold prompt, see `PinnedTurn`.
        chain: Chunk keys of its tokens.
        hashes: vLLM's hashes of its reusable blocks, one behind the other.
        hash_bytes: Length of one.
    """

    request_id: str
    tool: str | None
    salt: str | None
    prompt_blocks: int
    chain: ChunkChain
    hashes: bytearray
    hash_bytes: int

    @property
    def n_blocks(self) -> int:
        """Blocks that a later prompt can hit."""
        return len(self.hashes) // self.hash_bytes

    def hash_at(self, block: int) -> bytes:
        """The hash of one block."""
        return bytes(self.hashes[block * self.hash_bytes : (block + 1) * self.hash_bytes])

    def hashes_from(self, first: int, end: int) -> Iterator[bytes]:
        """The hashes of blocks [first, end)."""
        return map(self.hash_at, range(first, min(end, self.n_blocks)))


class PausedTurns:
    """The last paused turn of each program.

    Args:
        max_bytes: Most bytes of hashes.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0
        # Who paused last comes last.
        self._turns: OrderedDict[str, PausedTurn] = OrderedDict()

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def n_bytes(self) -> int:
        """Bytes of all hashes."""
        return self._n_bytes

    def get(self, program: str) -> PausedTurn | None:
        """The program's last paused turn."""
        return self._turns.get(program)

    def turn_paused(
        self, turn: Turn, tool: str | None, n_blocks: int, chain: ChunkChain, block_tokens: int
    ) -> None:
        """A turn has paused, whose first `n_blocks` blocks a later prompt can hit; see `remember`."""
        request = turn.request
        self.remember(
            turn.program,
            turn.request_id,
            request.block_hashes,
            n_blocks,
            chain,
            prompt_blocks=request.num_prompt_tokens // block_tokens,
            tool=tool,
            salt=request.cache_salt,
        )

    def remember(
        self,
        program: str,
        request_id: str,
        block_hashes: Sequence[bytes],
        n_blocks: int,
        chain: ChunkChain,
        *,
        prompt_blocks: int,
        tool: str | None,
        salt: str | None,
    ) -> None:
        """A turn has paused.

        Args:
            program: Whose it is.
            request_id: Its request.
            block_hashes: vLLM's hashes of its blocks, which are chained.
            n_blocks: How many of the blocks can be hit; at least 1.
            chain: Chunk keys of their tokens.
            prompt_blocks: See `PausedTurn`.
            tool: See `PausedTurn`.
            salt: See `PausedTurn`.
        """
        before = self._turns.pop(program, None)
        width, hashes = len(block_hashes[0]), bytearray()
        if before is not None:
            self._n_bytes -= len(before.hashes)
            if before.hash_bytes == width:
                hashes = before.hashes
        n_known = _common_prefix(hashes, width, block_hashes, n_blocks)
        # In place: a turn that is loaded right now is no paused one, and what is on its way knows its hashes.
        del hashes[n_known * width :]
        hashes += b"".join(block_hashes[n_known:n_blocks])
        self._turns[program] = PausedTurn(
            request_id, tool, salt, prompt_blocks, chain, hashes, width
        )
        self._n_bytes += len(hashes)
        while self._n_bytes > self._max_bytes:
            _, oldest = self._turns.popitem(last=False)
            self._n_bytes -= len(oldest.hashes)

    def forget(self, program: str) -> None:
        """The program is over."""
        turn = self._turns.pop(program, None)
        if turn is not None:
            self._n_bytes -= len(turn.hashes)

    def clear(self) -> None:
        """Nothing of what has paused can be read again."""
        self._turns.clear()
        self._n_bytes = 0


def _common_prefix(
    packed: bytearray, width: int, block_hashes: Sequence[bytes], n_blocks: int
) -> int:
    """How many leading hashes agree: they are chained, so a binary search over ends is exact."""
    low, high = 0, min(len(packed) // width, n_blocks)
    middle = high
    while low < high:
        if packed[(middle - 1) * width : middle * width] == block_hashes[middle - 1]:
            low = middle
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    return low
