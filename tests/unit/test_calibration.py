"""Measurements have the right shape, and a profile survives the disk or is refused."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvtier import calibration, worker_half
from kvtier.calibration import (
    CalibrationError,
    LinkMeasurement,
    MoverMeasurement,
    PrefillSample,
    Profile,
    fresh_profile,
    load_profile,
    machine_profile_path,
    measure_link,
    new_profile,
    profile_of,
    profile_path,
    save_profile,
)
from kvtier.copies.kv_layout import KVLayout
from kvtier.copy_engine import CpuCopyEngine
from kvtier.measuring.link import READER_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvtier.copy_engine import CopyEngine, CopyOrder, CopyResult


CPU = torch.device("cpu")


def profile() -> Profile:
    layout = KVLayout.from_kv_caches({"a": torch.zeros(4, 8)})
    link = LinkMeasurement(1e-4, ((4096, 5e9), (65536, 9e9)))
    return new_profile(
        "model-x", layout, {"store": link, "load": link}, [PrefillSample(0, 512, 0.25)]
    )


def test_measure_link_has_a_rate_for_each_size_both_ways() -> None:
    orders: list[CopyOrder] = []

    class Recording(CpuCopyEngine):
        def submit(self, order: CopyOrder, now_s: float) -> None:
            orders.append(order)
            super().submit(order, now_s)

    def factory(layout: KVLayout, region: NDArray[np.uint8]) -> CopyEngine:
        return Recording(layout, region)

    links = measure_link(
        run_sizes_bytes=(65536, 4096, 1 << 30),
        scratch_bytes=1 << 20,
        budget_s=0.0,
        engine_factory=factory,
    )
    for link in links.values():
        assert [size for size, _ in link.points] == [4096, 65536]
        assert all(rate > 0 for _, rate in link.points)
        assert link.latency_s >= 0
        assert link.model().points == link.points
    assert {o.direction for o in orders} == {"store", "load"}
    full = [o for o in orders if len(o.block_ids) == 256]
    assert full
    assert all(sorted(o.block_ids) == list(range(256)) for o in full)
    # Scattered, or blocks would merge into longer runs than the size they are booked under.
    assert sum(np.diff(full[0].block_ids) == 1) < 16


@pytest.mark.parametrize(
    ("cores", "beside_reader", "reads"), [(2, True, True), (1, True, False), (2, False, False)]
)
def test_another_core_reads_memory_while_a_cpu_is_measured(
    monkeypatch: pytest.MonkeyPatch, cores: int, beside_reader: bool, reads: bool
) -> None:
    found: set[bool] = set()

    def reader_runs() -> bool:
        return any(thread.name == READER_NAME for thread in threading.enumerate())

    class Looking(CpuCopyEngine):
        def submit(self, order: CopyOrder, now_s: float) -> None:
            found.add(reader_runs())
            super().submit(order, now_s)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    measure_link(
        run_sizes_bytes=(4096,),
        scratch_bytes=1 << 16,
        budget_s=0.0,
        beside_reader=beside_reader,
        engine_factory=Looking,
    )
    assert found == {reads}
    assert not reader_runs()


def test_on_a_cpu_the_time_is_that_in_which_bytes_moved() -> None:
    class Clocked(CpuCopyEngine):
        """Says that each byte takes 1 ns; in truth it takes what it takes."""

        def poll(self) -> list[CopyResult]:
            return [dataclasses.replace(r, seconds=r.n_bytes * 1e-9) for r in super().poll()]

    links = measure_link(
        run_sizes_bytes=(4096,), scratch_bytes=1 << 20, budget_s=0.0, engine_factory=Clocked
    )
    for link in links.values():
        assert link.latency_s == 0.0
        assert link.points[0][1] == pytest.approx(1e9)


def test_a_failing_copy_fails_the_calibration() -> None:
    def broken(*_: object) -> int:
        message = "no"
        raise OSError(message)

    with pytest.raises(CalibrationError, match="OSError: no"):
        measure_link(
            run_sizes_bytes=(4096,),
            scratch_bytes=1 << 16,
            engine_factory=lambda layout, region: CpuCopyEngine(layout, region, kernel=broken),
        )
    with pytest.raises(CalibrationError, match="no run size"):
        measure_link(run_sizes_bytes=(4096,), scratch_bytes=1024)


def test_profile_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "p.json"
    assert load_profile(path) is None
    save_profile(path, profile())
    save_profile(path, saved := profile())
    assert load_profile(path) == saved
    assert [p.name for p in path.parent.iterdir()] == ["p.json"]


def test_profile_names_the_machine_without_its_host_name() -> None:
    made = profile()
    assert made.machine_id == calibration.machine_id() == profile().machine_id
    assert socket.gethostname() not in json.dumps(made.__dict__, default=str)
    assert (made.gpu, made.measured_at[-6:]) == ("", "+00:00")
    assert made.cpu


def test_profile_path_separates_models_and_layouts() -> None:
    paths = {profile_path(Path("d"), m, f) for m in ("a", "b/c") for f in ("x", "y")}
    assert len(paths) == 4
    assert all(p.parent == Path("d") for p in paths)


def replace(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data | changes


LINK = {"latency_s": 1e-4, "points": [[4096, 5e9]]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: [],
        replace(version=2),
        lambda data: {k: v for k, v in data.items() if k != "store"},
        replace(model=3),
        replace(load={"latency_s": -1.0, "points": [[4096, 1e9]]}),
        replace(load={"latency_s": 0.0, "points": []}),
        replace(load={"latency_s": 0.0, "points": [[4096, float("nan")]]}),
        replace(load=[]),
        replace(prefill=[{"cached_tokens": 0, "new_tokens": 5}]),
        replace(prefill=[{"cached_tokens": 0, "new_tokens": 5, "seconds": 0}]),
        replace(prefill=7),
        replace(movers=7),
        replace(movers=[{"direction": "store", "mover": "pigeon", "link": LINK}]),
        replace(movers=[{"direction": "store", "mover": "dma", "link": []}]),
        replace(ceilings=[1.0]),
        replace(copy_revision="two"),
    ],
)
def test_damaged_profiles_are_ignored_with_a_warning(
    damage: Callable[[dict[str, Any]], object],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "p.json"
    save_profile(path, profile())
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    assert load_profile(path) is None
    assert "ignored" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null"])
def test_torn_files_are_ignored(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    assert load_profile(path) is None
    assert "ignored" in caplog.text


def test_a_failed_write_leaves_the_old_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.json"
    save_profile(path, saved := profile())

    def fail(*_: object, **__: object) -> None:
        message = "disk"
        raise OSError(message)

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(OSError, match="disk"):
        save_profile(path, profile())
    monkeypatch.undo()
    assert load_profile(path) == saved
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


# --- what still holds ----------------------------------------------------------------------------


def test_movers_and_ceilings_survive_the_disk_and_choose(tmp_path: Path) -> None:
    slow, fast = (LinkMeasurement(0.0, ((4096, rate),)) for rate in (1e9, 2e9))
    movers = (MoverMeasurement("load", "dma", slow), MoverMeasurement("load", "kernel", fast))
    saved = profile_of(
        "m", "f", CPU, {"store": slow, "load": fast}, movers=movers, ceilings={"d2h": 5e10}
    )
    save_profile(tmp_path / "p.json", saved)
    loaded = load_profile(tmp_path / "p.json")
    assert loaded == saved
    assert loaded.switch().choose("load", 1 << 20, 4096) == "kernel"
    assert loaded.switch().choose("store", 1 << 20, 4096) == "dma"


@pytest.mark.parametrize(
    "change",
    [
        {"measured_at": "2026-01-01T00:00:00+00:00"},
        {"measured_at": "yesterday"},
        {"measured_at": "2026-11-22T00:00:00"},
        {"gpu": "another"},
        {"driver": "1.2"},
        {"copy_revision": 1},
    ],
)
def test_what_was_measured_of_another_machine_or_engine_or_long_ago_does_not_hold(
    change: dict[str, Any],
) -> None:
    now = dt.datetime.fromisoformat(profile().measured_at) + dt.timedelta(days=29)
    assert profile().is_fresh(CPU, now)
    assert not dataclasses.replace(profile(), **change).is_fresh(CPU, now)
    assert not profile().is_fresh(CPU, now + dt.timedelta(days=2))
    # Measured when the clock was wrong by years: it would hold for as long.
    assert not profile().is_fresh(CPU, now - dt.timedelta(days=60))


def test_a_file_of_an_older_kvtier_is_read_and_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_profile(path, profile())
    data = json.loads(path.read_text())
    for name in ("driver", "copy_revision", "movers", "ceilings"):
        del data[name]
    path.write_text(json.dumps(data))
    old = load_profile(path)
    assert old is not None
    assert old.prefill == profile().prefill
    assert not old.is_fresh(CPU)


def test_a_model_starts_from_the_machines_own_profile_and_keeps_its_prefill_times(
    tmp_path: Path,
) -> None:
    layout = KVLayout.from_kv_caches({"a": torch.zeros(4, 8)})
    path = profile_path(tmp_path, "m", layout.fingerprint)
    stale = dataclasses.replace(profile(), model="m", measured_at="2020-01-01T00:00:00+00:00")
    save_profile(path, stale)
    assert fresh_profile(tmp_path, "m", layout) is None
    link = LinkMeasurement(2e-4, ((4096, 7e9),))
    save_profile(
        machine_profile_path(tmp_path), profile_of("", "", CPU, {"store": link, "load": link})
    )
    found = fresh_profile(tmp_path, "m", layout)
    assert found is not None
    assert (found.store, found.prefill, found.model) == (link, stale.prefill, "m")
    assert found.layout_fingerprint == layout.fingerprint
    save_profile(path, own := dataclasses.replace(found, store=stale.store))
    assert fresh_profile(tmp_path, "m", layout) == own


@pytest.mark.parametrize("may_measure", [True, False])
def test_an_engine_measures_anew_what_does_not_hold_if_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_measure: bool
) -> None:
    layout = KVLayout.from_kv_caches({"a": torch.zeros(4, 8)})
    path = profile_path(tmp_path, "m", layout.fingerprint)
    save_profile(path, dataclasses.replace(profile(), model="m", copy_revision=1))
    link = LinkMeasurement(2e-4, ((4096, 7e9),))
    monkeypatch.setattr(calibration, "measure_link", lambda _: {"store": link, "load": link})
    found = worker_half.calibrate(layout, "m", tmp_path, may_measure=may_measure)
    assert found is not None
    expected = link if may_measure else profile().store
    assert found.store == (expected.latency_s, expected.points)
    assert found.prefill == ((0, 512, 0.25),)
    saved = load_profile(path)
    assert saved is not None
    assert saved.is_fresh(CPU) is may_measure


def test_the_drivers_version_is_the_kernel_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(calibration, "_DRIVER_FILE", file)
    assert calibration.driver_version("cuda") == ""
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
        "GCC version:  gcc version 12.3.0\n"
    )
    assert calibration.driver_version("cuda") == "580.65.06"
    assert calibration.driver_version("cpu") == ""
