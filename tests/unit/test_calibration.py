"""Measurements have the right shape, and a profile survives the disk or is refused."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvtier import calibration
from kvtier.calibration import (
    CalibrationError,
    LinkMeasurement,
    PrefillSample,
    Profile,
    load_profile,
    measure_link,
    new_profile,
    profile_path,
    save_profile,
)
from kvtier.copies.kv_layout import KVLayout
from kvtier.copy_engine import CpuCopyEngine

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvtier.copy_engine import CopyEngine, CopyOrder


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
