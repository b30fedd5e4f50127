"""The mapped region: opened with care, never written outside, replaced when the server restarts."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from kvtier import cpu_pool
from kvtier.copies.kernel import compiled_kernel
from kvtier.copy_engine import CLOSED, CpuCopyEngine
from kvtier.cpu_pool import CpuPool, SharedRegion, SharedRegionError
from tests.unit.copy_cases import Case, make_case, reference_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvtier.copies.kv_layout import KVLayout
    from kvtier.copy_engine import CopyEngine

WAIT_S = 30.0
SIZE = 1 << 16


@pytest.fixture
def shm() -> Iterator[Path]:
    """A segment as the server makes it: sized, but without memory behind it yet."""
    path = cpu_pool.SHM_DIRECTORY / f"kvtier-test-{uuid.uuid4().hex}"
    path.touch(mode=0o600)
    os.truncate(path, SIZE)
    yield path
    path.unlink(missing_ok=True)


def blocks_of(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("prefix", ["", "/"])
def test_open_maps_the_same_bytes(shm: Path, prefix: str) -> None:
    region = SharedRegion.open(prefix + shm.name, SIZE)
    region.tensor[5] = 17
    region.array[SIZE - 1] = 18
    data = shm.read_bytes()
    assert (data[5], data[-1]) == (17, 18)
    assert (region.size_bytes, region.address) == (SIZE, region.array.ctypes.data)
    assert blocks_of(shm) >= SIZE  # memory was asked for: no SIGBUS later
    region.close()
    assert shm.exists()


def test_open_may_map_less_than_the_file(shm: Path) -> None:
    region = SharedRegion.open(shm.name, SIZE // 2)
    assert region.size_bytes == SIZE // 2
    region.close()


@pytest.mark.parametrize("name", ["", "/", "a/b", "..", "/../x"])
def test_open_refuses_paths(name: str) -> None:
    with pytest.raises(SharedRegionError, match="invalid"):
        SharedRegion.open(name, 10)


def test_open_refuses_what_is_missing_or_too_small(shm: Path) -> None:
    with pytest.raises(SharedRegionError, match="must run on this host"):
        SharedRegion.open(shm.name + "-none", SIZE)
    with pytest.raises(SharedRegionError, match=f"has {SIZE} bytes"):
        SharedRegion.open(shm.name, SIZE + 1)
    with pytest.raises(SharedRegionError, match="invalid"):
        SharedRegion.open(shm.name, 0)


def test_open_refuses_links_and_other_owners(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = shm.with_name(shm.name + "-link")
    link.symlink_to(shm)
    try:
        with pytest.raises(SharedRegionError, match="cannot open"):
            SharedRegion.open(link.name, SIZE)
    finally:
        link.unlink()
    monkeypatch.setattr(os, "geteuid", lambda: shm.stat().st_uid + 1)
    with pytest.raises(SharedRegionError, match="belongs to user id"):
        SharedRegion.open(shm.name, SIZE)


def test_open_fails_when_there_is_no_room(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SharedRegionError, match="--shm-size"):
        SharedRegion.open(shm.name, SIZE)


def test_close_refuses_while_someone_holds_the_bytes(shm: Path) -> None:
    region = SharedRegion.open(shm.name, SIZE)
    view = region.tensor
    with pytest.raises(SharedRegionError, match="in use"):
        region.close()
    view[0] = 9  # still mapped
    assert region.array[0] == 9
    del view
    region.close()
    region.close()
    with pytest.raises(SharedRegionError, match="is closed"):
        _ = region.array


@dataclass
class FakeCudart:
    """cudaHostRegister that fails from a given call on."""

    fail_at: int = 10**9
    registered: dict[int, int] = field(default_factory=dict)
    calls: int = 0

    def cudaHostRegister(self, address: int, n_bytes: int, _: int) -> int:  # noqa: N802
        self.calls += 1
        if self.calls > self.fail_at:
            return 2
        self.registered[address] = n_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


def fake_cuda(monkeypatch: pytest.MonkeyPatch, cudart: FakeCudart) -> None:
    monkeypatch.setattr(cpu_pool, "PIN_PIECE_BYTES", SIZE // 4 + 1)
    fake = SimpleNamespace(is_available=lambda: True, cudart=lambda: cudart)
    monkeypatch.setattr(torch, "cuda", fake)


def test_pin_in_pieces_and_unpin_on_close(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    region, cudart = SharedRegion.open(shm.name, SIZE), FakeCudart()
    fake_cuda(monkeypatch, cudart)
    assert region.pin()
    assert region.pin()
    assert region.is_pinned
    assert len(cudart.registered) == 4
    assert min(cudart.registered) == region.address
    assert sum(cudart.registered.values()) == SIZE
    region.close()
    assert not cudart.registered


def test_pin_falls_back_with_the_limit_in_the_warning(
    shm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    region, cudart = SharedRegion.open(shm.name, SIZE), FakeCudart(fail_at=2)
    fake_cuda(monkeypatch, cudart)
    with caplog.at_level(logging.WARNING):
        assert not region.pin()
    assert not region.is_pinned
    assert not cudart.registered  # not half pinned
    assert "memlock" in caplog.text
    assert cpu_pool._memlock_limit() in caplog.text
    region.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the machine without CUDA")
def test_pin_without_cuda(shm: Path, caplog: pytest.LogCaptureFixture) -> None:
    region = SharedRegion.open(shm.name, SIZE)
    assert not region.pin()
    assert "CUDA is not available" in caplog.text
    region.close()


# --- the pool ------------------------------------------------------------------------------------


def pool_case() -> Case:
    case = make_case()
    case.region = np.zeros(SIZE, np.uint8)
    return case


def test_pool_copies_into_the_file(shm: Path) -> None:
    case = pool_case()
    pool = CpuPool(case.layout)
    pool.attach(shm.name, SIZE, "g1")
    assert pool.generation == "g1"
    pool.submit(case.order("store", generation="g1"))
    assert pool.drain(WAIT_S)
    (result,) = pool.poll()
    assert result.ok, result.error
    expected = reference_store(case, case.order("store"))
    assert shm.read_bytes() == expected.tobytes()
    assert pool.backlog_bytes("store") == 0
    pool.detach()
    assert pool.generation is None


def test_pool_refuses_orders_it_must_not_run(shm: Path) -> None:
    case = pool_case()
    pool = CpuPool(case.layout)
    pool.submit(case.order("store", generation="g1"))
    assert [r.error for r in pool.poll()] == [cpu_pool.NOT_ATTACHED]
    pool.attach(shm.name, SIZE, "g2")
    pool.submit(case.order("store", generation="g1"))
    (stale,) = pool.poll()
    assert (stale.ok, "generation g1" in stale.error) == (False, True)
    pool.submit(case.order("store", generation="g2", slots=[SIZE - 8, 0, 400, 800]))
    assert pool.drain(WAIT_S)
    (outside,) = pool.poll()
    assert "outside the region" in outside.error
    assert not any(shm.read_bytes())
    pool.detach()


def test_same_generation_keeps_the_mapping_and_a_new_one_replaces_it(shm: Path) -> None:
    case = pool_case()
    engines: list[CopyEngine] = []

    def factory(layout: KVLayout, region: SharedRegion) -> CopyEngine:
        engines.append(cpu_pool.default_engine(layout, region))
        return engines[-1]

    pool = CpuPool(case.layout, engine_factory=factory)
    pool.attach(shm.name, SIZE, 1)
    pool.attach(shm.name, SIZE, 1)
    assert len(engines) == 1
    pool.submit(case.order("store", generation=1))
    shm.unlink()  # the server restarts under the same name
    shm.touch(mode=0o600)
    os.truncate(shm, SIZE)
    pool.attach(shm.name, SIZE, 2)
    assert len(engines) == 2
    assert [r.ok for r in pool.poll()] == [True]  # drained, not lost
    assert not any(shm.read_bytes())
    pool.submit(case.order("store", generation=2))
    assert pool.drain(WAIT_S)
    assert any(shm.read_bytes())
    pool.detach()


def test_detach_gives_up_what_does_not_drain(shm: Path) -> None:
    case = pool_case()
    entered, go = threading.Event(), threading.Event()

    def stuck(*args: object) -> int:
        entered.set()
        assert go.wait(WAIT_S)
        return compiled_kernel()(*args)  # type: ignore[arg-type]

    def factory(layout: KVLayout, region: SharedRegion) -> CopyEngine:
        return Impatient(layout, region.array, kernel=stuck)

    class Impatient(CpuCopyEngine):
        def close(self) -> None:
            self._closing = True  # before the copy goes on: it must not take the next order
            go.set()
            super().close()

    pool = CpuPool(case.layout, engine_factory=factory, drain_timeout_s=0.0)
    pool.attach(shm.name, SIZE, 1)
    pool.submit(case.order("load", order_id="a", generation=1))
    pool.submit(case.order("load", order_id="b", generation=1))
    assert entered.wait(WAIT_S)
    assert pool.cancel("a")
    pool.detach()
    results = {r.order_id: r for r in pool.poll()}
    assert results.keys() == {"a", "b"}
    assert results["b"].error == CLOSED
    assert not pool.cancel("a")
    assert pool.drain(0.0)


def test_attach_failures_leave_the_pool_detached(shm: Path) -> None:
    case = pool_case()

    def broken(_: KVLayout, region: SharedRegion) -> CopyEngine:
        assert region.size_bytes == SIZE
        message = "no engine"
        raise ValueError(message)

    pool = CpuPool(case.layout, engine_factory=broken)
    with pytest.raises(ValueError, match="no engine"):
        pool.attach(shm.name, SIZE, 1)
    assert pool.generation is None
    with pytest.raises(SharedRegionError):
        CpuPool(case.layout).attach(shm.name + "-none", SIZE, 1)
