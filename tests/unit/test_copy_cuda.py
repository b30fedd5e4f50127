"""The CUDA engine's logic on CPU tensors, with stand-ins for torch's streams and events."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier import copy_engine
from kvtier.copies.cuda import CudaCopyEngine, word_views
from kvtier.copy_engine import NO_SLOT
from tests.unit.copy_cases import Case, cases, make_case, reference_load, reference_store

PROPERTY = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class FakeStream:
    waited: int = 0

    def __init__(self, *_: object, priority: int = 0) -> None:
        assert priority == 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5

    def wait_event(self, event: FakeEvent) -> None:
        assert event.recorded_on is not None
        self.waited += 1

    def synchronize(self) -> None:
        FakeEvent.ready = True


class FakeEvent:
    ready = True

    def __init__(self, *, enable_timing: bool = False) -> None:
        self.recorded_on: object = None
        self.timing = enable_timing

    def record(self, stream: object) -> None:
        self.recorded_on = stream

    def query(self) -> bool:
        return FakeEvent.ready

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.timing
        assert end.timing
        assert self.recorded_on is end.recorded_on is not None
        return 250.0


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "compute")
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    FakeEvent.ready = True


def engine_of(case: Case, **options: object) -> CudaCopyEngine:
    region = torch.from_numpy(case.region)
    return CudaCopyEngine(case.layout, region, **options)  # type: ignore[arg-type]


@PROPERTY
@given(case=cases(), staging=st.sampled_from((1, 500, 1 << 20)), data=st.data())
def test_both_directions_equal_the_reference(case: Case, staging: int, data: st.DataObject) -> None:
    slots = [s if data.draw(st.booleans()) else NO_SLOT for s in case.slots]
    engine = engine_of(case, staging_bytes=staging)
    store = case.order("store", slots=slots)
    expected = reference_store(case, store)
    engine.submit(store, time.monotonic())
    np.testing.assert_array_equal(case.region, expected)

    case.region[:] = np.random.default_rng(1).integers(0, 256, case.region.size, np.uint8)
    tail = data.draw(st.integers(0, case.chunk_blocks - 1))
    ids = case.block_ids[: len(case.block_ids) - tail]
    load = case.order(
        "load", slots=slots, block_ids=ids, skip_blocks=data.draw(st.integers(0, len(ids)))
    )
    planes = reference_load(case, load)
    engine.submit(load, time.monotonic())
    for view, plane in zip(case.layout.views, planes, strict=True):
        np.testing.assert_array_equal(view.numpy(), plane)
    results = engine.poll()
    assert [r.ok for r in results] == [True, True]
    assert {r.seconds for r in results} == {0.25}


def test_words_are_as_wide_as_the_planes_allow() -> None:
    assert word_views(make_case(page=(4, 2, 4)).layout)[0].dtype == torch.int64
    assert word_views(make_case(page=(1, 1, 1)).layout)[0].dtype == torch.int32
    odd = make_case(dtype=torch.uint8, page=(1, 1, 1), n_layers=1)
    assert word_views(odd.layout)[0].dtype == torch.int16


def test_orders_are_issued_within_the_bound_and_reported_when_their_event_is_done() -> None:
    case = make_case()
    FakeEvent.ready = False
    engine = engine_of(case, max_issued_bytes=1, max_store_backlog_bytes=1 << 20)
    for order_id in (1, 2, 3):
        engine.submit(case.order("store", order_id=order_id), 0.0)
    assert engine.poll() == []
    assert engine.cancel(3)
    assert engine.cancel(1)  # known, but on its stream
    assert not engine.cancel(9)
    assert not engine.drain(0.0)
    FakeEvent.ready = True
    assert engine.drain(10.0)
    results = engine.poll()
    assert [(r.order_id, r.error) for r in results] == [
        (3, copy_engine.CANCELLED),
        (1, ""),
        (2, ""),
    ]
    assert engine.backlog_bytes("store") == 0


def test_refused_late_and_failing_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    region = case.region.copy()
    engine = engine_of(case, clock=lambda: 100.0)
    engine.submit(case.order("store", order_id="outside", slots=[-5, 0, 500, 1000]), 0.0)
    engine.submit(case.order("store", order_id="late", deadline_s=99.0), 0.0)

    def fail(*_: object) -> None:
        message = "CUDA error: an illegal memory access"
        raise RuntimeError(message)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "index_select", fail)
        engine.submit(case.order("store", order_id="failing"), 0.0)
    np.testing.assert_array_equal(case.region, region)
    engine.submit(case.order("store", order_id="fine"), 0.0)
    results = {r.order_id: r for r in engine.poll()}
    assert "outside the region" in results["outside"].error
    assert results["late"].error == copy_engine.LEASE_ENDED
    assert "illegal memory access" in results["failing"].error
    assert results["fine"].ok


def test_a_lease_that_ended_meanwhile_fails_the_copy() -> None:
    case = make_case()
    clock = iter((98.0, 100.0)).__next__
    engine = engine_of(case, clock=clock)
    engine.submit(case.order("store", deadline_s=99.0), 0.0)
    assert [r.error for r in engine.poll()] == [copy_engine.LEASE_ENDED]


def test_close_waits_for_its_streams_and_fails_the_queue() -> None:
    case = make_case()
    FakeEvent.ready = False
    engine = engine_of(case, max_issued_bytes=1, max_store_backlog_bytes=1 << 20)
    engine.submit(case.order("store", order_id=1), 0.0)
    engine.submit(case.order("store", order_id=2), 0.0)
    engine.close()
    assert FakeEvent.ready
    assert {(r.order_id, r.error) for r in engine.poll()} == {(1, ""), (2, copy_engine.CLOSED)}
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(case.order("store"), 0.0)


def test_store_backlog_is_bounded() -> None:
    case = make_case()
    FakeEvent.ready = False
    engine = engine_of(case, max_store_backlog_bytes=4 * case.layout.slot_bytes(2))
    engine.submit(case.order("store"), 0.0)
    engine.submit(case.order("store", order_id=2), 0.0)
    assert ["backlog full" in r.error for r in engine.poll()] == [True]
