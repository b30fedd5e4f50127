"""Copies are bit-exact, bounded by their orders, interruptible, and leave the interpreter free."""

from __future__ import annotations

import ctypes
import pickle
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier import copy_engine
from kvtier.copies import kernel as copy_kernel
from kvtier.copies.kernel import compiled_kernel, python_kernel
from kvtier.copy_engine import (
    NO_SLOT,
    CopyOrder,
    CopyResult,
    CpuCopyEngine,
    KVLayout,
    KVLayoutError,
    plan_order,
)
from tests.unit.copy_cases import (
    Case,
    cases,
    kv_caches,
    make_case,
    reference_load,
    reference_store,
    wipe,
)

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 30.0
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(case: Case, *orders: CopyOrder, **options: object) -> list[CopyResult]:
    options = {"max_store_backlog_bytes": 1 << 30} | options
    with CpuCopyEngine(case.layout, case.region, **options) as engine:  # type: ignore[arg-type]
        for order in orders:
            engine.submit(order, time.monotonic())
        assert engine.drain(WAIT_S)
        return engine.poll()


class Gate:
    """A kernel that waits in the middle of each call until it is let through."""

    def __init__(self, kernel: Callable[..., int] | None = None) -> None:
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.kernel: Callable[..., int] = kernel or compiled_kernel()

    def __call__(self, *args: object) -> int:
        self.entered.release()
        assert self.go.acquire(timeout=WAIT_S)
        return self.kernel(*args)


# --- bytes ---------------------------------------------------------------------------------------


@PROPERTY
@given(case=cases(), piece=st.sampled_from((3, 64, 4 << 20)), data=st.data())
def test_store_equals_reference(case: Case, piece: int, data: st.DataObject) -> None:
    slots = [s if data.draw(st.booleans()) else NO_SLOT for s in case.slots]
    order = case.order("store", slots=slots)
    expected = reference_store(case, order)
    (result,) = run(case, order, piece_bytes=piece)
    assert result.ok, result.error
    n_chunks = sum(s != NO_SLOT for s in slots)
    assert result.n_bytes == n_chunks * case.layout.slot_bytes(case.chunk_blocks)
    np.testing.assert_array_equal(case.region, expected)


@PROPERTY
@given(case=cases(), piece=st.sampled_from((3, 64, 4 << 20)), data=st.data())
def test_load_equals_reference(case: Case, piece: int, data: st.DataObject) -> None:
    case.region[:] = np.random.default_rng(1).integers(0, 256, case.region.size, np.uint8)
    tail = data.draw(st.integers(0, case.chunk_blocks - 1))
    ids = case.block_ids[: len(case.block_ids) - tail]
    slots = [s if data.draw(st.booleans()) else NO_SLOT for s in case.slots]
    skip = data.draw(st.integers(0, len(ids)))
    order = case.order("load", block_ids=np.array(ids), slots=slots, skip_blocks=skip)
    expected, region = reference_load(case, order), case.region.copy()
    (result,) = run(case, order, piece_bytes=piece)
    assert result.ok, result.error
    for view, plane in zip(case.layout.views, expected, strict=True):
        np.testing.assert_array_equal(view.numpy(), plane)
    np.testing.assert_array_equal(case.region, region)


@PROPERTY
@given(case=cases(), data=st.data())
def test_store_then_load_into_other_blocks(case: Case, data: st.DataObject) -> None:
    targets = data.draw(st.permutations(range(case.layout.num_blocks)))[: len(case.block_ids)]
    planes = range(len(case.layout.planes))
    expected = [[case.block(b, p) for p in planes] for b in case.block_ids]
    assert run(case, case.order("store"))[0].ok
    wipe(case)
    assert run(case, case.order("load", block_ids=targets))[0].ok
    for target, blocks in zip(targets, expected, strict=True):
        for p in planes:
            np.testing.assert_array_equal(case.block(target, p), blocks[p])


