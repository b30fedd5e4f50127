"""The worker half on CPU tensors: bytes arrive as they were, and every order ends in a result."""

from __future__ import annotations

import os
import threading
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvtier import cpu_pool
from kvtier import worker_half as worker_half_module
from kvtier.backend import Region
from kvtier.copies.kernel import CONTROL_STOP, LATE, STOPPED, compiled_kernel
from kvtier.copy_engine import CpuCopyEngine
from kvtier.orders import Order, OrderResult, StepOrders, failing_load
from kvtier.worker_half import WorkerHalf

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

N_BLOCKS = 12
CHUNK_BLOCKS = 2
LAYER_BYTES = 2 * 4 * 2 * 8 * 2  # keys and values, tokens, heads, width, bfloat16
SLOT_BYTES = 2 * CHUNK_BLOCKS * LAYER_BYTES
REGION_BYTES = 1 << 16
WAIT_S = 30.0


@pytest.fixture
def segment() -> Iterator[Path]:
    path = cpu_pool.SHM_DIRECTORY / f"kvtier-test-{uuid.uuid4().hex}"
    path.touch(mode=0o600)
    os.truncate(path, REGION_BYTES)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def region(segment: Path) -> Region:
    return Region(segment.name, REGION_BYTES, "one")


@pytest.fixture
def caches() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    shape = (2, N_BLOCKS, 4, 2, 8)
    return {f"layer.{i}": torch.randn(shape, dtype=torch.bfloat16) for i in range(2)}


def worker_half(rank: int = 0, **changes: Any) -> WorkerHalf:
    fields = {"slot_bytes": SLOT_BYTES, "chunk_blocks": CHUNK_BLOCKS, "n_blocks": N_BLOCKS}
    return WorkerHalf(rank=rank, **(fields | changes))


@pytest.fixture
def worker(caches: dict[str, torch.Tensor]) -> Iterator[WorkerHalf]:
    worker = worker_half()
    worker.register(caches)
    yield worker
    worker.close()


def order(
    order_id: int, direction: str, blocks: Sequence[int], slots: list[list[int]], **changes: Any
) -> Order:
    base = Order(
        order_id=order_id,
        direction=direction,  # type: ignore[arg-type]
        request_id=f"r{order_id}",
        block_ids=tuple(blocks),
        slots=slots,
        chunk_blocks=CHUNK_BLOCKS,
        skip_blocks=0,
        generation="one",
        deadline_s=time.monotonic() + 600.0,
    )
    return replace(base, **changes)


def run(worker: WorkerHalf, region: Region | None, *orders: Order) -> dict[int, OrderResult]:
    """Submit in one step and collect until all have ended; results by order id."""
    loads = [o for o in orders if o.direction == "load"]
    stores = [o for o in orders if o.direction == "store"]
    worker.submit(StepOrders(region, loads, stores))
    found: dict[int, OrderResult] = {}
    deadline_s = time.monotonic() + WAIT_S
    while len(found) < len(orders):
        assert time.monotonic() < deadline_s, found
        if worker._pool is not None:
            worker._pool.drain(WAIT_S)
        worker.collect()
        found |= {result.order_id: result for result in worker.take_results()}
    return found


