"""The one place that touches vLLM's block pool and KV cache manager (DESIGN D2).

vLLM's pool is not thread-safe: call this from connector hooks only. Upstream calls direct pool access
temporary, so everything that may change is here, and what a version lacks is found by feature, not by
version number.
"""

from __future__ import annotations

from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvtier.block_ids import as_block_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from kvtier.block_ids import BlockIds

_COUNTED_FREE_BLOCKS = 64
_references_of = attrgetter("ref_cnt")


class VllmBlockPool:
    """References on GPU blocks by block id.

    Args:
        pool: vLLM's BlockPool.
        request_blocks: See `request_blocks`.
    """

    def __init__(self, pool: Any, request_blocks: Mapping[str, list[Any]] | None = None) -> None:
        self._pool = pool
        self._request_blocks = request_blocks if request_blocks is not None else {}
        self._blocks = pool.blocks
        # The same objects, to be picked by an array of ids.
        self._by_id = np.array(pool.blocks, dtype=object)

    @property
    def n_blocks(self) -> int:
        """Usable blocks (vLLM keeps one as the null block)."""
        return int(self._pool.num_gpu_blocks) - 1

    @property
    def n_free(self) -> int:
        """Blocks that an allocation may take, cached ones included."""
        return int(self._pool.get_num_free_blocks())

    def references(self, block_ids: BlockIds) -> NDArray[np.int64]:
        """For each block, its holders: running requests, and us."""
        blocks = self._by_id[block_ids].tolist()
        return np.fromiter(map(_references_of, blocks), np.int64, len(blocks))

    def pinnable(self, block_ids: Sequence[int], *, all_hashed: bool) -> BlockIds:
        """The leading blocks that a later request can hit: full, hashed blocks, not the null block.

        Args:
            block_ids: A finished request's full and computed blocks, in token order.
            all_hashed: vLLM hashes a request's blocks in order: if the last one is hashed, they all
                are, and none but it is looked at. Not so after a failed load.
        """
        blocks = self._blocks
        if not block_ids:
            return as_block_ids(())
        ends = (blocks[block_ids[0]], blocks[block_ids[-1]])
        if all_hashed and all(map(_is_hashed, ends)):
            return as_block_ids(block_ids)
        for i, block_id in enumerate(block_ids):
            if not _is_hashed(blocks[block_id]):
                return as_block_ids(block_ids[:i])
        return as_block_ids(block_ids)

    def take_over(self, request_id: str, block_ids: BlockIds) -> bool:
        """Make a finished request's references on its leading blocks ours: it gives back only the rest.

        To take a reference on each block and let the request drop its own comes to the same, and takes
        a millisecond at 100k tokens.

        Returns:
            False, and nothing is done, where these are not the request's leading blocks.
        """
        blocks, n_blocks = self._request_blocks.get(request_id), len(block_ids)
        if not blocks or not 0 < n_blocks <= len(blocks):
            return False
        ends = (blocks[0].block_id, blocks[n_blocks - 1].block_id)
        if ends != (block_ids[0], block_ids[-1]):
            return False
        del blocks[:n_blocks]
        return True

    def acquire(self, block_ids: BlockIds) -> None:
        """Take a reference on each block.

        Most are referenced still: one more is an addition. Others may be in the queue of free blocks,
        and only vLLM takes them out. To give all of them to `touch` would take three times as long, and
        its metrics would see accesses.
        """
        for block in self._by_id[block_ids].tolist():
            if block.ref_cnt:
                block.ref_cnt += 1
            else:
                self._pool.touch((block,))

    def release(self, block_ids: BlockIds) -> None:
        """Drop a reference on each block, given in sequence order; the tail is evicted first.

        Who uses a block of a text also uses those before it. So where the last one has another holder,
        as when a program has returned to its KV, most have one, and nothing is freed: a subtraction.
        """
        blocks = self._by_id[block_ids[::-1]].tolist()
        if blocks and blocks[0].ref_cnt > 1:
            ours_alone = []
            for block in blocks:
                if block.ref_cnt > 1:
                    block.ref_cnt -= 1
                else:
                    ours_alone.append(block)
            blocks = ours_alone
        if blocks:
            self._pool.free_blocks(blocks)

    def allocate(self, n_blocks: int) -> BlockIds | None:
        """Take free blocks, each with one reference, which is the caller's; None where there are too few."""
        if n_blocks > self.n_free:
            return None
        return as_block_ids([block.block_id for block in self._pool.get_new_blocks(n_blocks)])

    def cached_prefix(self, block_hashes: Iterable[bytes]) -> BlockIds:
        """The blocks that a prompt with these hashes would hit, up to the first that none holds."""
        hit = []
        for block_hash in block_hashes:
            found = self._pool.get_cached_block(block_hash, [0])
            if not found:
                break
            hit.append(found[0].block_id)
        return as_block_ids(hit)

    def cache(self, block_ids: BlockIds, block_hashes: Sequence[bytes], first: int) -> BlockIds:
        """Let prompts hit blocks of ours that hold loaded KV, as vLLM does for a request that has computed it.

        Args:
            block_ids: The blocks, new and in token order.
            block_hashes: Their hashes.
            first: How many blocks come before them in the sequence.

        Returns:
            The block that each hash hits from now on: another one where it was cached already.
        """
        blocks, hit, run = self._by_id[block_ids].tolist(), block_ids.copy(), 0
        for i, block_hash in enumerate(block_hashes):
            found = self._pool.get_cached_block(block_hash, [0])
            if found:
                hit[i] = found[0].block_id
                self._cache_run(blocks[run:i], block_hashes[run:i], first + run)
                run = i + 1
        self._cache_run(blocks[run:], block_hashes[run:], first + run)
        return hit

    def _cache_run(self, blocks: list[Any], block_hashes: Sequence[bytes], first: int) -> None:
        if not blocks:
            return
        # What vLLM's method reads of a request. For its events it would also read the tokens, which nobody
        # knows any more: who follows them does not hear of these blocks.
        pool, told = self._pool, getattr(self._pool, "enable_kv_cache_events", False)
        pool.enable_kv_cache_events = False
        try:
            pool.cache_full_blocks(
                request=SimpleNamespace(block_hashes=[*[b""] * first, *block_hashes]),
                blocks=[*[None] * first, *blocks],
                num_cached_blocks=first,
                num_full_blocks=first + len(blocks),
                block_size=pool.hash_block_size,
                kv_cache_group_id=0,
            )
        finally:
            pool.enable_kv_cache_events = told

    def n_uncached_free(self, limit: int) -> int:
        """Free blocks that hold nobody's KV, up to `limit`.

        vLLM puts blocks without a hash at the head of the free queue, so a count stops at the first
        hashed one. Where there are many, the rest is estimated, which takes no walk: all blocks less
        one for each cached hash. That is too many by those that running requests have not filled yet.
        """
        queue = self._pool.free_block_queue
        node = queue.fake_free_list_head.next_free_block
        tail = queue.fake_free_list_tail
        most = min(limit, _COUNTED_FREE_BLOCKS)
        count = 0
        while node is not None and node is not tail and count < most and node.block_hash is None:
            count += 1
            node = node.next_free_block
        if count < most or count == limit:
            return count
        n_hashes = len(self._pool.cached_block_hash_to_block)
        return max(count, min(limit, self.n_free, self.n_blocks - n_hashes))


