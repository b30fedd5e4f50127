"""What KV blocks would hold, without computing any KV.

The KV of a token depends on all tokens up to it, so a hash chain over them stands for it. Blocks
and slots hold the chain values of their positions; computing a token checks that every earlier
position holds what it must.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Content = list[int | None]


class WrongKVError(AssertionError):
    """A request would have attended to another sequence's KV, or to none."""


class SymbolicKV:
    """Contents of GPU blocks and of the CPU tier's slots.

    Args:
        block_tokens: Tokens a block.
        token_at: The token that a request samples at a position.
    """

    def __init__(self, block_tokens: int, token_at: Callable[[str, int], int]) -> None:
        self._block_tokens = block_tokens
        self._token_at = token_at
        self._blocks: dict[int, Content] = {}
        self._slots: dict[int, list[Content]] = {}
        self._chains: dict[str, list[int]] = {}

    def compute(self, request: Any, block_ids: Sequence[int], start: int, end: int) -> None:
        """Compute tokens [start, end) of a request.

        Raises:
            WrongKVError: A block of the tokens before `start` does not hold them.
        """
        chain = self._chain(request, end)
        size = self._block_tokens
        for first in range(0, start, size):
            block = block_ids[first // size]
            wanted = chain[first : min(first + size, start)]
            held = self._blocks.get(block, [None] * size)[: len(wanted)]
            if held != wanted:
                raise WrongKVError(
                    f"{request.request_id}: tokens from {first} are not in block {block}"
                )
        for position in range(start, end):
            content = self._blocks.setdefault(block_ids[position // size], [None] * size)
            content[position % size] = chain[position]

    def copy(self, order: Any) -> None:
        """Execute a copy order of rank 0."""
        size = order.chunk_blocks
        for i, slot in enumerate(order.slots[0]):
            if slot < 0:
                continue
            for j in range(size):
                block = order.block_ids[i * size + j]
                if order.direction == "store":
                    empty: list[Content] = [[] for _ in range(size)]
                    content = self._blocks.get(block, [None] * self._block_tokens)
                    self._slots.setdefault(slot, empty)[j] = list(content)
                elif i * size + j >= order.skip_blocks:
                    self._blocks[block] = list(self._slots[slot][j])

    def _chain(self, request: Any, end: int) -> list[int]:
        chain = self._chains.setdefault(request.request_id, [])
        prompt = request.prompt_token_ids
        while len(chain) < end:
            position = len(chain)
            before = chain[-1] if chain else 0
            token = (
                prompt[position]
                if position < len(prompt)
                else self._token_at(request.request_id, position)
            )
            chain.append(hash((before, token)))
        return chain
