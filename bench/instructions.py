"""Instructions that a process retires, from the processor's own counter.

Processor time depends on what runs on the sibling of a hyperthread and in the shared caches; the number of
instructions for the same work does not. Linux gives the counter through ``perf_event_open(2)``, where the machine has
one (many virtual machines have none) and `/proc/sys/kernel/perf_event_paranoid` lets this user read it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from pathlib import Path
from typing import Final, Self

_SYSCALLS: Final = {"x86_64": 298, "aarch64": 241}
_HARDWARE, _INSTRUCTIONS = 0, 1
_TOTAL_TIMES: Final = 1 | 2
"""PERF_FORMAT_TOTAL_TIME_ENABLED and _RUNNING: a counter may take turns with others."""
_INHERIT, _EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 1, 1 << 5, 1 << 6
_ATTRIBUTES: Final = struct.Struct("<IIQQQQQ72x")
"""``struct perf_event_attr`` as of its sixth version, zeros behind the flags."""


class Instructions:
    """Counts the instructions of a process, its threads of now and those that they start.

    Args:
        pid: The process.

    Raises:
        OSError: There is no such counter here, or not for this user.
    """

    def __init__(self, pid: int) -> None:
        self._files: list[int] = []
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                try:
                    self._files.append(_open(int(task.name)))
                except ProcessLookupError:
                    continue  # a thread that has ended
        except BaseException:
            self.close()
            raise

    def count(self) -> int:
        """How many since the beginning."""
        total = 0.0
        for file in self._files:
            value, enabled, running = struct.unpack("<3Q", os.read(file, 24))
            total += value * enabled / running if running else 0
        return round(total)

    def close(self) -> None:
        """Let go."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Self:
        """Count while the context lasts."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go."""
        self.close()


def _open(task: int) -> int:
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        raise OSError(f"no counter of instructions is known on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (_EXCLUDE_HYPERVISOR, _EXCLUDE_HYPERVISOR | _EXCLUDE_KERNEL):
        # Who may not count the kernel's may perhaps count his own.
        attributes = ctypes.create_string_buffer(
            _ATTRIBUTES.pack(
                _HARDWARE, _ATTRIBUTES.size, _INSTRUCTIONS, 0, 0, _TOTAL_TIMES, _INHERIT | flags
            )
        )
        file: int = libc.syscall(number, attributes, task, -1, -1, 0)
        if file >= 0:
            return file
    error = ctypes.get_errno()
    raise OSError(error, f"the processor's counter of instructions: {os.strerror(error)}")
