"""Work that is bound by the memory of the device, as decoding is, to copy beside."""

from __future__ import annotations

import importlib
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch

from kvtier.linkbench.paths import PathError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CPU_BYTES: Final = 256 << 20
_GPU_BYTES: Final = 1 << 30
_GPU_KERNELS: Final = 8
_GPU_QUEUED: Final = 3
_START_TIMEOUT_S: Final = 30.0


class DecodeLoad(Protocol):
    """Reads the device's memory over and over."""

    def begin(self) -> None:
        """Start."""

    def end(self) -> float:
        """Stop; bytes read a second since `begin`."""

    def close(self) -> None:
        """Let go of the memory."""


def _read_memory(data: Any, control: Any) -> Any:
    """Sum up until ``control[0]`` is set; ``control[1]`` counts bytes."""
    total = 0.0
    while control[0] == 0:
        for start in range(0, data.size, 1 << 16):
            total += data[start : start + (1 << 16)].sum()
            control[1] += 1 << 19  # bytes of a part
            if control[0] != 0:
                break
    return total


class CpuLoad:
    """One thread that sums up memory in compiled code, without the interpreter lock."""

    def __init__(self) -> None:
        """Compile.

        Raises:
            PathError: numba is missing.
        """
        try:
            numba: Any = importlib.import_module("numba")
        except ImportError as error:
            raise PathError(f"no load without numba: {error}") from error

        signature = "float64(float64[::1], int64[::1])"
        self._read = numba.njit(signature, nogil=True, fastmath=True)(_read_memory)
        self._data = np.ones(_CPU_BYTES // 8)
        self._control: NDArray[np.int64] = np.zeros(2, np.int64)
        self._thread: threading.Thread | None = None
        self._started_s = 0.0

    def begin(self) -> None:
        """See `DecodeLoad.begin`."""
        self._control = np.zeros(2, np.int64)
        self._thread = threading.Thread(target=self._read, args=(self._data, self._control))
        self._thread.start()
        limit_s = time.perf_counter() + _START_TIMEOUT_S
        while self._control[1] == 0 and time.perf_counter() < limit_s:
            time.sleep(0.0001)
        self._control[1] = 0
        self._started_s = time.perf_counter()

    def end(self) -> float:
        """See `DecodeLoad.end`."""
        rate = int(self._control[1]) / (time.perf_counter() - self._started_s)
        self._control[0] = 1
        if self._thread is not None:
            self._thread.join()
        return rate

    def close(self) -> None:
        """See `DecodeLoad.close`."""


class GpuLoad:
    """Kernels that read a gigabyte each on the current stream, as many as were asked for.

    A thread keeps a few of them queued; what is reported is what has ended.
    """

    def __init__(self, device: torch.device) -> None:
        """Take the memory."""
        self._device = device
        self._data = torch.ones(_GPU_BYTES // 4, dtype=torch.float32, device=device)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._begun, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._n_kernels = 0

    def begin(self) -> None:
        """See `DecodeLoad.begin`."""
        self._stop.clear()
        self._n_kernels = 0
        torch.cuda.synchronize(self._device)
        self._begun.record(torch.cuda.current_stream(self._device))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        last: list[torch.cuda.Event] = []
        while not self._stop.is_set():
            for _ in range(_GPU_KERNELS):
                torch.sum(self._data)
            self._n_kernels += _GPU_KERNELS
            self._ended.record(torch.cuda.current_stream(self._device))
            done = torch.cuda.Event(blocking=True)
            done.record(torch.cuda.current_stream(self._device))
            last.append(done)
            if len(last) > _GPU_QUEUED:
                last.pop(0).synchronize()

    def end(self) -> float:
        """See `DecodeLoad.end`."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._ended.synchronize()
        seconds = float(self._begun.elapsed_time(self._ended)) / 1e3
        return self._n_kernels * _GPU_BYTES / seconds

    def close(self) -> None:
        """See `DecodeLoad.close`."""
        self._data = torch.empty(0)


def decode_load(device: torch.device) -> DecodeLoad:
    """The load for a device."""
    return GpuLoad(device) if device.type == "cuda" else CpuLoad()
