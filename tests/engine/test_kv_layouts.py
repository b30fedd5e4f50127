"""Every order of layers, blocks, heads and tokens in memory that vLLM has, as vLLM itself makes it."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

pytest.importorskip("vllm.v1.kv_cache_layout")

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from kvtier.copies.kv_layout import KVLayout

pytestmark = pytest.mark.engine

N_LAYERS, N_BLOCKS, N_HEADS = 3, 5, 2
N_PLANES = {
    "LBHNC": N_LAYERS,
    "LBNHC": N_LAYERS,
    "LHBNC": N_LAYERS * N_HEADS,
    # A block is one piece over all layers: this is what copies fastest.
    "BLHNC": 1,
    "BLNHC": 1,
    "BHLNC": 1,
}
"""Into how many pieces a block falls."""


def kv_caches(
    layout: KVCacheLayout, block_tokens: int = 16, kernel_block_tokens: int | None = None
) -> tuple[dict[str, torch.Tensor], int]:
    """What vLLM registers for a small model; and the bytes of one layer's block."""
    spec = FullAttentionSpec(
        block_size=block_tokens, num_kv_heads=N_HEADS, head_size=8, dtype=torch.float16
    )
    names = [f"layer.{i}" for i in range(N_LAYERS)]
    block_stride = N_LAYERS * spec.page_size_bytes if layout.is_block_outermost else None
    layer_stride, block_stride, *_ = compute_layout_strides(
        spec, N_BLOCKS, N_LAYERS, layout, fixed_strides=(None, block_stride, None, None, None)
    )
    size = N_LAYERS * N_BLOCKS * spec.page_size_bytes
    tensor = KVCacheTensor(size, names, layer_stride, block_stride)
    config = KVCacheConfig(N_BLOCKS, [tensor], [KVCacheGroupSpec(names, spec)])
    kernel_sizes = [kernel_block_tokens or block_tokens]
    return allocate_kv_cache(
        config, torch.device("cpu"), layout, kernel_sizes
    ), spec.page_size_bytes


def check(caches: dict[str, torch.Tensor], layout: KVLayout, page_bytes: int) -> None:
    """The layout's pieces of each block are that block's bytes in every layer, and nothing else."""
    for number, cache in enumerate(caches.values()):
        blocks = cache.view(N_BLOCKS, -1, *cache.shape[1:]) if len(cache) > N_BLOCKS else cache
        for block in range(N_BLOCKS):
            blocks[block].view(torch.uint8).fill_(16 * number + block + 1)
    for block in range(N_BLOCKS):
        found = torch.cat([view[block] for view in layout.views])
        values, counts = found.unique(return_counts=True)
        assert values.tolist() == [16 * number + block + 1 for number in range(N_LAYERS)]
        assert counts.tolist() == [page_bytes] * N_LAYERS


@pytest.mark.parametrize("name", [one.name for one in KVCacheLayout])
def test_a_block_is_all_of_its_bytes_in_as_few_pieces_as_can_be(name: str) -> None:
    caches, page_bytes = kv_caches(KVCacheLayout[name])
    layout = KVLayout.from_kv_caches(caches, num_blocks=N_BLOCKS)
    assert len(layout.planes) == N_PLANES[name]
    assert layout.slot_bytes(1) == N_LAYERS * page_bytes
    check(caches, layout, page_bytes)


@pytest.mark.parametrize("name", ["LBHNC", "LBNHC"])
def test_a_kernel_may_take_smaller_blocks(name: str) -> None:
    caches, page_bytes = kv_caches(KVCacheLayout[name], 64, 16)
    assert len(caches["layer.0"]) == 4 * N_BLOCKS
    layout = KVLayout.from_kv_caches(caches, num_blocks=N_BLOCKS)
    assert len(layout.planes) == N_LAYERS
    check(caches, layout, page_bytes)


def test_no_two_orders_share_slots() -> None:
    found = {
        KVLayout.from_kv_caches(kv_caches(one)[0], num_blocks=N_BLOCKS).fingerprint
        for one in KVCacheLayout
    }
    assert len(found) == len(KVCacheLayout)
