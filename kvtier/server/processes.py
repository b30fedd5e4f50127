"""Which process a pid means: a pid alone is used again, with the time of its start it is not.

That time is counted from the host's boot. psutil's is of the wall clock: it moves when the clock is set, and by
a second when the kernel rounds the boot time another way, so that living processes would be taken for dead ones.
"""

from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def start_ticks(pid: int) -> int | None:
    """Return when `pid` started, in clock ticks after boot; None if it is gone or a zombie.

    Raises:
        PermissionError: The kernel does not tell this user.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # proc(5): "pid (comm) state ...", comm may hold spaces and brackets; starttime is field 22.
    fields = line.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else int(fields[19])


def start_s(pid: int) -> float | None:
    """Return when `pid` started, in seconds after the host's boot; None if it is gone, or hidden."""
    try:
        ticks = start_ticks(pid)
    except PermissionError:
        return None
    return None if ticks is None else ticks / _TICKS_PER_S


def alive(pid: int, started_s: float) -> bool:
    """Whether the very process runs that started then, as `start_s` tells; True for a hidden one."""
    try:
        ticks = start_ticks(pid)
    except PermissionError:
        return True
    return ticks is not None and ticks / _TICKS_PER_S == started_s
