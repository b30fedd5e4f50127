"""Mapping memory's pages before they are copied to.

Shared memory that was just mapped has no pages in this process yet: each is a fault of some microseconds at
the first write, in the middle of a copy, which is then ten times slower than the link. CUDA maps what it
page-locks; without it this does.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from typing import Final

logger = logging.getLogger(__name__)

MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14 and later; see madvise(2). Python's ``mmap`` does not know it."""
PIECE_BYTES: Final = 1 << 20
"""Mapped by one call, some 0.4 ms. Meanwhile whoever else maps memory in this process waits."""
PAUSE_S: Final = 0.001
"""Between two pieces, so that others seldom find memory's lock taken: a GiB is mapped in about two seconds.

The thread's priority is not lowered: one that is kept from its core while it has that lock holds up everybody.
"""

_libc = ctypes.CDLL(None, use_errno=True)


class Populating:
    """Maps the pages of ``[address, address + n_bytes)`` for writing, beside whatever else goes on.

    What they hold is left as it is. Where it cannot be done (an older kernel), nothing happens: the first
    writes fault. The memory must stay mapped until `stop` has returned.
    """

    def __init__(self, address: int, n_bytes: int, *, piece_bytes: int = PIECE_BYTES) -> None:
        """Start. ``address`` is that of a page, and ``piece_bytes`` a multiple of the page size."""
        self._address, self._n_bytes, self._piece_bytes = address, n_bytes, piece_bytes
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        thread = threading.Thread(target=self._run, name="kvtier-populate", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            logger.info("memory of the CPU tier is mapped as it is used: %s", error)
        else:
            self._thread = thread

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all is mapped, or cannot be; False if ``timeout_s`` passed before."""
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Leave the rest unmapped. Afterwards nothing is touched any more."""
        self._stopped.set()
        self.wait()

    def _run(self) -> None:
        for offset in range(0, self._n_bytes, self._piece_bytes):
            n_bytes = min(self._piece_bytes, self._n_bytes - offset)
            if not _populate(self._address + offset, n_bytes) or self._stopped.wait(PAUSE_S):
                return


def _populate(address: int, n_bytes: int) -> bool:
    """Map a piece; False if there is no use in going on. ctypes lets go of the interpreter lock meanwhile."""
    if not _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes), MADV_POPULATE_WRITE):
        return True
    code = ctypes.get_errno()
    if code in {errno.EINTR, errno.EAGAIN}:
        # The rest of the piece faults.
        return True
    logger.info("memory of the CPU tier is mapped as it is used: %s", os.strerror(code))
    return False
