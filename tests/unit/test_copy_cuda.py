"""The CUDA engine on CPU memory, with stand-ins for streams, events and the driver (`fake_cuda`)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier import copy_engine
from kvtier.copies import issue
from kvtier.copies.cuda import CudaCopyEngine
from kvtier.copies.switch import Switch, always
from kvtier.copy_engine import NO_SLOT
from kvtier.costs.link_model import LinkModel
from tests.unit.copy_cases import Case, cases, make_case, reference_load, reference_store
from tests.unit.fake_cuda import KERNEL, WAIT_S, FakeDriver, FakeEvent, install

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtier.copy_engine import CopyResult

PROPERTY = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
LARGE = 1 << 30
RUN_BYTES = 96
"""One block of a plane of `make_case`: scattered blocks are runs of so many bytes."""


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


@pytest.fixture
def engines() -> Iterator[list[CudaCopyEngine]]:
    made: list[CudaCopyEngine] = []
    yield made
    for engine in made:
        engine.close()


def engine_of(case: Case, fake: FakeDriver, **options: object) -> CudaCopyEngine:
    options = {"max_store_backlog_bytes": LARGE, "kernel": KERNEL} | options
    region = torch.from_numpy(case.region)
    return CudaCopyEngine(case.layout, region, driver=fake.driver, **options)  # type: ignore[arg-type]


def finish(engine: CudaCopyEngine) -> list[CopyResult]:
    assert engine.drain(WAIT_S)
    return engine.poll()


@PROPERTY
@given(
    case=cases(),
    mode=st.sampled_from(("batch", "run", "kernel")),
    batch_bytes=st.sampled_from((1, 100, LARGE)),
    compiled=st.booleans(),
    data=st.data(),
)
def test_both_directions_equal_the_reference(
    case: Case, mode: str, batch_bytes: int, compiled: bool, data: st.DataObject
) -> None:
    slots = [s if data.draw(st.booleans()) else NO_SLOT for s in case.slots]
    fake = FakeDriver(has_batch=mode != "run")
    switch = always("kernel" if mode == "kernel" else "dma")
    loop = issue.compiled_loop(fake.driver) if compiled else issue.python_loop(fake.driver)
    engine = engine_of(case, fake, batch_bytes=batch_bytes, switch=switch, loop=loop)
    store = case.order("store", slots=slots)
    expected = reference_store(case, store)
    engine.submit(store, time.monotonic())
    results = finish(engine)
    np.testing.assert_array_equal(case.region, expected)

    case.region[:] = np.random.default_rng(1).integers(0, 256, case.region.size, np.uint8)
    tail = data.draw(st.integers(0, case.chunk_blocks - 1))
    ids = case.block_ids[: len(case.block_ids) - tail]
    load = case.order(
        "load", slots=slots, block_ids=ids, skip_blocks=data.draw(st.integers(0, len(ids)))
    )
    planes = reference_load(case, load)
    engine.submit(load, time.monotonic())
    results += finish(engine)
    engine.close()
    for view, plane in zip(case.layout.views, planes, strict=True):
        np.testing.assert_array_equal(view.numpy(), plane)
    assert [r.error for r in results] == ["", ""]
    assert {r.seconds for r in results} == {0.25}
    assert {call[0] for call in fake.copies()} <= {mode}


def test_a_whole_order_is_one_driver_call_and_only_loads_may_read_ahead(
    engines: list[CudaCopyEngine],
) -> None:
    case, fake = make_case(block_ids=[6, 1, 4, 3, 0, 2]), FakeDriver()
    engines.append(engine := engine_of(case, fake))
    engine.submit(case.order("store"), 0.0)
    (result,) = finish(engine)
    assert result.issue_s > 0
    engine.submit(case.order("load"), 0.0)
    finish(engine)
    assert fake.copies() == [("batch", 12, 1), ("batch", 12, 3)]


def test_memory_that_is_not_page_locked_is_copied_run_by_run(
    engines: list[CudaCopyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: False)
    case, fake = make_case(block_ids=[1, 4]), FakeDriver()
    engines.append(engine := engine_of(case, fake))
    engine.submit(case.order("store"), 0.0)
    finish(engine)
    assert {call[0] for call in fake.copies()} == {"run"}


def test_the_switch_goes_by_direction_size_and_number_of_runs(
    engines: list[CudaCopyEngine],
) -> None:
    # A kernel takes longer to start, and reads small runs four times as fast.
    slow, fast = LinkModel(0.0, ((8, 1e6),)), LinkModel(1e-3, ((8, 4e6),))
    switch = Switch(
        {
            ("load", "dma"): slow,
            ("load", "kernel"): fast,
            ("store", "dma"): fast,
            ("store", "kernel"): slow,
        }
    )
    case, fake = make_case(), FakeDriver()
    engines.append(engine := engine_of(case, fake, switch=switch))
    for direction in ("load", "store", "load"):
        engine.submit(case.order(direction), 0.0)
        finish(engine)
    engine.submit(case.order("load", block_ids=[3], slots=case.slots[:1]), 0.0)
    finish(engine)
    assert [call[0] for call in fake.copies()] == ["kernel", "batch", "kernel", "batch"]
    assert fake.copies()[0][2:] == (1234, 8, 1024)
    assert Switch().choose("load", 1, 1.0) == "dma"


def test_a_bounded_number_of_batches_is_in_flight(engines: list[CudaCopyEngine]) -> None:
    case, fake = make_case(block_ids=[6, 1, 4, 3]), FakeDriver()
    engines.append(engine := engine_of(case, fake, batch_bytes=RUN_BYTES, max_batches=3))
    for _ in range(2):
        engine.submit(case.order("store"), 0.0)
        finish(engine)
    recorded: list[int] = []
    for call in fake.calls:
        if call[0] == "record":
            recorded.append(call[1])
        elif call[0] == "synchronize":
            # The one before the last three, also over the border of two orders.
            assert call[1] == recorded[-3]
    assert len(recorded) == 16
    assert sum(call[0] == "synchronize" for call in fake.calls) == 13


def test_a_copy_is_stopped_between_batches(engines: list[CudaCopyEngine]) -> None:
    case, fake = make_case(block_ids=[6, 1, 4, 3]), FakeDriver()
    fake.gated = True
    engines.append(engine := engine_of(case, fake, batch_bytes=RUN_BYTES))
    engine.submit(case.order("load", order_id=1), 0.0)
    engine.submit(case.order("load", order_id=2), 0.0)
    engine.submit(case.order("load", order_id=3), 0.0)
    assert fake.entered.acquire(timeout=WAIT_S)
    assert engine.poll() == []
    assert engine.cancel(1)
    assert engine.cancel(2)
    assert not engine.cancel(9)
    fake.gated = False
    fake.go.release()
    results = {r.order_id: r for r in finish(engine)}
    n_runs = 8
    assert results[1].error == results[2].error == copy_engine.CANCELLED
    assert results[1].n_bytes * n_runs == results[3].n_bytes
    assert results[2].n_bytes == 0
    assert results[3].ok
    assert len(fake.copies()) == 1 + n_runs
    assert engine.backlog_bytes("load") == 0


def test_loads_do_not_wait_for_stores(engines: list[CudaCopyEngine]) -> None:
    case, fake = make_case(), FakeDriver()
    fake.gated = True
    engines.append(engine := engine_of(case, fake))
    engine.submit(case.order("store"), 0.0)
    assert fake.entered.acquire(timeout=WAIT_S)
    engine.submit(case.order("load"), 0.0)
    assert fake.entered.acquire(timeout=WAIT_S)
    fake.go.release(2)
    assert {r.direction for r in finish(engine)} == {"store", "load"}


def test_results_come_when_their_event_has_happened(engines: list[CudaCopyEngine]) -> None:
    case, fake = make_case(), FakeDriver()
    FakeEvent.ready = False
    engines.append(engine := engine_of(case, fake))
    engine.submit(case.order("store", order_id=1), 0.0)
    assert not engine.drain(0.0)
    assert fake.entered.acquire(timeout=WAIT_S)
    assert engine.poll() == []
    assert engine.backlog_bytes("store") > 0
    FakeEvent.ready = True
    assert [r.order_id for r in finish(engine)] == [1]
    assert engine.backlog_bytes("store") == 0


def test_refused_late_and_failing_orders(engines: list[CudaCopyEngine]) -> None:
    case, fake = make_case(), FakeDriver()
    region = case.region.copy()
    engines.append(engine := engine_of(case, fake, clock=lambda: 100.0))
    engine.submit(case.order("store", order_id="outside", slots=[-5, 0, 500, 1000]), 0.0)
    engine.submit(case.order("store", order_id="late", deadline_s=99.0), 0.0)
    results = finish(engine)
    assert fake.copies() == []
    fake.code = 700
    engine.submit(case.order("store", order_id="failing"), 0.0)
    results += finish(engine)
    np.testing.assert_array_equal(case.region, region)
    fake.code = 0
    engine.submit(case.order("store", order_id="fine"), 0.0)
    errors = {r.order_id: r.error for r in (*results, *finish(engine))}
    assert "outside the region" in errors["outside"]
    assert errors["late"] == copy_engine.LEASE_ENDED
    assert "CUDA error 700" in errors["failing"]
    assert errors["fine"] == ""


def test_a_lease_that_ended_meanwhile_fails_the_copy(engines: list[CudaCopyEngine]) -> None:
    case, fake = make_case(), FakeDriver()
    now = [98.0]
    engines.append(engine := engine_of(case, fake, clock=lambda: now[0]))
    FakeEvent.ready = False
    engine.submit(case.order("store", deadline_s=99.0), 0.0)
    assert fake.entered.acquire(timeout=WAIT_S)
    now[0] = 100.0
    FakeEvent.ready = True
    assert [r.error for r in finish(engine)] == [copy_engine.LEASE_ENDED]


def test_close_waits_for_its_streams_and_fails_the_queue() -> None:
    case, fake = make_case(block_ids=[6, 1, 4, 3]), FakeDriver()
    FakeEvent.ready = False
    fake.gated = True
    engine = engine_of(case, fake, batch_bytes=RUN_BYTES)
    engine.submit(case.order("store", order_id=1), 0.0)
    engine.submit(case.order("store", order_id=2), 0.0)
    assert fake.entered.acquire(timeout=WAIT_S)
    engine._closing = True  # before the copy goes on: it must not take the next order
    engine._lanes["store"].control[issue.CONTROL_STOP] = 1
    fake.gated = False
    fake.go.release()
    engine.close()
    assert FakeEvent.ready
    assert {(r.order_id, r.error) for r in engine.poll()} == {
        (1, copy_engine.CLOSED),
        (2, copy_engine.CLOSED),
    }
    assert len(fake.copies()) == 1
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(case.order("store"), 0.0)
    engine.close()


def test_store_backlog_is_bounded(engines: list[CudaCopyEngine]) -> None:
    case, fake = make_case(), FakeDriver()
    FakeEvent.ready = False
    limit = 4 * case.layout.slot_bytes(2)
    engines.append(engine := engine_of(case, fake, max_store_backlog_bytes=limit))
    engine.submit(case.order("store"), 0.0)
    engine.submit(case.order("store", order_id=2), 0.0)
    assert ["backlog full" in r.error for r in engine.poll()] == [True]
    FakeEvent.ready = True


def test_stores_are_paced_by_what_the_link_did(engines: list[CudaCopyEngine]) -> None:
    case, fake = make_case(block_ids=[6, 1, 4, 3]), FakeDriver()
    engines.append(engine := engine_of(case, fake, batch_bytes=RUN_BYTES, busy_share=0.5))
    engine.submit(case.order("store"), 0.0)
    (first,) = finish(engine)
    assert not any(call[0] == "query" for call in fake.calls)  # nothing was measured yet
    for direction in ("load", "store"):
        engine.submit(case.order(direction), 0.0)
        finish(engine)
    # The stand-ins' copies take 0.25 s.
    paces = [engine._lanes[d].control[issue.CONTROL_PACE] for d in ("load", "store")]
    assert paces == [0, int(first.n_bytes / 0.25 * 0.5)]
    busy = engine._computing.cuda_event
    assert {call[1] for call in fake.calls if call[0] == "query"} == {busy}
