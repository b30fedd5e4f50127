"""The CUDA engine on a GPU: bit-exact, ordered after the model's work, stoppable, right without pinning."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvtier import copy_engine, cpu_pool
from kvtier.copies import cuda
from kvtier.copies.cuda import CudaCopyEngine
from kvtier.copies.switch import always
from kvtier.copy_engine import NO_SLOT, CopyOrder, KVLayout
from kvtier.cpu_pool import SharedRegion
from tests.unit.copy_cases import DTYPES, LAYOUTS, kv_caches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtier.copy_engine import CopyResult

pytestmark = pytest.mark.gpu
WAIT_S = 30.0
NUM_BLOCKS, CHUNK, SLOTS = 64, 4, 8
CYCLES = 100_000_000
"""About 50 ms of a GPU's clock: long enough to act meanwhile."""


def caches_of(
    kind: str = "joint",
    dtype: torch.dtype = torch.bfloat16,
    page: tuple[int, int, int] = (16, 4, 64),
) -> dict[str, torch.Tensor]:
    with torch.device("cuda"):
        return kv_caches(kind, dtype, NUM_BLOCKS, 3, page)


def region_of(layout: KVLayout) -> torch.Tensor:
    return torch.zeros(SLOTS * layout.slot_bytes(CHUNK), dtype=torch.uint8, pin_memory=True)


def on_host(layout: KVLayout) -> list[np.ndarray[Any, Any]]:
    return [view.cpu().numpy().copy() for view in layout.views]


def order_of(layout: KVLayout, direction: str, ids: Any, slots: Any, **changes: Any) -> CopyOrder:
    slot_bytes = layout.slot_bytes(CHUNK)
    fields: dict[str, Any] = {
        "order_id": direction,
        "direction": direction,
        "request_id": "r",
        "block_ids": np.asarray(ids),
        "slots": [s if s == NO_SLOT else int(s) * slot_bytes for s in slots],
        "chunk_blocks": CHUNK,
    }
    return CopyOrder(**(fields | changes))


def finish(engine: CudaCopyEngine) -> list[CopyResult]:
    assert engine.drain(WAIT_S)
    return engine.poll()


