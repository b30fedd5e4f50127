"""Stand-ins for CUDA: torch's streams and events, and a driver whose copies are memmove."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvtier.copies.driver import FUNCTIONS, NOT_READY, SUCCESS, Driver
from kvtier.copies.gpu_kernel import GpuKernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest
    from numpy.typing import NDArray

WAIT_S = 30.0
KERNEL = GpuKernel(function=1234, grid_blocks=8, module=None)
_WORD, _NUMBER = ctypes.c_ssize_t, ctypes.c_uint
_TYPES: dict[str, tuple[Any, ...]] = {
    "cuMemcpyBatchAsync": (_WORD,) * 9,
    "cuMemcpyAsync": (_WORD,) * 4,
    "cuLaunchKernel": (_WORD, *[_NUMBER] * 7, _WORD, _WORD, _WORD),
    "cuEventRecord": (_WORD,) * 2,
    "cuEventQuery": (_WORD,),
    "cuEventSynchronize": (_WORD,),
}


def _array(address: int, count: int) -> NDArray[np.int64]:
    return np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(address))


_current: list[FakeDriver] = []


@functools.cache
def _callbacks() -> dict[str, Any]:
    """Entry points of whichever stand-in was made last.

    One set for the whole process, as a real driver has: compiled code keeps the addresses.
    """

    def entry(name: str) -> Any:
        def call(*arguments: int) -> int:
            code: int = getattr(_current[0], f"_{name}")(*arguments)
            return code

        return ctypes.CFUNCTYPE(ctypes.c_int, *_TYPES[name])(call)

    return {name: entry(name) for name in FUNCTIONS}


def _addresses() -> dict[str, int]:
    return {
        name: ctypes.cast(callback, ctypes.c_void_p).value or 0
        for name, callback in _callbacks().items()
    }


class FakeDriver:
    """A driver that copies at once and notes its calls.

    Attributes:
        calls: Function and what distinguishes the call, in order.
        code: What copies and launches return.
        computing: How often ``cuEventQuery`` says that the GPU computes.
        entered, go: Each copy says that it began, and with `gated` waits to be let through.
    """

    def __init__(self, *, has_batch: bool = True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.code = SUCCESS
        self.computing = 0
        self.gated = False
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        _current[:] = [self]
        self.driver = Driver(_addresses(), has_batch)

    def copies(self) -> list[tuple[Any, ...]]:
        """The calls that copy."""
        return [call for call in self.calls if call[0] in {"batch", "run", "kernel"}]

    def _copy(self, note: tuple[Any, ...], *runs: NDArray[np.int64]) -> int:
        self.entered.release()
        if self.gated:
            assert self.go.acquire(timeout=WAIT_S)
        self.calls.append(note)
        if self.code == SUCCESS:
            for target, source, n_bytes in np.stack(runs, axis=1).tolist():
                ctypes.memmove(target, source, n_bytes)
        return self.code

    def _cuMemcpyBatchAsync(self, *arguments: int) -> int:  # noqa: N802 - the driver's name
        targets, sources, sizes, count, attributes, first, n_attributes, _, _ = arguments
        order = ctypes.c_uint.from_address(attributes).value
        assert (n_attributes, _array(first, 1)[0]) == (1, 0)
        runs = (_array(address, count) for address in (targets, sources, sizes))
        return self._copy(("batch", count, order), *runs)

    def _cuMemcpyAsync(self, *arguments: int) -> int:  # noqa: N802
        runs = (np.array([value]) for value in arguments[:3])
        return self._copy(("run", arguments[2]), *runs)

    def _cuLaunchKernel(self, *arguments: int) -> int:  # noqa: N802
        function, grid, _, _, block, _, _, _, _, parameters, _ = arguments
        values = [int(_array(int(address), 1)[0]) for address in _array(parameters, 4)]
        runs = (_array(address, values[3]) for address in values[:3])
        return self._copy(("kernel", values[3], function, grid, block), *runs)

    def _cuEventRecord(self, event: int, _: int) -> int:  # noqa: N802
        self.calls.append(("record", event))
        return SUCCESS

    def _cuEventQuery(self, event: int) -> int:  # noqa: N802
        self.calls.append(("query", event))
        self.computing -= 1
        return NOT_READY if self.computing >= 0 else SUCCESS

    def _cuEventSynchronize(self, event: int) -> int:  # noqa: N802
        self.calls.append(("synchronize", event))
        return SUCCESS


class FakeStream:
    """Of the least urgent priority; waiting for it makes every event happen."""

    cuda_stream = 77

    def __init__(self, *_: object, priority: int = 0) -> None:
        assert priority == 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5

    def wait_event(self, event: FakeEvent) -> None:
        assert event.recorded_on == "compute"

    def synchronize(self) -> None:
        FakeEvent.ready = True


class FakeEvent:
    """Happens when `ready` says so; every copy takes a quarter of a second."""

    ready = True
    _handles = itertools.count(1)

    def __init__(self, *, enable_timing: bool = False, blocking: bool = False) -> None:
        self.recorded_on: object = None
        self.timing = enable_timing
        self._handle = next(FakeEvent._handles)

    @property
    def cuda_event(self) -> int:
        assert self.recorded_on is not None, "an event that was never recorded has no handle"
        return self._handle

    def record(self, stream: object) -> None:
        self.recorded_on = stream

    def query(self) -> bool:
        return FakeEvent.ready

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.timing
        assert end.timing
        assert self.recorded_on is end.recorded_on is not None
        return 250.0


@contextlib.contextmanager
def _on(stream: object) -> Iterator[None]:
    assert isinstance(stream, FakeStream)
    yield


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in torch's place; memory counts as page-locked."""
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "compute")
    monkeypatch.setattr(torch.cuda, "stream", _on)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    FakeEvent.ready = True