@PROPERTY
@given(case=cases())
def test_python_kernel_agrees_with_the_compiled_loop(case: Case) -> None:
    order = case.order("store")
    expected = reference_store(case, order)
    assert run(case, order, kernel=python_kernel())[0].ok
    np.testing.assert_array_equal(case.region, expected)


@settings(max_examples=150, deadline=None)
@given(
    n_bytes=st.integers(1, 5000),
    at=st.tuples(st.integers(0, 130), st.integers(0, 130)),
    piece=st.sampled_from((700, 1500, 1 << 20)),
    direction=st.sampled_from(("store", "load")),
)
def test_streamed_copies_of_any_length_and_alignment(
    n_bytes: int, at: tuple[int, int], piece: int, direction: str
) -> None:
    rng = np.random.default_rng(n_bytes)
    kv, slot = (rng.integers(0, 256, 6000, np.uint8) for _ in range(2))
    ends = [(kv, at[0]), (slot, at[1])]
    (source, start), (target, to) = ends if direction == "store" else ends[::-1]
    expected = target.copy()
    expected[to : to + n_bytes] = source[start : start + n_bytes]
    compiled_kernel()(
        np.array([[0, at[1], 0, 1]]),
        np.array([[kv.ctypes.data + at[0], n_bytes, n_bytes, 0]]),
        slot.ctypes.data,
        int(direction == "load"),
        piece,
        np.zeros(copy_kernel.STATE_FIELDS, np.int64),
        np.array([0, copy_kernel.NO_DEADLINE_NS]),
    )
    np.testing.assert_array_equal(target, expected)


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "n_planes", "dense"),
    [
        ("joint", 3, True),
        ("split", 6, True),
        ("block_outermost", 1, True),
        ("head_in_block", 1, True),
        ("head_outermost", 6, True),
        ("kv_in_block", 3, True),
    ],
)
def test_planes_of_known_layouts(kind: str, n_planes: int, dense: bool) -> None:
    caches = kv_caches(kind, torch.float16, 8, 3, (4, 2, 3))
    layout = KVLayout.from_kv_caches(caches)
    assert len(layout.planes) == n_planes
    assert all(p.is_dense for p in layout.planes) == dense
    page = sum(t.nbytes for t in caches.values()) // 8
    assert layout.block_bytes_total == page
    assert layout.slot_bytes(4) == 4 * page
    assert layout.num_blocks == 8


def test_mla_is_one_plane_per_layer_and_shared_layers_count_once() -> None:
    latent = torch.zeros(6, 16, 576, dtype=torch.bfloat16)
    layout = KVLayout.from_kv_caches({"a": latent, "b": latent, "c": latent.clone()})
    assert [p.block_bytes for p in layout.planes] == [16 * 576 * 2] * 2


def test_kernel_blocks_are_joined_to_the_pools_blocks() -> None:
    tensor = torch.arange(8 * 2 * 4 * 6, dtype=torch.float32).view(8, 2, 4, 6)
    layout = KVLayout.from_kv_caches({"a": tensor}, num_blocks=4)
    (plane,) = layout.planes
    assert (layout.num_blocks, plane.block_bytes) == (4, 2 * 2 * 4 * 6 * 4)
    assert torch.equal(layout.views[0][1], tensor[2:4].view(torch.uint8).flatten())


@pytest.mark.parametrize("num_blocks", [2, 7])
def test_leading_two_with_block_count(num_blocks: int) -> None:
    """A pool of two blocks, [NB, 2, ...], is not mistaken for [2, NB, ...]."""
    blocks_first = torch.zeros(num_blocks, 2 if num_blocks > 2 else 3, 4, 2, 8)
    layout = KVLayout.from_kv_caches({"a": blocks_first}, num_blocks=num_blocks)
    assert (len(layout.planes), layout.num_blocks) == (1, num_blocks)
    halves_first = torch.zeros(2, 7, 4, 2, 8)
    assert len(KVLayout.from_kv_caches({"a": halves_first}, num_blocks=7).planes) == 2


