"""Mapping memory's pages before they are copied to.

Shared memory that was just mapped has no pages in this process yet: each is a fault of some microseconds at
the first write, in the middle of a copy, which is then ten times slower than the link. CUDA maps what it
page-locks; without it this does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import threading
from typing import Final

logger = logging.getLogger(__name__)

MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14 and later; see madvise(2). Python's ``mmap`` does not know it."""
PIECE_BYTES: Final = 4 << 20
"""Mapped by one call, some 2 ms: the end of a region waits for no more."""
NICENESS: Final = 19
"""What is copied in the meantime goes first."""

_libc = ctypes.CDLL(None, use_errno=True)


class Populating:
    """Maps the pages of ``[address, address + n_bytes)`` for writing, beside whatever else goes on.

    What they hold is left as it is. On a kernel that cannot, nothing happens: the first writes fault.
    The memory must stay mapped until `stop` has returned.
    """

    def __init__(self, address: int, n_bytes: int, *, piece_bytes: int = PIECE_BYTES) -> None:
        """Start. ``address`` is that of a page, and ``piece_bytes`` a multiple of the page size."""
        self._address, self._n_bytes, self._piece_bytes = address, n_bytes, piece_bytes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-populate", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all is mapped, or cannot be; False if ``timeout_s`` passed before."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Leave the rest unmapped. Afterwards nothing is touched any more."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        # Of this thread alone: Linux has priorities by thread.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        for offset in range(0, self._n_bytes, self._piece_bytes):
            if self._stopped.is_set():
                return
            n_bytes = min(self._piece_bytes, self._n_bytes - offset)
            if not _populate(self._address + offset, n_bytes):
                return


def _populate(address: int, n_bytes: int) -> bool:
    # ctypes lets go of the interpreter lock during the call.
    while _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), MADV_POPULATE_WRITE):
        code = ctypes.get_errno()
        if code not in {errno.EINTR, errno.EAGAIN}:
            logger.info("memory of the CPU tier is mapped as it is used: %s", os.strerror(code))
            return False
    return True
