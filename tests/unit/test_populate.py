"""Pages are mapped before a copy wants them, what they hold stays, and the end of the memory is waited for."""

from __future__ import annotations

import logging
import mmap
import re
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

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


def mapped_bytes(region: SharedRegion) -> int:
    """Of the region's pages, those that this process may touch without a fault."""
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    entry = smaps[smaps.index(region.name) :]
    found = re.search(r"^Rss:\s+(\d+) kB$", entry, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def test_all_pages_are_mapped_and_hold_what_they_held(region: SharedRegion) -> None:
    assert mapped_bytes(region) == 0
    populating = region.populate()
    assert populating.wait(WAIT_S)
    assert mapped_bytes(region) == SIZE
    assert region.array.tobytes() == bytes(range(256)) * (SIZE // 256)
    assert region.populate() is populating


def test_the_engine_of_a_cpu_has_its_region_mapped(region: SharedRegion) -> None:
    engine = default_engine(make_case().layout, region)
    populating = region._populating
    assert populating is not None
    assert populating.wait(WAIT_S)
    assert mapped_bytes(region) == SIZE
    engine.close()


def test_a_stop_waits_for_the_piece_under_way_and_leaves_the_rest(
    region: SharedRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    ended: list[int] = []

    def piece(address: int, n_bytes: int) -> bool:
        begun.set()
        assert may_end.wait(WAIT_S)
        ended.append(address)
        return True

    monkeypatch.setattr(populate, "_populate", piece)
    populating = Populating(region.address, SIZE, piece_bytes=mmap.PAGESIZE)
    assert begun.wait(WAIT_S)
    stopping = threading.Thread(target=populating.stop)
    stopping.start()
    assert populating._stopped.wait(WAIT_S)
    assert not populating.wait(0)
    assert stopping.is_alive()
    may_end.set()
    stopping.join(WAIT_S)
    assert populating.wait(0)
    assert ended == [region.address]


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
