"""Puts the runs of an order on a CUDA stream, batch by batch, in one call without the interpreter lock.

Each batch is one driver call: a batched copy, or a launch of the copy kernel; a driver too old for
batches, and memory that is not page-locked, get a call for each run. Between batches the loop looks
whether it is to stop, waits so that a bounded number of batches is in flight, and pauses while the GPU
computes, if it is told to.

All that is compiled stands in this one file: numba's cache on disk notices no other.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from kvtier.copies.compiled import compiled
from kvtier.copies.driver import NOT_READY

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvtier.copies.driver import Driver

logger = logging.getLogger(__name__)

BY_BATCH, BY_RUN, BY_KERNEL = range(3)
"""How the runs of a batch are issued."""
ISSUED, STOPPED, LATE, FAILED = range(4)
"""What a call returns."""

CONTROL_STOP, CONTROL_DEADLINE_NS, CONTROL_PACE, CONTROL_BUSY_EVENT, CONTROL_FIELDS = range(5)
"""``PACE``: bytes a second while the event ``BUSY_EVENT`` has not happened; 0: as fast as it goes."""
STATE_BYTES, STATE_ISSUE_NS, STATE_ERROR, STATE_FIELDS = range(4)
"""What a call issued, the time that driver calls took, and the driver's error code."""
LAUNCH_FUNCTION, LAUNCH_TABLE, LAUNCH_GRID, LAUNCH_BLOCK, LAUNCH_FIELDS = range(5)
"""Kernel, device address of its runs (targets, sources, sizes one after the other), its size."""
SCRATCH_FIELDS = 10
"""Index of the first attribute, index of a failed copy, a kernel's arguments, their addresses."""
RING_NEXT = 0
"""First field of a ring: batches that went through it. The handles of its events follow."""

_CLOCK_MONOTONIC = 1
_PAUSE_US = 200
_SIGNATURE = (
    "int64(int64, int64[::1], int64[::1], int64[::1], int64, int64, int64, int64, "
    "int64[::1], int64[::1], int64[::1], int64[::1], int64[::1])"
)


class IssueLoop(Protocol):
    """Issues batches; returns ``ISSUED``, ``STOPPED``, ``LATE`` or ``FAILED``.

    Args:
        mode: ``BY_BATCH``, ``BY_RUN`` or ``BY_KERNEL``.
        targets, sources, sizes: int64 [n], addresses and bytes of each run.
        batch_bytes, batch_runs: a batch is as many runs as stay within both, and at least one.
        attributes: address of a ``CUmemcpyAttributes``, which all runs share.
        stream: handle.
        ring: int64 [1 + most batches in flight]: a counter, and handles of events on the stream.
        launch: int64 [LAUNCH_FIELDS], read for ``BY_KERNEL``.
        scratch: int64 [SCRATCH_FIELDS], zeros at first. The driver reads it, so it must outlive the
            call, which numba does not promise of an array of the loop's own.
        state: int64 [STATE_FIELDS], zeros at first.
        control: int64 [CONTROL_FIELDS], written by other threads meanwhile.
    """

    def __call__(  # noqa: D102 - see the class
        self,
        mode: int,
        targets: NDArray[np.int64],
        sources: NDArray[np.int64],
        sizes: NDArray[np.int64],
        batch_bytes: int,
        batch_runs: int,
        attributes: int,
        stream: int,
        ring: NDArray[np.int64],
        launch: NDArray[np.int64],
        scratch: NDArray[np.int64],
        state: NDArray[np.int64],
        control: NDArray[np.int64],
        /,
    ) -> int: ...


def _unbound(*_: Any) -> Any:
    raise NotImplementedError


# The templates below call these; `_bind` puts the real ones in their place.
_memcpy_batch = _memcpy = _launch_kernel = _record = _query = _synchronize = _unbound
_clock_gettime = _usleep = _now_ns = _await_turn = _call = _unbound


def _now_ns_template(clock: Any) -> Any:
    """Nanoseconds; ``clock`` is space for a struct timespec."""
    _clock_gettime(_CLOCK_MONOTONIC, clock.ctypes.data)
    return clock[0] * 1_000_000_000 + clock[1]


def _await_turn_template(clock: Any, not_before_ns: Any, control: Any) -> Any:
    """Pause as the pace wants it; `ISSUED` when the next batch may be issued."""
    while True:
        now_ns = _now_ns(clock)
        if control[CONTROL_STOP] != 0:
            return STOPPED
        if now_ns > control[CONTROL_DEADLINE_NS]:
            return LATE
        if control[CONTROL_PACE] == 0 or now_ns >= not_before_ns:
            return ISSUED
        if _query(control[CONTROL_BUSY_EVENT]) != NOT_READY:
            return ISSUED
        _usleep(_PAUSE_US)


def _call_template(
    mode: Any,
    targets: Any,
    sources: Any,
    sizes: Any,
    attributes: Any,
    stream: Any,
    launch: Any,
    scratch: Any,
    first: Any,
    count: Any,
) -> Any:
    """Issue one batch; the driver's error code."""
    if mode == BY_BATCH:
        place = 8 * first
        return _memcpy_batch(
            targets.ctypes.data + place,
            sources.ctypes.data + place,
            sizes.ctypes.data + place,
            count,
            attributes,
            scratch.ctypes.data,
            1,
            scratch.ctypes.data + 8,
            stream,
        )
    if mode == BY_KERNEL:
        for i in range(3):
            scratch[2 + i] = launch[LAUNCH_TABLE] + 8 * (first + i * targets.shape[0])
        scratch[5] = count
        for i in range(4):
            scratch[6 + i] = scratch.ctypes.data + 8 * (2 + i)
        grid, block = launch[LAUNCH_GRID], launch[LAUNCH_BLOCK]
        values = scratch.ctypes.data + 8 * 6  # void *[4]
        return _launch_kernel(
            launch[LAUNCH_FUNCTION], grid, 1, 1, block, 1, 1, 0, stream, values, 0
        )
    for run in range(first, first + count):
        code = _memcpy(targets[run], sources[run], sizes[run], stream)
        if code != 0:
            return code
    return 0


