"""Whether a process that has introduced itself still runs."""

from __future__ import annotations

from typing import Final

import psutil

START_TOLERANCE_S: Final = 0.05


def start_s(pid: int) -> float | None:
    """Return when `pid` started, in Unix seconds; None if it is gone."""
    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None


def alive(pid: int, started_s: float) -> bool:
    """Whether the very process runs that started then: a pid alone is used again."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started_s) < START_TOLERANCE_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    # The last two: a number that no process can have.
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
