"""What kvtier sees of vLLM: requests and a block pool, without vLLM.

The pool keeps vLLM's rules: blocks are counted, free ones queue up with those without a hash in
front, a cached block can be hit until its memory is given to somebody else.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvtier.turns.engine_facts import EngineFacts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

BLOCK_TOKENS = 4
CHUNK_TOKENS = 8


def engine_facts(*, ranks: int = 1, pin_budget_fraction: float = 1.0) -> EngineFacts:
    """A slow model with a small KV cache: prefill is worth avoiding, the link is not felt."""
    return EngineFacts(
        owner="engine",
        identity=(("model", "m"),),
        block_tokens=BLOCK_TOKENS,
        block_bytes=1000,
        chunk_tokens=CHUNK_TOKENS,
        ranks=ranks,
        pin_budget_fraction=pin_budget_fraction,
        n_parameters=10**13,
        n_layers=10,
        attention_width=1000,
        on_cpu=False,
        batch_requests=64,
        step_tokens=1000,
    )


@dataclass(slots=True, eq=False)
class FakeBlock:
    """vLLM's `KVCacheBlock`. `content` stands for the KV: see `content_of`."""

    block_id: int
    ref_cnt: int = 0
    block_hash: bytes | None = None
    is_null: bool = False
    next_free_block: Any = None
    content: object = None


class FakePool:
    """vLLM's `BlockPool` with `n_blocks` usable blocks; block 0 is the null block."""

    hash_block_size = BLOCK_TOKENS

    def __init__(self, n_blocks: int) -> None:
        self.num_gpu_blocks = n_blocks + 1
        self.blocks = [FakeBlock(i) for i in range(n_blocks + 1)]
        self.blocks[0].is_null = True
        self._free: OrderedDict[int, FakeBlock] = OrderedDict(
            (b.block_id, b) for b in self.blocks[1:]
        )
        self._cached: dict[bytes, FakeBlock] = {}

    @property
    def references(self) -> dict[int, int]:
        """Reference counts that are not zero."""
        return {b.block_id: b.ref_cnt for b in self.blocks if b.ref_cnt}

    @property
    def cached_block_hash_to_block(self) -> dict[bytes, FakeBlock]:
        return self._cached

    @property
    def free_block_queue(self) -> Any:
        tail = SimpleNamespace(block_hash=None, next_free_block=None)
        head = node = SimpleNamespace(next_free_block=tail)
        for block in self._free.values():
            node.next_free_block = block
            node = block  # type: ignore[assignment]
        node.next_free_block = tail
        return SimpleNamespace(fake_free_list_head=head, fake_free_list_tail=tail)

    def get_num_free_blocks(self) -> int:
        return len(self._free)

    def touch(self, blocks: Sequence[FakeBlock]) -> None:
        for block in blocks:
            if block.ref_cnt == 0:
                del self._free[block.block_id]
            block.ref_cnt += 1

    def free_blocks(self, blocks: Iterable[FakeBlock]) -> None:
        for block in blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0, f"block {block.block_id} was freed once too often"
            if block.ref_cnt == 0:
                self._free[block.block_id] = block
                if block.block_hash is None:
                    self._free.move_to_end(block.block_id, last=False)

    def take(self, n_blocks: int) -> list[FakeBlock] | None:
        """New blocks with one reference; their old KV is gone. None when there are too few."""
        if n_blocks > len(self._free):
            return None
        taken = []
        for _ in range(n_blocks):
            _, block = self._free.popitem(last=False)
            if block.block_hash is not None:
                self._cached.pop(block.block_hash, None)
            block.block_hash, block.content, block.ref_cnt = None, None, 1
            taken.append(block)
        return taken

    def get_new_blocks(self, n_blocks: int) -> list[FakeBlock]:
        taken = self.take(n_blocks)
        assert taken is not None, "the caller must look first"
        return taken

    def get_cached_block(self, block_hash: bytes, group_ids: Sequence[int]) -> list[FakeBlock]:
        assert list(group_ids) == [0]
        block = self._cached.get(block_hash)
        return [] if block is None else [block]

    def cache_full_blocks(
        self,
        *,
        request: Any,
        blocks: Sequence[FakeBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
    ) -> None:
        assert (block_size, kv_cache_group_id) == (BLOCK_TOKENS, 0)
        for i in range(num_cached_blocks, num_full_blocks):
            assert blocks[i].block_hash is None
            assert request.block_hashes[i] not in self._cached
            self.cache(blocks[i].block_id, request.block_hashes[i])

    def cache(self, block_id: int, block_hash: bytes) -> None:
        """A block is full and computed: it can be hit, unless another one is hit for it already."""
        block = self.blocks[block_id]
        if block.block_hash is None:
            block.block_hash = block_hash
            self._cached.setdefault(block_hash, block)

    def find(self, block_hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix."""
        hit: list[int] = []
        for block_hash in block_hashes:
            block = self._cached.get(block_hash)
            if block is None:
                break
            hit.append(block.block_id)
        return hit

    def reset(self) -> bool:
        """Forget all hashes; refused while a block is referenced."""
        if any(b.ref_cnt for b in self.blocks):
            return False
        self._cached.clear()
        for block in self.blocks:
            block.block_hash = None
        return True


def content_of(tokens: Sequence[int], last_block: int, *, salt: object = None) -> bytes:
    """What block `last_block` of this sequence holds: KV depends on all tokens before it, on the
    adapter, and on the weights (`salt`).
    """
    text = repr((salt, list(tokens[: (last_block + 1) * BLOCK_TOKENS])))
    return blake2b(text.encode(), digest_size=16).digest()


@dataclass(eq=False)
class FakeRequest:
    """A vLLM request, as far as kvtier reads it."""

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int = 4
    session_id: str | None = None
    cache_salt: str | None = None
    kv_transfer_params: Any = None
    lora_request: Any = None
    mm_features: Any = None
    prompt_embeds: Any = None
    priority: int = 0
    skip_reading_prefix_cache: bool = False
    stop: tuple[str, ...] = ()
    trace_headers: Any = None
    num_computed_tokens: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    status: Any = field(default_factory=lambda: SimpleNamespace(name="WAITING"))
    _hashes: list[bytes] = field(default_factory=list)

    @property
    def sampling_params(self) -> Any:
        return SimpleNamespace(stop=list(self.stop))

    @property
    def all_token_ids(self) -> list[int]:
        return [*self.prompt_token_ids, *self.output_token_ids]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def salt(self) -> tuple[str | None, str | None]:
        """What the KV depends on besides tokens and weights."""
        adapter = None if self.lora_request is None else self.lora_request.lora_name
        return self.cache_salt, adapter

    @property
    def block_hashes(self) -> list[bytes]:
        tokens = self.all_token_ids
        for i in range(len(self._hashes), len(tokens) // BLOCK_TOKENS):
            before = self._hashes[-1] if i else repr(self.salt).encode()
            block = repr(tokens[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]).encode()
            self._hashes.append(blake2b(before + block, digest_size=32).digest())
        return self._hashes

    def set_status(self, name: str) -> None:
        self.status = SimpleNamespace(name=name)
