"""Runs a command that ends with the process that started it.

``python -m kvtier.serving.child_process PARENT_PID COMMAND...`` asks the kernel for a SIGTERM at the
parent's death and becomes COMMAND. It is a process of its own because the request must be made
in the child, where Python allows no code of ours between fork and exec.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def tied_to_parent(argv: Sequence[str]) -> list[str]:
    """Return the command that runs `argv` as a child that dies with the calling process."""
    return [sys.executable, "-m", "kvtier.serving.child_process", str(os.getpid()), *argv]


def main() -> None:
    """Become the command."""
    parent_pid, *argv = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have died before the call.
    if os.getppid() != int(parent_pid):
        raise SystemExit(128 + signal.SIGTERM)
    os.execvp(argv[0], argv)  # noqa: S606 - the point of this module


if __name__ == "__main__":
    main()
