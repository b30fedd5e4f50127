"""Runs a command that ends when its parent does: ``python -m kvtier.demo.child COMMAND...``.

A demo that is killed with SIGKILL cannot stop its servers. Linux can: this process asks to
get SIGTERM when its parent ends, then becomes the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Bind to the parent's life and become the command."""
    parent = int(arguments[0])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise SystemExit("the parent ended before the command started")
    os.execvp(arguments[1], arguments[1:])  # noqa: S606 - the demo's own command line


if __name__ == "__main__":
    main(sys.argv[1:])