def _issue_template(
    mode: Any,
    targets: Any,
    sources: Any,
    sizes: Any,
    batch_bytes: Any,
    batch_runs: Any,
    attributes: Any,
    stream: Any,
    ring: Any,
    launch: Any,
    scratch: Any,
    state: Any,
    control: Any,
) -> Any:
    """See `IssueLoop`."""
    clock = np.zeros(2, np.int64)
    n_events = ring.shape[0] - 1
    not_before_ns = np.int64(0)
    first, n_runs = 0, targets.shape[0]
    while first < n_runs:
        count, n_bytes = 1, sizes[first]
        while first + count < n_runs and count < batch_runs:
            if n_bytes + sizes[first + count] > batch_bytes:
                break
            n_bytes += sizes[first + count]
            count += 1
        event = ring[1 + ring[RING_NEXT] % n_events]
        code = 0
        if ring[RING_NEXT] >= n_events:
            code = _synchronize(event)
        outcome = _await_turn(clock, not_before_ns, control)
        if code == 0 and outcome != ISSUED:
            return outcome
        started_ns = _now_ns(clock)
        if control[CONTROL_PACE] > 0:
            not_before_ns = started_ns + n_bytes * 1_000_000_000 // control[CONTROL_PACE]
        if code == 0:
            code = _call(
                mode, targets, sources, sizes, attributes, stream, launch, scratch, first, count
            )
        if code == 0:
            code = _record(event, stream)
        if code != 0:
            state[STATE_ERROR] = code
            return FAILED
        first += count
        ring[RING_NEXT] += 1
        state[STATE_BYTES] += n_bytes
        state[STATE_ISSUE_NS] += _now_ns(clock) - started_ns
    return ISSUED


def _bind(
    functions: dict[str, Any], wrap: Callable[[Any], Any] = lambda function: function
) -> Callable[..., Any]:
    """Return `_issue_template` over these functions; ``wrap`` is applied to what it calls."""
    names = {**globals(), **functions}
    for name in ("_now_ns", "_await_turn", "_call"):
        template = globals()[f"{name}_template"]
        names[name] = wrap(FunctionType(template.__code__, names))
    return FunctionType(_issue_template.__code__, names)


_NAMES = {
    "_memcpy_batch": "cuMemcpyBatchAsync",
    "_memcpy": "cuMemcpyAsync",
    "_launch_kernel": "cuLaunchKernel",
    "_record": "cuEventRecord",
    "_query": "cuEventQuery",
    "_synchronize": "cuEventSynchronize",
}
_WORDS = {"cuMemcpyBatchAsync": 9, "cuMemcpyAsync": 4, "cuEventRecord": 2}
_WORDS |= {"cuEventQuery": 1, "cuEventSynchronize": 1}
"""Arguments of each function but ``cuLaunchKernel``, all as wide as a pointer."""
_LAUNCH_INTS = 7


def python_loop(driver: Driver) -> IssueLoop:
    """Return the loop as plain Python over ctypes."""
    libc = ctypes.CDLL(None)
    functions: dict[str, Any] = {"_usleep": libc.usleep}
    gettime = libc.clock_gettime
    gettime.argtypes = (ctypes.c_int, ctypes.c_void_p)
    functions["_clock_gettime"] = gettime
    word, number = ctypes.c_ssize_t, ctypes.c_uint
    for name, symbol in _NAMES.items():
        if symbol == "cuLaunchKernel":
            arguments = (word, *[number] * _LAUNCH_INTS, word, word, word)
        else:
            arguments = (word,) * _WORDS[symbol]
        call = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(driver.addresses[symbol])
        # ctypes takes int, not numpy's integers.
        functions[name] = lambda *values, call=call: call(*map(int, values))
    return _bind(functions)


def compiled_loop(driver: Driver) -> IssueLoop:
    """Compile the loop, or take it from numba's cache on disk.

    Raises:
        ImportError: numba is not installed.
    """
    binding = importlib.import_module("llvmlite.binding")
    importlib.import_module("numba")
    for symbol in _NAMES.values():
        # Under a name of its own: the code is cached, the addresses differ from process to process.
        binding.add_symbol(f"kvtier_{symbol}", driver.addresses[symbol])
    return _compile()


@functools.cache
def _compile() -> IssueLoop:
    numba = importlib.import_module("numba")
    types = importlib.import_module("numba.core.types")
    word, number = types.intp, types.uint32
    functions: dict[str, Any] = {
        "_clock_gettime": types.ExternalFunction("clock_gettime", types.int32(types.int32, word)),
        "_usleep": types.ExternalFunction("usleep", types.int32(number)),
    }
    for name, symbol in _NAMES.items():
        if symbol == "cuLaunchKernel":
            signature = types.int32(word, *[number] * _LAUNCH_INTS, word, word, word)
        else:
            signature = types.int32(*[word] * _WORDS[symbol])
        functions[name] = types.ExternalFunction(f"kvtier_{symbol}", signature)
    loop = _bind(functions, numba.njit(nogil=True))
    return cast("IssueLoop", compiled(loop, _SIGNATURE))


def load_loop(driver: Driver) -> IssueLoop:
    """Return the compiled loop, else the Python one with a warning."""
    try:
        return compiled_loop(driver)
    except ImportError as error:
        logger.warning("numba is missing (%s): copies will contend with the engine", error)
        return python_loop(driver)