def blocks_of(caches: dict[str, torch.Tensor], ids: Sequence[int]) -> list[torch.Tensor]:
    return [cache[:, list(ids)].clone() for cache in caches.values()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_what_was_stored_is_loaded_bit_for_bit(
    worker: WorkerHalf, region: Region, caches: dict[str, torch.Tensor]
) -> None:
    source, target = [3, 7, 1, 5], [8, 2, 10, 4]
    slots = [[SLOT_BYTES, 5 * SLOT_BYTES]]
    stored = run(worker, region, order(1, "store", source, slots))[1]
    assert stored.ok, stored.error
    assert stored.n_bytes == 2 * SLOT_BYTES
    assert stored.seconds > 0
    assert stored.run_bytes > 0
    assert worker.take_loaded() == set(), "nobody waits for a store"
    wanted = blocks_of(caches, source)
    others = [b for b in range(N_BLOCKS) if b not in target]
    untouched = blocks_of(caches, others)
    assert not same(blocks_of(caches, target), wanted)
    loaded = run(worker, region, order(2, "load", target, slots))[2]
    assert loaded.ok, loaded.error
    assert same(blocks_of(caches, target), wanted)
    assert same(blocks_of(caches, others), untouched)
    assert worker.take_loaded() == {"r2"}
    assert worker.take_loaded() == set()
    assert worker.take_bad_blocks() == set()


def test_leading_blocks_of_a_load_are_not_written(
    worker: WorkerHalf, region: Region, caches: dict[str, torch.Tensor]
) -> None:
    slots = [[0, SLOT_BYTES]]
    run(worker, region, order(1, "store", [0, 1, 2, 3], slots))
    before = blocks_of(caches, [8])
    run(worker, region, order(2, "load", [8, 9, 10, 11], slots, skip_blocks=1))
    assert same(blocks_of(caches, [8]), before)
    assert same(blocks_of(caches, [9, 10, 11]), blocks_of(caches, [1, 2, 3]))


@pytest.mark.parametrize("generation", ["one", "zero"])
def test_a_prefetch_ends_without_a_word_to_vllm(
    worker: WorkerHalf, region: Region, caches: dict[str, torch.Tensor], generation: str
) -> None:
    slots = [[0, SLOT_BYTES]]
    run(worker, region, order(1, "store", [0, 1, 2, 3], slots))
    null_block = blocks_of(caches, [0])
    prefetch = order(
        2,
        "load",
        [0, 9, 10, 11],
        slots,
        skip_blocks=1,
        request_id="",
        generation=generation,
    )
    result = run(worker, region, prefetch)[2]
    assert result.ok is (generation == "one")
    assert worker.take_loaded() == set(), "there is no such request"
    assert worker.take_bad_blocks() == set()
    assert same(blocks_of(caches, [0]), null_block)
    loaded = same(blocks_of(caches, [9, 10, 11]), blocks_of(caches, [1, 2, 3]))
    assert loaded is (generation == "one")


def test_chunks_that_are_there_already_are_not_stored(
    worker: WorkerHalf, region: Region, caches: dict[str, torch.Tensor], segment: Path
) -> None:
    result = run(worker, region, order(1, "store", [0, 1, 2, 3, 4, 5], [[-1, 0, -1]]))[1]
    assert result.ok
    assert result.n_bytes == SLOT_BYTES
    run(worker, region, order(2, "load", [8, 9], [[0]]))
    assert same(blocks_of(caches, [8, 9]), blocks_of(caches, [2, 3]))
    assert segment.read_bytes()[SLOT_BYTES:].count(0) == REGION_BYTES - SLOT_BYTES


def test_nothing_to_store_on_this_rank_is_a_success(worker: WorkerHalf, region: Region) -> None:
    result = run(worker, region, order(1, "store", [0, 1], [[-1]]))[1]
    assert result.ok, result.error
    assert result.n_bytes == 0


def test_a_rank_uses_its_own_slots(region: Region, caches: dict[str, torch.Tensor]) -> None:
    slots = [[0], [SLOT_BYTES]]
    workers = [worker_half(rank) for rank in range(2)]
    theirs = [caches, {name: cache + 1 for name, cache in caches.items()}]
    for worker, mine in zip(workers, theirs, strict=True):
        worker.register(mine)
        run(worker, region, order(1, "store", [0, 1], slots))
    for worker, mine in zip(workers, theirs, strict=True):
        run(worker, region, order(2, "load", [8, 9], slots))
        assert same(blocks_of(mine, [8, 9]), blocks_of(mine, [0, 1]))
        worker.close()


def failed_load(worker: WorkerHalf, region: Region | None, **changes: Any) -> OrderResult:
    """A load of two chunks with one block to skip, which must fail."""
    slots = [[0, SLOT_BYTES]]
    bad = order(9, "load", [4, 5, 6, 7], slots, **({"skip_blocks": 1} | changes))
    result = run(worker, region, bad)[9]
    assert not result.ok
    assert result.error
    assert worker.take_loaded() == {"r9"}, "its request waits for the end, good or bad"
    assert worker.take_bad_blocks() == {5, 6, 7}, "a skipped block is still good"
    assert worker.take_bad_blocks() == set()
    return result


def test_orders_of_another_generation_touch_nothing(
    worker: WorkerHalf, region: Region, caches: dict[str, torch.Tensor], segment: Path
) -> None:
    before = blocks_of(caches, range(N_BLOCKS))
    failed_load(worker, region, generation="zero")
    assert same(blocks_of(caches, range(N_BLOCKS)), before)
    stale = run(worker, region, order(1, "store", [0, 1], [[0]], generation="zero"))[1]
    assert not stale.ok
    assert worker.take_bad_blocks() == set()
    assert not any(segment.read_bytes())


def test_a_new_generation_is_mapped_anew(
    worker: WorkerHalf, region: Region, caches: dict[str, torch.Tensor], segment: Path
) -> None:
    run(worker, region, order(1, "store", [0, 1], [[0]]))
    segment.unlink()
    segment.touch(mode=0o600)
    os.truncate(segment, REGION_BYTES)
    newer = replace(region, generation="two")
    assert not run(worker, newer, order(2, "load", [4, 5], [[0]]))[2].ok
    assert run(worker, newer, order(3, "store", [2, 3], [[0]], generation="two"))[3].ok
    assert any(segment.read_bytes()), "written to the new file"


def test_before_any_region_orders_fail(worker: WorkerHalf) -> None:
    failed_load(worker, None)


def test_a_missing_region_fails_orders_and_is_logged_once(
    worker: WorkerHalf, region: Region, caplog: pytest.LogCaptureFixture
) -> None:
    missing = replace(region, shm_name="kvtier-test-none")
    failed_load(worker, missing)
    for _ in range(3):
        worker.submit(StepOrders(missing))
    told = [r for r in caplog.records if "cannot map" in r.getMessage()]
    assert len(told) == 1, "an engine makes many steps a second"
    found = replace(region, generation="two")
    assert run(worker, found, order(1, "store", [0, 1], [[0]], generation="two"))[1].ok


def test_a_region_that_could_not_be_mapped_is_tried_again_later(
    worker: WorkerHalf, region: Region, segment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_half_module, "FIRST_REMAP_S", 0.0)
    away = segment.rename(segment.with_suffix(".away"))
    failed_load(worker, region)
    away.rename(segment)
    assert run(worker, region, order(1, "store", [0, 1], [[0]]))[1].ok
    assert any(segment.read_bytes())


def test_a_deadline_that_has_passed_fails_the_order(
    worker: WorkerHalf, region: Region, caches: dict[str, torch.Tensor], segment: Path
) -> None:
    before = blocks_of(caches, range(N_BLOCKS))
    failed_load(worker, region, deadline_s=time.monotonic() - 1.0)
    late = order(1, "store", [0, 1], [[0]], deadline_s=time.monotonic() - 1.0)
    assert not run(worker, region, late)[1].ok
    assert same(blocks_of(caches, range(N_BLOCKS)), before)
    assert not any(segment.read_bytes())


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": [[0, REGION_BYTES]]},
        {"block_ids": (4, 5, 6, N_BLOCKS)},
        {"slots": []},
        {"slots": [[0]]},
    ],
    ids=["slot_outside", "block_outside", "no_slots_for_this_rank", "too_few_slots"],
)
def test_an_order_that_makes_no_sense_fails_alone(
    worker: WorkerHalf, region: Region, changes: dict[str, Any]
) -> None:
    bad = replace(order(9, "load", [4, 5, 6, 7], [[0, SLOT_BYTES]]), **changes)
    good = order(1, "store", [0, 1], [[0]])
    results = run(worker, region, bad, good)
    assert not results[9].ok
    assert results[1].ok
    assert worker.take_loaded() == {"r9"}


