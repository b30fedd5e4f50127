"""Processes are known again by their pid and start, whatever is done to the host's clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from kvtier.server import processes


def test_the_start_is_counted_from_boot_not_by_the_wall_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine must not be dead to its servers because somebody has set the clock."""
    begun_s = processes.start_s(os.getpid())
    assert begun_s is not None
    assert 0 < begun_s <= time.clock_gettime(time.CLOCK_BOOTTIME)
    # What the kernel says of the boot's wall-clock time when the clock has been set.
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1.0)
    assert processes.start_s(os.getpid()) == begun_s
    assert processes.alive(os.getpid(), begun_s)


def test_another_process_with_the_same_pid_is_another_process() -> None:
    begun_s = processes.start_s(os.getpid())
    assert begun_s is not None
    assert not processes.alive(os.getpid(), begun_s - 0.01)


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 2**70])
def test_no_process_has_that_pid(pid: int) -> None:
    assert processes.start_s(pid) is None
    assert not processes.alive(pid, 1.0)


def test_a_zombie_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    begun_s = processes.start_s(child.pid)
    assert begun_s is not None
    assert processes.alive(child.pid, begun_s)
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.start_s(child.pid) is None
    assert not processes.alive(child.pid, begun_s)
    child.wait()


def test_a_process_that_the_kernel_hides_may_be_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(pid: int) -> int:
        raise PermissionError(pid)

    monkeypatch.setattr(processes, "start_ticks", hidden)
    assert processes.start_s(1) is None
    assert processes.alive(1, 1.0)
