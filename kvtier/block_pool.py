"""The one place that touches vLLM's block pool and KV cache manager (DESIGN D2).

vLLM's pool is not thread-safe: call this from connector hooks only. Upstream calls direct pool access
temporary, so everything that may change is here, and what a version lacks is found by feature, not by
version number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class VllmBlockPool:
    """References on GPU blocks by block id."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._blocks = pool.blocks

    @property
    def n_blocks(self) -> int:
        """Usable blocks (vLLM keeps one as the null block)."""
        return int(self._pool.num_gpu_blocks) - 1

    @property
    def n_free(self) -> int:
        """Blocks that an allocation may take, cached ones included."""
        return int(self._pool.get_num_free_blocks())

    def n_references(self, block_id: int) -> int:
        """Holders of a block: running requests, and us."""
        return int(self._blocks[block_id].ref_cnt)

    def pinnable(self, block_ids: Iterable[int]) -> list[int]:
        """Those that a later request can hit: full, hashed blocks, not the null block."""
        blocks = self._blocks
        return [b for b in block_ids if not blocks[b].is_null and blocks[b].block_hash is not None]

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Take a reference on each block."""
        blocks = self._blocks
        self._pool.touch([blocks[b] for b in block_ids])

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop a reference on each block, given in sequence order; the tail is evicted first."""
        blocks = self._blocks
        self._pool.free_blocks([blocks[b] for b in reversed(block_ids)])

    def n_uncached_free(self, limit: int) -> int:
        """Free blocks that hold nobody's KV, counted up to `limit` from the head of the free queue.

        vLLM puts blocks without a hash at the head, so the count stops at the first hashed one.
        """
        queue = self._pool.free_block_queue
        node = queue.fake_free_list_head.next_free_block
        tail = queue.fake_free_list_tail
        count = 0
        while node is not None and node is not tail and count < limit and node.block_hash is None:
            count += 1
            node = node.next_free_block
        return count


def wrap_allocation(
    manager: Any,
    make_room: Callable[[Any, Callable[[], Any]], Any],
    before_reset: Callable[[], None],
) -> None:
    """Let pins yield exactly when an allocation would fail, and before a prefix-cache reset.

    A connector has no hook for "a waiting request did not fit" nor for requests whose KV was loaded, so
    the manager's bound methods are replaced on the instance.

    Args:
        manager: vLLM's KVCacheManager.
        make_room: Called with the request and a function that repeats the allocation when it returned
            None; returns the final result.
        before_reset: Called before `reset_prefix_cache`, which refuses while blocks are referenced.
    """
    allocate, reset = manager.allocate_slots, manager.reset_prefix_cache

    def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
        result = allocate(request, *args, **kwargs)
        if result is None:
            result = make_room(request, lambda: allocate(request, *args, **kwargs))
        return result

    def reset_prefix_cache(*args: Any, **kwargs: Any) -> Any:
        before_reset()
        return reset(*args, **kwargs)

    manager.allocate_slots = allocate_slots
    manager.reset_prefix_cache = reset_prefix_cache