@pytest.mark.parametrize(
    ("caches", "options", "message"),
    [
        ({}, {}, "no KV caches"),
        ({"a": torch.zeros(4, 8)}, {"n_kv_cache_groups": 2}, "hybrid"),
        ({"a": [torch.zeros(4, 8)]}, {}, "Mamba"),
        ({"a": torch.zeros(4, 8), "b": torch.zeros(5, 8)}, {}, "hybrid"),
        ({"a": torch.zeros(4, 8, 16)[:, :, :8]}, {}, "not contiguous"),
        ({"a": torch.zeros(4, 1).expand(4, 8)}, {}, "not contiguous"),
        ({"a": torch.zeros(2, 2, 4, 2, 8)}, {}, "cannot tell"),
        ({"a": torch.zeros(5, 8)}, {"num_blocks": 4}, "does not hold 4 blocks"),
        ({"a": torch.zeros(4)}, {}, "is needed"),
    ],
)
def test_layouts_that_are_refused(
    caches: dict[str, torch.Tensor], options: dict[str, int], message: str
) -> None:
    with pytest.raises(KVLayoutError, match=message):
        KVLayout.from_kv_caches(caches, **options)


def test_overlaid_layers_of_another_shape_are_refused() -> None:
    tensor = torch.zeros(4, 8, 6)
    with pytest.raises(KVLayoutError, match="overlays"):
        KVLayout.from_kv_caches({"full": tensor, "window": tensor.view(4, 6, 8)})


def test_fingerprint_tells_apart_what_must_not_be_mixed() -> None:
    def of(tensor: torch.Tensor, n: int = 1) -> str:
        caches = {str(i): tensor.clone() for i in range(n)}
        return KVLayout.from_kv_caches(caches).fingerprint

    base = torch.zeros(8, 2, 4, 16, dtype=torch.bfloat16)
    assert of(base) == of(torch.ones(9, 2, 4, 16, dtype=torch.bfloat16))
    permuted = torch.zeros(8, 4, 2, 16, dtype=torch.bfloat16).transpose(1, 2)
    others = [
        of(base.half()),
        of(base.view(8, 4, 2, 16)),
        KVLayout.from_kv_caches({"0": permuted}).fingerprint,
        of(base, 2),
        of(torch.zeros(2, 8, 2, 4, 8, dtype=torch.bfloat16)),
    ]
    assert len({of(base), *others}) == len(others) + 1


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ids", "slot_order", "gap", "n_runs"),
    [
        ("joint", [0, 1, 2, 3], None, 0, 2 * 2),  # two planes, one run per chunk
        ("joint", [0, 1, 3, 2], None, 0, 2 * 3),
        ("block_outermost", [0, 1, 2, 3], None, 0, 1),  # contiguous over chunks
        ("block_outermost", [0, 1, 2, 3], None, 24, 2),  # but for a gap between slots
        ("block_outermost", [2, 3, 0, 1], [1, 0], 0, 1),  # both sides, in the slots' order
        ("block_outermost", [0, 1, 2, 3], [1, 0], 0, 2),
        ("block_outermost", [3, 1, 0, 2], None, 0, 4),
        ("split", [4, 5, 6, 7], None, 0, 4 * 2),
    ],
)
def test_runs_are_as_few_as_possible(
    kind: str, ids: list[int], slot_order: list[int] | None, gap: int, n_runs: int
) -> None:
    case = make_case(kind, block_ids=ids, slot_order=slot_order, gap_bytes=gap)
    plan = plan_order(case.layout, case.order("store"), case.region.nbytes)
    assert plan.n_runs == n_runs
    assert plan.run_bytes == plan.n_bytes / n_runs


