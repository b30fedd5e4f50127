"""A compiled ``memcpy`` loop at a given rate, which never touches Python: what copies cost at least."""

from __future__ import annotations

import importlib
import threading
from typing import Any

import numpy as np


class MemcpyLoop:
    """A thread in compiled code that moves bytes at a given rate."""

    def __init__(self, n_bytes: int) -> None:
        """Compile; each ``memcpy`` is of ``n_bytes``."""
        numba = importlib.import_module("numba")
        types = importlib.import_module("numba.core.types")
        memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.intp))
        usleep = types.ExternalFunction("usleep", types.int32(types.int32))
        clock_gettime = types.ExternalFunction(
            "clock_gettime", types.int32(types.int32, types.intp)
        )

        @numba.njit("void(int64, int64, int64, float64, int64[::1])", nogil=True)
        def loop(target: Any, source: Any, size: Any, per_s: Any, control: Any) -> None:
            clock = np.zeros(2, np.int64)
            clock_gettime(1, clock.ctypes.data)
            started_s = clock[0] + clock[1] / 1e9
            while control[0] == 0:
                clock_gettime(1, clock.ctypes.data)
                ahead_s = control[1] / per_s - (clock[0] + clock[1] / 1e9 - started_s)
                if ahead_s > 0:
                    usleep(min(int(ahead_s * 1e6) + 1, 1000))
                else:
                    before_s = clock[0] + clock[1] / 1e9
                    memcpy(target, source, size)
                    clock_gettime(1, clock.ctypes.data)
                    control[1] += size
                    control[2] += int((clock[0] + clock[1] / 1e9 - before_s) * 1e9)

        self._loop = loop
        self._ends = (np.ones(n_bytes, np.uint8), np.ones(n_bytes, np.uint8))
        self._control = np.zeros(3, np.int64)
        self._thread: threading.Thread | None = None

    def start(self, bytes_per_s: float) -> None:
        """Begin."""
        self._control = np.zeros(3, np.int64)
        target, source = (array.ctypes.data for array in self._ends)
        size = self._ends[0].nbytes
        args = (target, source, size, bytes_per_s, self._control)
        self._thread = threading.Thread(target=self._loop, args=args)
        self._thread.start()

    def stop(self) -> tuple[int, float]:
        """End; bytes moved, and mean seconds of a ``memcpy``."""
        self._control[0] = 1
        if self._thread is not None:
            self._thread.join()
        _, n_bytes, ns = self._control.tolist()
        return n_bytes, ns / 1e9 / max(1, n_bytes // self._ends[0].nbytes)