def test_with_a_layout_that_cannot_be_copied_every_order_fails(
    caches: dict[str, torch.Tensor], region: Region, caplog: pytest.LogCaptureFixture
) -> None:
    worker = worker_half(slot_bytes=SLOT_BYTES + 2)
    worker.register(caches)
    assert f"{SLOT_BYTES} bytes" in caplog.text
    assert f"{SLOT_BYTES + 2} by vLLM" in caplog.text
    load, store = order(1, "load", [4, 5], [[0]]), order(2, "store", [0, 1], [[0]])
    worker.submit(StepOrders(region, [load], [store]))
    worker.collect()
    assert [(r.order_id, r.ok) for r in worker.take_results()] == [(1, False), (2, False)]
    assert worker.take_loaded() == {"r1"}
    assert worker.take_bad_blocks() == {4, 5}


def test_a_load_that_is_meant_to_fail_fails(
    caches: dict[str, torch.Tensor], region: Region
) -> None:
    """The connector's way out when kvtier has given up while vLLM waits for a load."""
    for kvs in ({}, caches):
        worker = worker_half()
        if kvs:
            worker.register(kvs)
        worker.submit(StepOrders(region, [failing_load("r9", [6, 7])]))
        worker.collect()
        assert worker.take_loaded() == {"r9"}
        assert worker.take_bad_blocks() == {6, 7}
        worker.close()


class Until:
    """A copy loop that goes on until it is told to stop."""

    def __init__(self) -> None:
        self.entered = threading.Event()

    def __call__(self, *args: Any) -> int:
        control = args[-1]
        self.entered.set()
        deadline_s = time.monotonic() + WAIT_S
        while not control[CONTROL_STOP]:
            assert time.monotonic() < deadline_s
            time.sleep(0)
        return STOPPED


