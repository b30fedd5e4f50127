"""The CUDA engine on a GPU: bit-exact both ways, ordered after the work on the compute stream."""

from __future__ import annotations

import time

import pytest
import torch

from kvtier.copies.cuda import CudaCopyEngine
from kvtier.copy_engine import CopyOrder, KVLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
WAIT_S = 30.0
NUM_BLOCKS, CHUNK = 64, 4


@pytest.mark.parametrize("split", [False, True])
def test_round_trip(split: bool) -> None:
    shape = (2, NUM_BLOCKS, 16, 8, 64) if split else (NUM_BLOCKS, 8, 16, 128)
    caches = {str(i): torch.randn(shape, dtype=torch.bfloat16, device="cuda") for i in range(3)}
    layout = KVLayout.from_kv_caches(caches, num_blocks=NUM_BLOCKS)
    slot_bytes = layout.slot_bytes(CHUNK)
    region = torch.zeros(8 * slot_bytes, dtype=torch.uint8).pin_memory()
    engine = CudaCopyEngine(layout, region, staging_bytes=2 * slot_bytes)
    source = torch.randperm(NUM_BLOCKS)[: 8 * CHUNK]
    target = torch.randperm(NUM_BLOCKS)[: 8 * CHUNK]
    slots = [int(i) * slot_bytes for i in torch.randperm(8)]
    expected = [view[source.cuda()].cpu() for view in layout.views]
    store = CopyOrder("s", "store", "r", source.numpy(), slots, CHUNK)
    engine.submit(store, time.monotonic())
    assert engine.drain(WAIT_S)
    for view in layout.views:
        view.zero_()  # on the compute stream: the load must wait for it
    skip = 3
    load = CopyOrder("l", "load", "r", target.numpy(), slots, CHUNK, skip)
    engine.submit(load, time.monotonic())
    assert engine.drain(WAIT_S)
    results = engine.poll()
    assert [r.ok for r in results] == [True, True], results
    assert all(r.seconds > 0 for r in results)
    for view, blocks in zip(layout.views, expected, strict=True):
        assert torch.equal(view[target.cuda()].cpu()[skip:], blocks[skip:])
        assert not view[target.cuda()].cpu()[:skip].any()
    engine.close()


def test_a_store_sees_what_was_enqueued_before_it() -> None:
    cache = torch.zeros(NUM_BLOCKS, 1 << 16, dtype=torch.uint8, device="cuda")
    layout = KVLayout.from_kv_caches({"a": cache})
    region = torch.zeros(layout.slot_bytes(NUM_BLOCKS), dtype=torch.uint8).pin_memory()
    engine = CudaCopyEngine(layout, region)
    # torch's own means to keep a stream busy
    torch.cuda._sleep(50_000_000)
    cache.fill_(7)
    order = CopyOrder("s", "store", "r", list(range(NUM_BLOCKS)), [0], NUM_BLOCKS)
    engine.submit(order, time.monotonic())
    assert engine.drain(WAIT_S)
    assert bool((region == 7).all())
    engine.close()
