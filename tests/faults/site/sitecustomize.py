"""Faults of the machine, for every Python process of a test that has this folder on its PYTHONPATH.

FAULTS_DIR names a folder; what is in it is in force:

- `clock`: seconds by which the wall clock was set (negative: back), as `time.time` and the boot time tell it.
- `full`: shared memory has no free byte left, as `os.statvfs` tells it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil._pslinux

LOOK_INTERVAL_S = 0.02

_faults = Path(os.environ.get("FAULTS_DIR", "/nonexistent"))
_time, _statvfs, _boot_time = time.time, os.statvfs, psutil._pslinux.boot_time
_seen: list[float] = [float("-inf"), 0.0]


def _offset_s() -> float:
    now_s = time.monotonic()
    if now_s - _seen[0] > LOOK_INTERVAL_S:
        try:
            _seen[:] = now_s, float((_faults / "clock").read_text() or 0)
        except (OSError, ValueError):
            _seen[:] = now_s, 0.0
    return _seen[1]


def _faulty_statvfs(path: object) -> os.statvfs_result:
    found = _statvfs(path)  # type: ignore[arg-type]
    if str(path).startswith("/dev/shm") and (_faults / "full").exists():
        found = os.statvfs_result((*found[:3], 0, 0, *found[5:10]))
    return found


if _faults.is_dir():
    time.time = lambda: _time() + _offset_s()
    psutil._pslinux.boot_time = lambda: _boot_time() + int(_offset_s())
    os.statvfs = _faulty_statvfs  # type: ignore[assignment]