def _is_hashed(block: Any) -> bool:
    return not block.is_null and block.block_hash is not None


def request_blocks(manager: Any) -> Mapping[str, list[Any]] | None:
    """The blocks of each request, in the KV cache manager's own lists; None where it has several groups."""
    coordinator = getattr(manager, "coordinator", None)
    groups: Any = getattr(coordinator, "single_type_managers", ())
    return getattr(groups[0], "req_to_blocks", None) if len(groups) == 1 else None


def wrap_allocation(
    manager: Any,
    make_room: Callable[[Any, Callable[[], Any], Callable[[], int]], Any],
    before_reset: Callable[[], None],
    after_reset: Callable[[], None] = lambda: None,
) -> None:
    """Let pins yield exactly when an allocation would fail, and before a prefix-cache reset.

    A connector has no hook for "a waiting request did not fit" nor for requests whose KV was loaded, so
    the manager's bound methods are replaced on the instance.

    Args:
        manager: vLLM's KVCacheManager.
        make_room: Called with the request, a function that repeats the allocation, and one that tells
            how many free blocks its last try wanted at least (0: not known), when the allocation
            returned None; returns the final result.
        before_reset: Called before `reset_prefix_cache`, which refuses while blocks are referenced.
        after_reset: Called behind it, whatever came of it.
    """
    allocate, reset = manager.allocate_slots, manager.reset_prefix_cache
    last_need = _record_needs(manager)

    def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
        result = allocate(request, *args, **kwargs)
        if result is None:
            result = make_room(request, lambda: allocate(request, *args, **kwargs), last_need)
        return result

    def reset_prefix_cache(*args: Any, **kwargs: Any) -> Any:
        before_reset()
        try:
            return reset(*args, **kwargs)
        finally:
            after_reset()

    manager.allocate_slots = allocate_slots
    manager.reset_prefix_cache = reset_prefix_cache


class Defers(Protocol):
    """The connector, as lookups see it."""

    def defers(self, request_id: str) -> bool:
        """Whether it will say "not now" next, when it is asked about this request."""


def spare_lookups(manager: Any, connector: Defers) -> None:
    """Leave out the prefix cache lookup of a request that will not start in this step anyway.

    vLLM looks up what each waiting request would hit before it asks its connector whether the request may start, in
    every step. A lookup takes time for each block that it hits: thousands, where agents share their instructions or their
    own contexts are still there.

    Args:
        manager: vLLM's KVCacheManager.
        connector: Asked before each lookup.
    """
    look_up = manager.get_computed_blocks
    nothing: tuple[Any, ...] | None = None

    def get_computed_blocks(request: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal nothing
        if nothing is not None and connector.defers(request.request_id):
            return nothing
        found = look_up(request, *args, **kwargs)
        if nothing is None:
            # What vLLM returns where nothing may be read: as many numbers as in its other answers, all 0.
            nothing = (manager.empty_kv_cache_blocks, *(0 for _ in found[1:]))
        return found

    manager.get_computed_blocks = get_computed_blocks


def _record_needs(manager: Any) -> Callable[[], int]:
    """Listen in on what the manager computes before it compares it with the free blocks."""
    coordinator: Any = getattr(manager, "coordinator", None)
    compute = getattr(coordinator, "get_num_blocks_to_allocate", None)
    if compute is None:
        return lambda: 0
    needed = 0

    def recorded(*args: Any, **kwargs: Any) -> int:
        nonlocal needed
        needed = int(compute(*args, **kwargs))
        return needed

    coordinator.get_num_blocks_to_allocate = recorded
    return lambda: needed