def copied(engine: CudaCopyEngine, order: CopyOrder) -> CopyResult:
    engine.submit(order, time.monotonic())
    (result,) = finish(engine)
    assert result.ok, result.error
    return result


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["dma", "kernel", "run by run"])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [(16, 4, 64), (5, 3, 7)], ids=["even", "odd"])
def test_every_layout_dtype_and_page_both_ways(
    way: str,
    kind: str,
    dtype: torch.dtype,
    page: tuple[int, int, int],
    opened: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = KVLayout.from_kv_caches(caches_of(kind, dtype, page), num_blocks=NUM_BLOCKS)
    region = region_of(layout)
    if way == "run by run":
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: False)
    engine = CudaCopyEngine(layout, region, switch=always("kernel" if way == "kernel" else "dma"))
    opened.append(engine)
    if way == "kernel" and not engine.has_kernel():
        pytest.skip("no copy kernel here")
    rng = np.random.default_rng(0)
    source = rng.permutation(NUM_BLOCKS)[: SLOTS * CHUNK]
    target = rng.permutation(NUM_BLOCKS)[: SLOTS * CHUNK - 1]  # the last chunk ends early
    slots = rng.permutation(SLOTS)
    before = on_host(layout)
    result = copied(engine, order_of(layout, "store", source, slots))
    assert result.seconds > 0
    assert result.issue_s > 0
    expected = np.zeros(region.numel(), np.uint8)
    for i, block in enumerate(source):
        at = int(slots[i // CHUNK]) * layout.slot_bytes(CHUNK)
        for plane, blocks in zip(layout.planes, before, strict=True):
            start = at + i % CHUNK * plane.block_bytes
            expected[start : start + plane.block_bytes] = blocks[block]
            at += CHUNK * plane.block_bytes
    np.testing.assert_array_equal(region.numpy(), expected)

    for view in layout.views:
        view.fill_(0x5A)  # on the compute stream: the load must wait for it
    wanted = [int(s) if i != 2 else NO_SLOT for i, s in enumerate(slots)]
    copied(engine, order_of(layout, "load", target, wanted, skip_blocks=3))
    planes = [np.full_like(blocks, 0x5A) for blocks in before]
    for i, block in enumerate(target):
        if i >= 3 and wanted[i // CHUNK] != NO_SLOT:
            for plane, blocks in zip(planes, before, strict=True):
                plane[block] = blocks[source[i]]
    for found, plane in zip(on_host(layout), planes, strict=True):
        np.testing.assert_array_equal(found, plane)


@pytest.mark.parametrize("mover", ["dma", "kernel"])
def test_many_batches_in_flight_and_both_ways_at_once(mover: Any, opened: list[Any]) -> None:
    cache = torch.randint(0, 256, (4096, 16 << 10), dtype=torch.uint8, device="cuda")
    layout = KVLayout.from_kv_caches({"a": cache})
    region = torch.randint(0, 256, (cache.numel(),), dtype=torch.uint8).pin_memory()
    engine = CudaCopyEngine(
        layout, region, switch=always(mover), batch_bytes=1 << 20, max_batches=3
    )
    opened.append(engine)
    ids = np.random.default_rng(1).permutation(4096)
    before, slots = cache.cpu(), [i * (64 << 10) for i in range(1024)]
    loaded = region.clone().view(4096, -1)
    for direction, part in (("store", slice(0, 512)), ("load", slice(512, 1024))):
        blocks = ids[part.start * CHUNK : part.stop * CHUNK]
        engine.submit(
            CopyOrder(direction, direction, "r", blocks, slots[part], CHUNK),  # type: ignore[arg-type]
            time.monotonic(),
        )
    assert [r.ok for r in finish(engine)] == [True, True]
    assert torch.equal(region.view(4096, -1)[:2048], before[ids[:2048]])
    assert torch.equal(cache.cpu()[ids[2048:]], loaded[2048:])


# --- stream order --------------------------------------------------------------------------------


@pytest.fixture
def plain(opened: list[Any]) -> tuple[torch.Tensor, KVLayout, torch.Tensor, CudaCopyEngine]:
    cache = torch.zeros(NUM_BLOCKS, 1 << 16, dtype=torch.uint8, device="cuda")
    layout = KVLayout.from_kv_caches({"a": cache})
    region = torch.zeros(layout.slot_bytes(NUM_BLOCKS), dtype=torch.uint8).pin_memory()
    engine = CudaCopyEngine(layout, region, batch_bytes=1 << 16, max_batches=2)
    opened.append(engine)
    torch.cuda.synchronize()
    return cache, layout, region, engine


def whole(direction: str, **changes: Any) -> CopyOrder:
    fields: dict[str, Any] = {"order_id": 1, "direction": direction, "request_id": "r"}
    fields |= {"block_ids": list(range(NUM_BLOCKS))[::-1], "slots": [0], "chunk_blocks": NUM_BLOCKS}
    return CopyOrder(**(fields | changes))


def test_a_store_reads_what_was_enqueued_before_it(plain: Any) -> None:
    cache, _, region, engine = plain
    torch.cuda._sleep(CYCLES)  # torch's own means to keep a stream busy
    cache.fill_(7)
    copied(engine, whole("store"))
    assert bool((region == 7).all())


def test_without_the_wait_a_store_reads_too_early(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would notice."""
    cache, _, region, engine = plain
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda *_: None)
    torch.cuda._sleep(CYCLES)
    cache.fill_(7)
    copied(engine, whole("store"))
    assert not bool((region == 7).any())


def test_a_load_overwrites_what_was_enqueued_before_it(plain: Any) -> None:
    cache, _, region, engine = plain
    region.fill_(9)
    torch.cuda._sleep(CYCLES)
    cache.fill_(7)
    copied(engine, whole("load"))
    assert bool((cache == 9).all())


def test_without_the_wait_a_load_is_overwritten(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _, region, engine = plain
    region.fill_(9)
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda *_: None)
    torch.cuda._sleep(CYCLES)
    cache.fill_(7)
    copied(engine, whole("load"))
    torch.cuda.synchronize()
    assert bool((cache == 7).all())


def hold(engine: CudaCopyEngine, direction: Any) -> None:
    """Keep the engine's stream busy, so that what is put on it waits."""
    with torch.cuda.stream(engine._lanes[direction].stream):
        torch.cuda._sleep(CYCLES)


def test_a_result_comes_only_when_the_bytes_are_there(plain: Any) -> None:
    cache, _, region, engine = plain
    cache.fill_(7)
    hold(engine, "store")
    engine.submit(whole("store"), time.monotonic())
    early = engine.poll()
    untouched = not bool(region.any())
    assert finish(engine)[0].ok
    assert (early, untouched) == ([], True)
    cache.fill_(8)  # after the result blocks may be reused
    torch.cuda.synchronize()
    assert bool((region == 7).all())


def test_reusing_blocks_before_the_result_spoils_the_copy(plain: Any) -> None:
    """What the rule above prevents, provoked."""
    cache, _, region, engine = plain
    cache.fill_(7)
    torch.cuda.synchronize()
    hold(engine, "store")
    engine.submit(whole("store"), time.monotonic())
    cache.fill_(8)
    finish(engine)
    assert bool((region == 8).any())


# --- stopping ------------------------------------------------------------------------------------


def test_a_cancelled_copy_stops_between_batches(plain: Any) -> None:
    cache, layout, region, engine = plain
    cache.fill_(7)
    hold(engine, "store")
    engine.submit(whole("store"), time.monotonic())
    while engine._lanes["store"].ring[0] < 2:  # two batches are in flight, a third has to wait
        time.sleep(0.001)
    assert engine.cancel(1)
    (result,) = finish(engine)
    assert (result.ok, result.error) == (False, copy_engine.CANCELLED)
    assert 0 < result.n_bytes < layout.slot_bytes(NUM_BLOCKS)
    assert int((region == 7).sum()) == result.n_bytes
    assert not bool(region[result.n_bytes :].any())
    assert copied(engine, whole("store", order_id=2)).n_bytes == layout.slot_bytes(NUM_BLOCKS)


def test_a_lease_that_ends_meanwhile_stops_and_fails_the_copy(plain: Any) -> None:
    _, layout, _, engine = plain
    hold(engine, "store")
    engine.submit(whole("store", deadline_s=time.monotonic() + 0.01), time.monotonic())
    (result,) = finish(engine)
    assert result.error == copy_engine.LEASE_ENDED
    assert result.n_bytes < layout.slot_bytes(NUM_BLOCKS)


def test_close_ends_what_runs(plain: Any) -> None:
    _, _, region, engine = plain
    hold(engine, "store")
    engine.submit(whole("store"), time.monotonic())
    engine.submit(whole("store", order_id=2), time.monotonic())
    engine.close()
    after = region.clone()
    torch.cuda.synchronize()
    assert torch.equal(region, after)
    assert {r.order_id for r in engine.poll()} == {1, 2}


# --- pinning -------------------------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[SharedRegion]:
    size, file = 8 << 20, cpu_pool.SHM_DIRECTORY / f"kvtier-test-{os.getpid()}"
    file.write_bytes(bytes(size))
    try:
        region = SharedRegion.open(file.name, size)
        yield region
        region.close()
    finally:
        file.unlink()


def store_into(region: SharedRegion, mover: Any, opened: list[Any]) -> None:
    cache = torch.randint(0, 256, (NUM_BLOCKS, 100_000), dtype=torch.uint8, device="cuda")
    layout = KVLayout.from_kv_caches({"a": cache})
    engine = CudaCopyEngine(layout, region.tensor, switch=always(mover))
    copied(engine, whole("store"))
    assert torch.equal(region.tensor[: cache.numel()].view(NUM_BLOCKS, -1), cache.cpu().flip(0))
    engine.close()


@pytest.mark.parametrize("mover", ["dma", "kernel"])
def test_shared_memory_is_pinned_in_pieces_and_copied_over_their_edges(
    shared: SharedRegion, mover: Any, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = 1 << 20
    monkeypatch.setattr(cpu_pool, "PIN_PIECE_BYTES", piece)
    monkeypatch.setattr(cuda, "PIN_PIECE_BYTES", piece)
    assert shared.pin()
    assert len(shared._pinned) == shared.size_bytes // piece
    assert shared.tensor.is_pinned()
    store_into(shared, mover, opened)


def test_memory_that_cannot_be_pinned_is_copied_all_the_same(
    shared: SharedRegion,
    opened: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Cudart:
        def cudaHostRegister(self, *_: int) -> int:  # noqa: N802 - CUDA's name
            return 2

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "cudart", Cudart)
        assert not shared.pin()
    assert "memlock" in caplog.text
    store_into(shared, "dma", opened)
