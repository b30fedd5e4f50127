"""KV caches, orders and a naive reference for the copy tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvtier.copy_engine import NO_SLOT, CopyOrder, Direction, KVLayout

U8 = NDArray[np.uint8]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8)
LAYOUTS = (
    "joint",
    "split",
    "block_outermost",
    "head_in_block",
    "head_outermost",
    "kv_in_block",
)
SLOT_GAP_BYTES = 24
"""Between slots, at the start and at the end of the region: canaries."""


def kv_caches(
    kind: str, dtype: torch.dtype, num_blocks: int, n_layers: int, page: tuple[int, int, int]
) -> dict[str, torch.Tensor]:
    """Random caches; ``page`` is (block size, heads, head size)."""
    tokens, heads, width = page

    def random(*shape: int) -> torch.Tensor:
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8).view(dtype).view(shape)

    layers = range(n_layers)
    if kind == "joint":  # vLLM 0.32 on CPU
        tensors = [random(num_blocks, heads, tokens, 2 * width) for _ in layers]
    elif kind == "split":
        tensors = [random(2, num_blocks, tokens, heads, width) for _ in layers]
    elif kind == "block_outermost":
        tensors = list(random(num_blocks, n_layers, heads, tokens, width).unbind(1))
    elif kind == "head_in_block":
        tensors = list(random(num_blocks, heads, n_layers, tokens, width).unbind(2))
    elif kind == "head_outermost":
        tensors = [random(heads, num_blocks, tokens, width).transpose(0, 1) for _ in layers]
    else:  # [2, NB, ...] in name only: keys and values of a block are neighbours
        tensors = [random(num_blocks, 2, tokens, heads, width).transpose(0, 1) for _ in layers]
    return {f"layer.{i}": tensor for i, tensor in enumerate(tensors)}


@dataclass
class Case:
    """A KV cache with slots, and who is where."""

    caches: dict[str, torch.Tensor]
    layout: KVLayout
    chunk_blocks: int
    block_ids: list[int]
    slots: list[int]
    region: U8

    def order(self, direction: Direction, **changes: object) -> CopyOrder:
        fields: dict[str, object] = {
            "order_id": direction,
            "direction": direction,
            "request_id": "r",
            "block_ids": self.block_ids,
            "slots": self.slots,
            "chunk_blocks": self.chunk_blocks,
        }
        return CopyOrder(**(fields | changes))  # type: ignore[arg-type]

    def block(self, block_id: int, plane: int) -> U8:
        """Bytes of one block in one plane, as a copy."""
        block: U8 = self.layout.views[plane][block_id].numpy()
        return block.copy()


def make_case(
    kind: str = "joint",
    dtype: torch.dtype = torch.bfloat16,
    *,
    num_blocks: int = 8,
    n_layers: int = 2,
    page: tuple[int, int, int] = (4, 2, 3),
    chunk_blocks: int = 2,
    block_ids: list[int] | None = None,
    slot_order: list[int] | None = None,
    gap_bytes: int = SLOT_GAP_BYTES,
) -> Case:
    caches = kv_caches(kind, dtype, num_blocks, n_layers, page)
    layout = KVLayout.from_kv_caches(caches, num_blocks=num_blocks)
    ids = list(range(num_blocks)) if block_ids is None else block_ids
    n_chunks = len(ids) // chunk_blocks
    pitch = layout.slot_bytes(chunk_blocks) + gap_bytes
    order = list(range(n_chunks)) if slot_order is None else slot_order
    return Case(
        caches=caches,
        layout=layout,
        chunk_blocks=chunk_blocks,
        block_ids=ids,
        slots=[gap_bytes + i * pitch for i in order],
        region=np.full(gap_bytes + max(n_chunks, 1) * pitch, 0xA5, np.uint8),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random block tables, dtypes, page sizes, layouts and slot orders."""
    num_blocks = draw(st.integers(3, 12))
    chunk_blocks = draw(st.integers(1, 3))
    n_chunks = draw(st.integers(1, num_blocks // chunk_blocks))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return make_case(
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(DTYPES)),
        num_blocks=num_blocks,
        n_layers=draw(st.integers(1, 3)),
        page=draw(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 5))),
        chunk_blocks=chunk_blocks,
        block_ids=draw(st.permutations(range(num_blocks)))[: n_chunks * chunk_blocks],
        slot_order=draw(st.permutations(range(n_chunks))),
        gap_bytes=draw(st.sampled_from((0, SLOT_GAP_BYTES))),
    )


def reference_store(case: Case, order: CopyOrder) -> U8:
    """The region after a store, block by block."""
    region = case.region.copy()
    for i, block_id in enumerate(order.block_ids):
        chunk, position = divmod(i, order.chunk_blocks)
        if order.slots[chunk] == NO_SLOT:
            continue
        at = order.slots[chunk]
        for p, plane in enumerate(case.layout.planes):
            start = at + position * plane.block_bytes
            region[start : start + plane.block_bytes] = case.block(block_id, p)
            at += order.chunk_blocks * plane.block_bytes
    return region


def reference_load(case: Case, order: CopyOrder) -> list[U8]:
    """All planes after a load, block by block."""
    planes = [view.numpy().copy() for view in case.layout.views]
    for i, block_id in enumerate(order.block_ids):
        chunk, position = divmod(i, order.chunk_blocks)
        if i < order.skip_blocks or order.slots[chunk] == NO_SLOT:
            continue
        at = order.slots[chunk]
        for p, plane in enumerate(case.layout.planes):
            start = at + position * plane.block_bytes
            planes[p][block_id] = case.region[start : start + plane.block_bytes]
            at += order.chunk_blocks * plane.block_bytes
    return planes


def wipe(case: Case) -> None:
    for view in case.layout.views:
        view.fill_(0x5A)
