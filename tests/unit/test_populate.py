"""Pages are mapped before a copy wants them, what they hold stays, and the end of the memory is waited for."""

from __future__ import annotations

import logging
import mmap
import re
import sys
import threading
import types
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvtier import cpu_pool
from kvtier.copies import populate
from kvtier.copies.populate import Populating
from kvtier.cpu_pool import SharedRegion, default_engine
from tests.unit.copy_cases import make_case

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 30.0
SIZE = 64 * mmap.PAGESIZE


@pytest.fixture
def region() -> Iterator[SharedRegion]:
    path = cpu_pool.SHM_DIRECTORY / f"kvtier-test-{uuid.uuid4().hex}"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    path.chmod(0o600)
    opened = SharedRegion.open(path.name, SIZE)
    yield opened
    opened.close()
    path.unlink()


def can_populate() -> bool:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        try:
            memory.madvise(populate.MADV_POPULATE_WRITE)
        except OSError:
            return False
        return True


needs_populate = pytest.mark.skipif(
    not can_populate(), reason="this kernel has no MADV_POPULATE_WRITE (Linux 5.14)"
)


def mapped_bytes(region: SharedRegion) -> int:
    """Of the region's pages, those that this process may touch without a fault."""
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    entry = smaps[smaps.index(region.name) :]
    found = re.search(r"^Rss:\s+(\d+) kB$", entry, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@needs_populate
def test_all_pages_are_mapped_and_hold_what_they_held(region: SharedRegion) -> None:
    assert mapped_bytes(region) == 0
    populating = region.populate()
    assert populating.wait(WAIT_S)
    assert mapped_bytes(region) == SIZE
    assert region.array.tobytes() == bytes(range(256)) * (SIZE // 256)
    assert region.populate() is populating


@needs_populate
def test_the_engine_of_a_cpu_has_its_region_mapped(region: SharedRegion) -> None:
    engine = default_engine(make_case().layout, region)
    populating = region._populating
    assert populating is not None
    assert populating.wait(WAIT_S)
    assert mapped_bytes(region) == SIZE
    engine.close()


def test_memory_stays_mapped_until_the_piece_under_way_has_ended(
    monkeypatch: pytest.MonkeyPatch, region: SharedRegion
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    ended: list[int] = []

    def piece(address: int, n_bytes: int) -> bool:
        begun.set()
        assert may_end.wait(WAIT_S)
        ended.append(address)
        return True

    monkeypatch.setattr(populate, "_populate", piece)
    address = region.address
    populating = region._populating = Populating(address, SIZE, piece_bytes=SIZE)
    assert begun.wait(WAIT_S)
    closing = threading.Thread(target=region.close)
    closing.start()
    assert populating._stopped.wait(WAIT_S)
    assert closing.is_alive()
    assert region._array is not None
    may_end.set()
    closing.join(WAIT_S)
    assert region._array is None
    assert ended == [address]
    assert populating.wait(0)


def test_the_rest_is_left_when_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch, region: SharedRegion
) -> None:
    asked: list[int] = []

    def piece(address: int, n_bytes: int) -> bool:
        asked.append(address)
        # As `stop` does, which would wait for this very call.
        region._populating._stopped.set()  # type: ignore[union-attr]
        return True

    monkeypatch.setattr(populate, "_populate", piece)
    made = threading.Event()

    class Late(Populating):
        def _run(self) -> None:
            assert made.wait(WAIT_S)
            super()._run()

    region._populating = Late(region.address, SIZE, piece_bytes=mmap.PAGESIZE)
    made.set()
    assert region._populating.wait(WAIT_S)
    assert asked == [region.address]


def test_a_gpu_that_cannot_lock_the_region_has_it_mapped(
    monkeypatch: pytest.MonkeyPatch, region: SharedRegion
) -> None:
    cuda = types.ModuleType("kvtier.copies.cuda")
    cuda.CudaCopyEngine = lambda *_, **__: "engine"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, cuda.__name__, cuda)
    layout: Any = types.SimpleNamespace(device=torch.device("cuda"))
    for locked in (True, False):
        monkeypatch.setattr(region, "pin", lambda locked=locked: locked)
        assert default_engine(layout, region) == "engine"  # type: ignore[comparison-overlap]
        assert (region._populating is None) == locked


def test_no_thread_to_be_had_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, region: SharedRegion
) -> None:
    def full(_: threading.Thread) -> None:
        message = "can't start new thread"
        raise RuntimeError(message)

    monkeypatch.setattr(threading.Thread, "start", full)
    assert region.populate().wait(WAIT_S)
    assert mapped_bytes(region) == 0


def test_a_kernel_that_cannot_is_no_failure(
    region: SharedRegion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(populate, "MADV_POPULATE_WRITE", 9999)
    with caplog.at_level(logging.INFO, logger=populate.__name__):
        assert region.populate().wait(WAIT_S)
    assert "mapped as it is used" in caplog.text
    assert mapped_bytes(region) == 0
    region.array[5] = 1
    assert mapped_bytes(region) > 0
