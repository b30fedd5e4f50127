"""What KV blocks would hold, without computing any KV.

The KV of a token depends on all tokens up to it, on what `meant_for` names and on the weights, so a hash
chain that begins with these and goes over the tokens stands for it. Blocks and slots hold the chain values
of their positions; computing a token checks that every earlier position holds what it must.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Content = list[int | None]


class WrongKVError(AssertionError):
    """A request would have attended to another sequence's KV, or to none."""


def meant_for(request: Any) -> tuple[Any, ...]:
    """What a request's KV depends on besides its token ids: tenant, adapter, prompt embeddings."""
    lora, embeds = request.lora_request, request.prompt_embeds
    return (
        request.cache_salt,
        None if lora is None else (lora.lora_name, lora.lora_path),
        None if embeds is None else tuple(embeds.flatten().tolist()),
    )


class SymbolicKV:
    """Contents of GPU blocks and of the CPU tier's slots.

    Args:
        block_tokens: Tokens a block.
        token_at: The token that a request samples at a position.

    Attributes:
        weights: Of the model; KV of others is wrong.
    """

    def __init__(self, block_tokens: int, token_at: Callable[[str, int], int]) -> None:
        self._block_tokens = block_tokens
        self._nothing: Content = [None] * block_tokens
        self._token_at = token_at
        self._blocks: dict[int, Content] = {}
        # By the region's generation, and the slot: a new server's memory is another one.
        self._slots: dict[tuple[str, int], list[Content]] = {}
        self._chains: dict[str, list[int]] = {}
        self.weights = 0

    def compute(self, request: Any, block_ids: Sequence[int], start: int, end: int) -> None:
        """Compute tokens [start, end) of a request.

        A step that was scheduled before its request ended may find the blocks before `start` given away:
        what it computes from them is thrown away, so only where it writes to matters.

        Raises:
            WrongKVError: A block of the tokens before `start` does not hold them.
        """
        # Of a streaming session: the token that it sampled last is not part of its next piece.
        del self._chains.setdefault(request.request_id, [])[start:]
        chain = self.chain(request, end)
        size = self._block_tokens
        for first in range(0, 0 if request.is_finished() else start, size):
            block = block_ids[first // size]
            wanted = chain[first : min(first + size, start)]
            held = self._blocks.get(block, self._nothing)[: len(wanted)]
            if held != wanted:
                raise WrongKVError(
                    f"{request.request_id}: tokens from {first} are not in block {block}"
                )
        for position in range(start, end):
            content = self._blocks.setdefault(block_ids[position // size], [None] * size)
            content[position % size] = chain[position]

    def copy(self, order: Any) -> None:
        """Execute a copy order of rank 0."""
        if order.direction == "store":
            self.write_slots(order, self.read_blocks(order))
            return
        for block, held in self._written_blocks(order):
            self._blocks[block] = list(held)

    def read_blocks(self, order: Any) -> list[Content]:
        """What the blocks of a store hold now."""
        return [list(self._blocks.get(block, self._nothing)) for block in order.block_ids]

    def write_slots(self, order: Any, contents: list[Content]) -> None:
        """Let a store's slots hold what was read."""
        size = order.chunk_blocks
        for i, slot in enumerate(order.slots[0]):
            if slot >= 0:
                self._slots[order.generation, slot] = contents[i * size : (i + 1) * size]

    def spoil(self, order: Any) -> None:
        """A copy has begun, or failed in the middle: what it writes to holds nobody's KV."""
        if order.direction == "store":
            self.write_slots(order, [self._nothing for _ in order.block_ids])
            return
        for block, _ in self._written_blocks(order):
            self._blocks[block] = list(self._nothing)

    def new_weights(self) -> None:
        """All KV is computed with other weights from now on."""
        self.weights += 1
        self._chains.clear()

    def forget(self, request_id: str) -> None:
        """The request is over, and its id may name another one."""
        self._chains.pop(request_id, None)

    def forget_slots(self, but_of: str) -> None:
        """The memory of other generations than this one has gone."""
        self._slots = {key: held for key, held in self._slots.items() if key[0] == but_of}

    def chain(self, request: Any, end: int) -> list[int]:
        """The values of a request's first `end` tokens, at least."""
        chain = self._chains.setdefault(request.request_id, [])
        prompt, n_prompt = request.prompt_token_ids, request.num_prompt_tokens
        before = chain[-1] if chain else self._seed(request)
        for position in range(len(chain), end):
            token = (
                prompt[position]
                if position < n_prompt
                else self._token_at(request.request_id, position)
            )
            before = hash((before, token))
            chain.append(before)
        return chain

    def last_of_block(self, block: int) -> int | None:
        """The value of a full block's last token; None where it is not full."""
        content = self._blocks.get(block)
        return content[-1] if content else None

    def last_of_slot(self, generation: str, slot: int) -> int | None:
        """The value of a chunk's last token; None where the slot holds none."""
        blocks = self._slots.get((generation, slot))
        return blocks[-1][-1] if blocks else None

    def _written_blocks(self, order: Any) -> Iterator[tuple[int, Content]]:
        size, unknown = order.chunk_blocks, [self._nothing] * order.chunk_blocks
        for i, slot in enumerate(order.slots[0]):
            if slot < 0:
                continue
            held = self._slots.get((order.generation, slot), unknown)
            for j in range(max(0, order.skip_blocks - i * size), size):
                yield order.block_ids[i * size + j], held[j]

    def _seed(self, request: Any) -> int:
        return hash((meant_for(request), self.weights))