def test_a_cancelled_load_ends_and_its_blocks_are_not_computed(
    caches: dict[str, torch.Tensor],
    region: Region,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copying = Until()
    monkeypatch.setattr(
        "kvtier.worker_half.default_engine",
        lambda layout, mapped: CpuCopyEngine(layout, mapped.array, kernel=copying),
    )
    worker = worker_half()
    worker.register(caches)
    running, queued = order(1, "load", [4, 5], [[0]]), order(2, "load", [6, 7], [[SLOT_BYTES]])
    worker.submit(StepOrders(region, [running, queued]))
    assert copying.entered.wait(WAIT_S)
    worker.submit(StepOrders(region, cancels=[2, 1, 3]))
    assert worker._pool is not None
    worker._pool.drain(WAIT_S)
    worker.collect()
    assert {r.order_id: r.ok for r in worker.take_results()} == {1: False, 2: False}
    assert worker.take_loaded() == {"r1", "r2"}, "vLLM keeps the blocks until it is told"
    assert worker.take_bad_blocks() == set()
    assert not caplog.records
    worker.close()


def test_of_a_load_that_fails_half_way_only_the_rest_is_computed(
    caches: dict[str, torch.Tensor], region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(runs: Any, *args: Any) -> int:
        compiled_kernel()(runs[:1], *args)
        return LATE

    monkeypatch.setattr(
        "kvtier.worker_half.default_engine",
        lambda layout, mapped: CpuCopyEngine(layout, mapped.array, kernel=late),
    )
    worker = worker_half()
    worker.register(caches)
    load = order(1, "load", [4, 5, 8, 9], [[0, SLOT_BYTES]])
    assert not run(worker, region, load)[1].ok
    assert worker.take_loaded() == {"r1"}
    assert worker.take_bad_blocks() == {8, 9}
    worker.close()


def test_what_was_loaded_before_the_cancel_came_stays_a_success(
    worker: WorkerHalf, region: Region
) -> None:
    assert run(worker, region, order(1, "store", [0, 1], [[0]]))[1].ok
    assert run(worker, region, order(2, "load", [4, 5], [[0]]))[2].ok
    worker.submit(StepOrders(region, cancels=[2]))
    worker.collect()
    assert worker.take_results() == []
    assert not worker._cancelled, "an id that is of no order is not kept"


def test_close_ends_what_runs_and_is_idempotent(worker: WorkerHalf, region: Region) -> None:
    worker.submit(StepOrders(region, stores=[order(1, "store", [0, 1], [[0]])]))
    worker.close()
    worker.close()
    worker.collect()
    late = order(2, "load", [4, 5], [[0]])
    worker.submit(StepOrders(None, loads=[late]))
    (result,) = worker.take_results()
    assert not result.ok
    assert worker.take_loaded() == {"r2"}


def test_calibration_is_measured_once_and_only_on_rank_zero(
    caches: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def calibrate(layout: Any, model: str, profile_dir: Path, *, may_measure: bool) -> str:
        assert may_measure
        calls.append(model)
        return "measured"

    monkeypatch.setattr("kvtier.worker_half.calibrate", calibrate)
    for rank in (0, 1):
        worker = worker_half(rank, model=f"m{rank}", profile_dir=tmp_path)
        worker.register(caches)
        assert worker.take_calibration() == ("measured" if rank == 0 else None)
        assert worker.take_calibration() is None
        worker.close()
    assert calls == ["m0"]


# -- checksums -------------------------------------------------------------------------------------


def test_who_asks_for_checksums_that_cannot_be_had_is_told_at_the_start(
    caches: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_numba() -> None:
        raise RuntimeError("checksums of KV need numba")

    monkeypatch.setattr(worker_half_module, "load_checksums", without_numba)
    with pytest.raises(RuntimeError, match="need numba"):
        worker_half(integrity="full").register(caches)
    worker_half(integrity="off").register(caches)


def test_a_region_whose_check_cannot_be_made_is_given_back(
    caches: dict[str, torch.Tensor], region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    close = CpuCopyEngine.close

    def noted(engine: CpuCopyEngine) -> None:
        close(engine)
        closed.append(True)

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no memory for a thread")

    monkeypatch.setattr(CpuCopyEngine, "close", noted)
    monkeypatch.setattr(worker_half_module, "CheckedCopies", failing)
    worker = worker_half(integrity="full")
    worker.register(caches)
    worker.submit(StepOrders(region))
    assert closed == [True]
    assert worker._generation is None
    worker.close()