def test_strided_planes_copy_block_by_block() -> None:
    tensor = torch.zeros(8, 2, 2, 16)[:, 0]  # every second page belongs to someone else
    layout = KVLayout.from_kv_caches({"a": tensor})
    order = CopyOrder("o", "store", "r", [0, 1, 2, 3], [0], 4)
    plan = plan_order(layout, order, layout.slot_bytes(4))
    assert (len(plan.runs), plan.n_runs) == (1, 4)


# --- orders that must not run --------------------------------------------------------------------


def bad_orders(case: Case) -> list[CopyOrder]:
    slot_bytes, end = case.layout.slot_bytes(2), case.region.nbytes
    return [
        case.order("store", slots=[-2, *case.slots[1:]]),
        case.order("load", slots=[end - slot_bytes + 1, *case.slots[1:]]),
        case.order("store", slots=[2**62, *case.slots[1:]]),
        case.order("store", slots=[case.slots[0]] * 4),
        case.order("store", block_ids=[0, 1, 2, 3, 4, 5, 6, 8]),
        case.order("load", block_ids=[-1, 1, 2, 3, 4, 5, 6, 7]),
        case.order("store", block_ids=[0, 1, 2, 3, 4, 5, 6]),
        case.order("load", block_ids=[0, 1, 2, 3, 4, 5]),
        case.order("load", block_ids=[*range(8), 0]),
        case.order("store", skip_blocks=1),
        case.order("load", skip_blocks=9),
        case.order("load", skip_blocks=-1),
        case.order("load", chunk_blocks=0),
        case.order("erase"),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("index", range(len(bad_orders(make_case()))))
def test_bad_orders_fail_and_write_nothing(index: int) -> None:
    # The caches lie inside larger storage, whose edges would show a wild write as well.
    case = make_case("block_outermost")
    storage = case.layout.views[0].untyped_storage()
    everything = torch.empty(0, dtype=torch.uint8).set_(storage)
    before, region = everything.clone(), case.region.copy()
    good = case.order("load", order_id="good", block_ids=[], slots=[])
    bad, after = run(case, bad_orders(case)[index], good)
    assert not bad.ok
    assert bad.error
    assert bad.n_bytes == 0
    assert after.ok
    assert torch.equal(everything, before)
    np.testing.assert_array_equal(case.region, region)


def test_skipped_block_ids_are_ignored() -> None:
    case = make_case()
    order = case.order("load", block_ids=[-1, 10**6, 2, 3, 4, 5, 6, 7], skip_blocks=2)
    assert run(case, order)[0].ok


def test_orders_are_picklable() -> None:
    order = make_case().order("load", block_ids=np.arange(8), skip_blocks=1, deadline_s=2.0)
    copy = pickle.loads(pickle.dumps(order))
    assert (copy.slots, copy.skip_blocks, copy.deadline_s) == (order.slots, 1, 2.0)
    np.testing.assert_array_equal(copy.block_ids, order.block_ids)


# --- the engine ----------------------------------------------------------------------------------


def test_loads_overtake_queued_stores() -> None:
    case, gate = make_case(), Gate()
    with CpuCopyEngine(
        case.layout, case.region, kernel=gate, max_store_backlog_bytes=1 << 20
    ) as engine:
        engine.submit(case.order("store", order_id=1), 0.0)
        assert gate.entered.acquire(timeout=WAIT_S)
        engine.submit(case.order("store", order_id=2), 0.0)
        engine.submit(case.order("load", order_id=3), 0.0)
        assert engine.backlog_bytes("store") == 2 * 4 * case.layout.slot_bytes(2)
        gate.go.release(10)
        assert engine.drain(WAIT_S)
        assert [r.order_id for r in engine.poll()] == [3, 1, 2]
        assert engine.backlog_bytes("store") == engine.backlog_bytes("load") == 0


def test_an_interrupted_store_resumes_where_it_was() -> None:
    case = make_case("split")
    expected = reference_store(case, case.order("store"))
    calls: list[int] = []
    started, queued = threading.Event(), threading.Event()

    def stopping(*args: object) -> int:
        """Stop the store after the first pieces, as the flag would in the middle of a copy."""
        runs, planes, region, load, piece, state, control = args
        calls.append(int(state[copy_kernel.STATE_BYTES]))  # type: ignore[index]
        if load == 0 and len(calls) == 1:
            compiled_kernel()(runs[:1], planes, region, load, piece, state, control)  # type: ignore[index,arg-type]
            started.set()
            assert queued.wait(WAIT_S)
        return compiled_kernel()(runs, planes, region, load, piece, state, control)  # type: ignore[arg-type]

    other = make_case("split", block_ids=[])
    with CpuCopyEngine(case.layout, case.region, kernel=stopping, piece_bytes=8) as engine:
        engine.submit(case.order("store"), 0.0)
        assert started.wait(WAIT_S)
        engine.submit(other.order("load"), 0.0)
        queued.set()
        assert engine.drain(WAIT_S)
        results = engine.poll()
    assert [r.order_id for r in results] == ["load", "store"]
    assert calls[0] == 0
    assert 0 < calls[-1] < results[1].n_bytes  # went on, did not start over
    assert results[1].n_bytes == 4 * case.layout.slot_bytes(2)
    np.testing.assert_array_equal(case.region, expected)


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_the_loop_can_be_stopped_after_every_piece(piece: int) -> None:
    case = make_case("split", torch.uint8)
    order = case.order("store")
    plan = plan_order(case.layout, order, case.region.nbytes)
    state = np.zeros(copy_kernel.STATE_FIELDS, np.int64)
    control = np.array([0, copy_kernel.NO_DEADLINE_NS])
    steps = 0

    def stop_after_one(target: int, source: int, n: int) -> None:
        nonlocal steps
        steps += 1
        assert steps <= plan.n_bytes  # a loop that starts over would never end
        control[copy_kernel.CONTROL_STOP] = 1
        ctypes.memmove(int(target), int(source), int(n))

    loop = copy_kernel._bind(stop_after_one, lambda *_: 0)
    outcome = copy_kernel.STOPPED
    while outcome == copy_kernel.STOPPED:
        control[copy_kernel.CONTROL_STOP] = 0
        outcome = loop(plan.runs, plan.planes, case.region.ctypes.data, 0, piece, state, control)
    assert outcome == copy_kernel.DONE
    assert steps >= plan.n_bytes / piece
    assert state[copy_kernel.STATE_BYTES] == plan.n_bytes
    np.testing.assert_array_equal(case.region, reference_store(case, order))


def test_cancel_queued_and_running() -> None:
    case, gate = make_case(), Gate()
    region = case.region.copy()
    with CpuCopyEngine(
        case.layout, case.region, kernel=gate, max_store_backlog_bytes=1 << 20
    ) as engine:
        engine.submit(case.order("store", order_id="running"), 0.0)
        assert gate.entered.acquire(timeout=WAIT_S)
        engine.submit(case.order("store", order_id="queued"), 0.0)
        assert engine.cancel("queued")
        assert engine.cancel("running")
        assert not engine.cancel("unknown")
        gate.go.release(10)
        assert engine.drain(WAIT_S)
        results = {r.order_id: r for r in engine.poll()}
    assert {r.error for r in results.values()} == {copy_engine.CANCELLED}
    assert results.keys() == {"running", "queued"}
    np.testing.assert_array_equal(case.region, region)


def test_a_failing_copy_fails_its_order_only() -> None:
    case = make_case()
    fail = [True]

    def flaky(*args: object) -> int:
        if fail:
            fail.pop()
            message = "bus on fire"
            raise OSError(message)
        return compiled_kernel()(*args)  # type: ignore[arg-type]

    first, second = run(case, case.order("store"), case.order("store"), kernel=flaky)
    assert (first.ok, first.error) == (False, "OSError: bus on fire")
    assert second.ok
    np.testing.assert_array_equal(case.region, reference_store(case, case.order("store")))


def test_lease_over_before_the_copy() -> None:
    case = make_case()
    region = case.region.copy()
    results = run(
        case,
        case.order("store", deadline_s=99.0),
        case.order("load", block_ids=[], slots=[], deadline_s=101.0),
        clock=lambda: 100.0,
    )
    late, ok = sorted(results, key=lambda r: r.ok)
    assert (late.ok, late.error, late.n_bytes) == (False, copy_engine.LEASE_ENDED, 0)
    assert ok.ok
    np.testing.assert_array_equal(case.region, region)


def test_a_late_load_tells_which_blocks_it_has_not_written() -> None:
    case = make_case()
    plan = plan_order(case.layout, case.order("load"), case.region.nbytes)
    assert len(plan.runs) > 2

    def late(runs: object, *args: object) -> int:
        compiled_kernel()(runs[:2], *args)  # type: ignore[index,arg-type]
        return copy_kernel.LATE

    (result,) = run(case, case.order("load"), kernel=late)
    assert result.error == copy_engine.LEASE_ENDED
    written = {b for first, _, _, n in plan.runs[:2].tolist() for b in range(first, first + n)}
    assert result.missing_blocks == set(case.block_ids) - written
    (early,) = run(case, case.order("load", deadline_s=-1.0))
    assert early.missing_blocks == set(case.block_ids)
    (store,) = run(case, case.order("store", deadline_s=-1.0))
    assert store.missing_blocks is None


def test_lease_over_during_the_copy_stops_it() -> None:
    case = make_case()
    order = case.order("store")
    plan = plan_order(case.layout, order, case.region.nbytes)
    state = np.zeros(copy_kernel.STATE_FIELDS, np.int64)
    now_ns = [0]

    def clock(_: int, address: int) -> int:
        now_ns[0] += 10
        timespec = (ctypes.c_int64 * 2).from_address(address)
        timespec[0], timespec[1] = 0, now_ns[0]
        return 0

    copied: list[int] = []
    loop = copy_kernel._bind(lambda *a: copied.append(a[2]), clock)
    control = np.array([0, 25])  # after the second look at the clock
    outcome = loop(plan.runs, plan.planes, case.region.ctypes.data, 0, 16, state, control)
    assert outcome == copy_kernel.LATE
    assert sum(copied) == 2 * 16
    assert state[copy_kernel.STATE_NS] == 30
    # Of what was copied after the last look nobody knows whether it was in time.
    state[:], copied[:], now_ns[0] = 0, [], 0
    assert loop(plan.runs, plan.planes, 0, 0, 300, state, control) == copy_kernel.LATE
    assert (state[copy_kernel.STATE_RUN], state[copy_kernel.STATE_SAFE_RUN]) == (2, 1)


def test_store_backlog_is_bounded() -> None:
    case, gate = make_case(), Gate()
    limit = 4 * case.layout.slot_bytes(2)
    with CpuCopyEngine(
        case.layout, case.region, kernel=gate, max_store_backlog_bytes=limit
    ) as engine:
        engine.submit(case.order("store", order_id=1), 0.0)
        engine.submit(case.order("store", order_id=2), 0.0)
        engine.submit(case.order("load", order_id=3), 0.0)
        (refused,) = engine.poll()
        assert (refused.order_id, refused.ok) == (2, False)
        assert "backlog full" in refused.error
        gate.go.release(10)
        assert engine.drain(WAIT_S)
        assert {r.order_id for r in engine.poll() if r.ok} == {1, 3}


def test_close_fails_what_is_left_and_refuses_more() -> None:
    case, gate = make_case(), Gate()
    engine = CpuCopyEngine(case.layout, case.region, kernel=gate)
    engine.submit(case.order("store", order_id=1), 0.0)
    engine.submit(case.order("load", order_id=2), 0.0)
    assert gate.entered.acquire(timeout=WAIT_S)
    assert not engine.drain(0.0)
    engine._closing = True  # before the copy goes on: it must not take the next order
    gate.go.release(10)
    engine.close()
    results = engine.poll()
    assert {r.order_id for r in results} == {1, 2}
    assert copy_engine.CLOSED in {r.error for r in results}
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(case.order("store"), 0.0)
    engine.close()


def test_results_carry_times_and_run_size() -> None:
    case, gate = make_case(), Gate()
    gate.go.release(10)
    clock = iter(np.arange(5.0, 100.0)).__next__
    with CpuCopyEngine(case.layout, case.region, kernel=gate, clock=clock) as engine:
        engine.submit(case.order("store"), 2.0)
        assert engine.drain(WAIT_S)
        (result,) = engine.poll()
        assert engine.poll() == []
    assert result.queued_s == 3.0
    assert result.seconds > 0.0
    assert result.request_id == "r"
    assert result.run_bytes == 2 * case.layout.planes[0].block_bytes


def test_without_numba_the_python_loop_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError

    monkeypatch.setattr(copy_kernel, "compiled_kernel", missing)
    assert copy_kernel.load_kernel() is python_kernel()


def test_the_copy_leaves_the_interpreter_to_others() -> None:
    """Python code advances between the start and the end of one long copy."""
    tensor = torch.zeros(64, 1 << 20, dtype=torch.uint8)
    layout = KVLayout.from_kv_caches({"a": tensor})
    region = np.zeros(layout.slot_bytes(64), np.uint8)
    order = CopyOrder("o", "store", "r", list(range(64)), [0], 64)
    plan = plan_order(layout, order, region.nbytes)
    kernel = compiled_kernel()
    state = np.zeros(copy_kernel.STATE_FIELDS, np.int64)
    control = np.array([0, copy_kernel.NO_DEADLINE_NS])
    seen: list[int] = []
    total = plan.n_bytes * 24

    def copy() -> None:
        args = (plan.planes, region.ctypes.data, 0, 1 << 16, state, control)
        kernel(np.tile(plan.runs, (24, 1)), *args)  # one call

    thread = threading.Thread(target=copy)
    thread.start()
    while thread.is_alive():
        seen.append(int(state[copy_kernel.STATE_BYTES]))
    thread.join()
    assert state[copy_kernel.STATE_BYTES] == total
    # With the lock held throughout, nothing between the first and the last byte could be seen.
    assert any(0 < n < total for n in seen)


def test_small_copies_are_made_at_once_and_wait_behind_others() -> None:
    case, gate = make_case(), Gate()
    order = case.order("store")
    expected = reference_store(case, order)
    n_bytes = plan_order(case.layout, order, case.region.nbytes).n_bytes
    with CpuCopyEngine(case.layout, case.region, inline_bytes=n_bytes) as engine:
        engine.submit(order, 0.0)
        (result,) = engine.poll()  # without waiting
        assert (result.ok, result.n_bytes) == (True, n_bytes)
        engine.submit(case.order("store", order_id="late", deadline_s=-1.0), 0.0)
        assert engine.poll()[0].error == copy_engine.LEASE_ENDED
    np.testing.assert_array_equal(case.region, expected)
    with CpuCopyEngine(
        case.layout,
        case.region,
        kernel=gate,
        inline_bytes=n_bytes - 1,
        max_store_backlog_bytes=1 << 30,
    ) as engine:
        engine.submit(order, 0.0)
        engine.submit(case.order("load", block_ids=[1, 2], slots=case.slots[:1]), 0.0)
        assert engine.poll() == []
        gate.go.release(10)
        assert engine.drain(WAIT_S)
        assert len(engine.poll()) == 2
