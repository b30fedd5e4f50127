"""The CPU copy loop: one call per order that holds no interpreter lock while it copies.

vLLM's main thread runs Python between operators, so a copy thread that returned to Python per
block or layer would wait for the interpreter lock each time. The loop below is compiled with
numba (``nogil``). Without numba the same function runs as Python, one ``memcpy`` through ctypes per
piece: correct, but it contends for the lock.

The compiled loop writes past the caches. KV that is copied is not read again soon by the core that
copies it; an ordinary store first reads the line that it will overwrite and then evicts others to
keep it: a third of the memory traffic, and the engine's working set. libc's ``memcpy`` avoids both
only in single calls of many megabytes.

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

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

STOPPED, DONE, LATE = range(3)
"""What a call of the loop returns."""

CONTROL_STOP, CONTROL_DEADLINE_NS, CONTROL_FIELDS = range(3)
NO_DEADLINE_NS = (1 << 63) - 1

STATE_RUN, STATE_PLANE, STATE_OFFSET, STATE_BYTES, STATE_NS, STATE_SAFE_RUN, STATE_FIELDS = range(7)
"""Where a copy stands, so that it can be stopped and resumed, and what it took so far. Runs before
``SAFE_RUN`` were copied before the deadline for certain."""

_VECTOR_BYTES = 64
"""A line of the cache; LLVM splits it where the processor's registers are narrower."""
_UNROLL = 4
_MIN_STREAM_BYTES = 1024
"""Below it, aligning costs more than the stores save."""

_CLOCK_MONOTONIC = 1
_SIGNATURE = "int64(int64[:,::1], int64[:,::1], int64, int64, int64, int64[::1], int64[::1])"


class CopyKernel(Protocol):
    """Copies the runs of a plan; returns ``DONE``, ``STOPPED`` or ``LATE``.

    Args:
        runs, planes: `RunPlan.runs` and `RunPlan.planes`.
        region_address: address of the slot region.
        load: 1 copies slots to KV blocks, 0 KV blocks to slots.
        piece_bytes: largest single ``memcpy``, and the most that is copied between two looks at
            the clock.
        state: int64 [STATE_FIELDS], zeros at first; updated as bytes and nanoseconds add up.
        control: int64 [CONTROL_FIELDS]. Another thread sets ``CONTROL_STOP`` to 1 to have the
            copy return at the next piece; past ``CONTROL_DEADLINE_NS`` (on CLOCK_MONOTONIC) it
            returns by itself.
    """

    def __call__(  # noqa: D102 - see the class
        self,
        runs: NDArray[np.int64],
        planes: NDArray[np.int64],
        region_address: int,
        load: int,
        piece_bytes: int,
        state: NDArray[np.int64],
        control: NDArray[np.int64],
        /,
    ) -> int: ...


def _memcpy(target: Any, source: Any, n_bytes: Any) -> Any:
    raise NotImplementedError


def _clock_gettime(clock_id: Any, timespec_address: Any) -> Any:
    raise NotImplementedError


def _fence() -> Any:
    raise NotImplementedError


def _copy_runs(
    runs: Any,
    planes: Any,
    region_address: Any,
    load: Any,
    piece_bytes: Any,
    state: Any,
    control: Any,
) -> Any:
    """See `CopyKernel`. A template: the functions above are bound by `_bind`."""
    clock = np.zeros(2, np.int64)  # a struct timespec
    _clock_gettime(_CLOCK_MONOTONIC, clock.ctypes.data)
    started_ns = clock[0] * 1_000_000_000 + clock[1]
    outcome = LATE if started_ns > control[CONTROL_DEADLINE_NS] else DONE
    unchecked = 0
    while outcome == DONE and state[STATE_RUN] < runs.shape[0]:
        run, plane = state[STATE_RUN], state[STATE_PLANE]
        stride, size = planes[plane, 1], planes[plane, 2]
        kv = planes[plane, 0] + runs[run, 0] * stride
        slot = region_address + runs[run, 1] + planes[plane, 3] + runs[run, 2] * size
        total = runs[run, 3] * size
        contiguous = total if stride == size else size
        at = state[STATE_OFFSET]
        while at < total:
            if unchecked >= piece_bytes:
                unchecked = 0
                _clock_gettime(_CLOCK_MONOTONIC, clock.ctypes.data)
                if clock[0] * 1_000_000_000 + clock[1] > control[CONTROL_DEADLINE_NS]:
                    outcome = LATE
                    break
                state[STATE_SAFE_RUN] = state[STATE_RUN]
            if control[CONTROL_STOP] != 0:
                outcome = STOPPED
                break
            block, within = at // contiguous, at % contiguous
            n = min(contiguous - within, piece_bytes)
            if load != 0:
                _memcpy(kv + block * stride + within, slot + at, n)
            else:
                _memcpy(slot + at, kv + block * stride + within, n)
            at += n
            unchecked += n
            state[STATE_BYTES] += n
        if outcome != DONE:
            state[STATE_OFFSET] = at
        else:
            state[STATE_OFFSET] = 0
            state[STATE_PLANE] = plane + 1
            if plane + 1 == planes.shape[0]:
                state[STATE_PLANE] = 0
                state[STATE_RUN] = run + 1
    _fence()
    _clock_gettime(_CLOCK_MONOTONIC, clock.ctypes.data)
    ended_ns = clock[0] * 1_000_000_000 + clock[1]
    if ended_ns <= control[CONTROL_DEADLINE_NS]:
        state[STATE_SAFE_RUN] = state[STATE_RUN]
    state[STATE_NS] += ended_ns - started_ns
    return outcome


def _bind(
    memcpy: Any, clock_gettime: Any, fence: Callable[[], Any] = lambda: None
) -> Callable[..., Any]:
    """Return the loop over other functions.

    Bound as globals and not as a closure, which would defeat numba's cache on disk.
    """
    names = {**globals(), "_memcpy": memcpy, "_clock_gettime": clock_gettime, "_fence": fence}
    return FunctionType(_copy_runs.__code__, names)


def _streaming_copy(memcpy: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return ``copy(target, source, n)`` and ``fence()``, to be called in a numba function.

    ``copy`` takes addresses and returns None. Its stores are weakly ordered: whoever tells
    another thread of the bytes calls ``fence`` before.

    Args:
        memcpy: numba's function for short copies and unaligned ends, same arguments.

    Raises:
        ImportError: numba is not installed.
    """
    numba: Any = importlib.import_module("numba")
    extending: Any = importlib.import_module("numba.extending")
    types = importlib.import_module("numba.core.types")
    ir = importlib.import_module("llvmlite.ir")
    word = ir.IntType(64)
    step = _VECTOR_BYTES * _UNROLL

    def emit_lines(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        target, source, n_bytes = arguments
        vector = ir.VectorType(word, _VECTOR_BYTES // 8).as_pointer()
        hint = builder.module.add_metadata([ir.IntType(32)(1)])
        before = builder.block
        loop, done = (builder.append_basic_block(name) for name in ("lines", "lines.done"))
        builder.cbranch(builder.icmp_signed(">", n_bytes, word(0)), loop, done)
        builder.position_at_end(loop)
        at = builder.phi(word)
        offsets = [builder.add(at, word(i * _VECTOR_BYTES)) for i in range(_UNROLL)]
        values = []
        for offset in offsets:
            values.append(builder.load(builder.inttoptr(builder.add(source, offset), vector)))
            values[-1].align = 1
        for offset, value in zip(offsets, values, strict=True):
            store = builder.store(value, builder.inttoptr(builder.add(target, offset), vector))
            store.align = _VECTOR_BYTES
            store.set_metadata("nontemporal", hint)
        after = builder.add(at, word(step))
        at.add_incoming(word(0), before)
        at.add_incoming(after, loop)
        builder.cbranch(builder.icmp_signed("<", after, n_bytes), loop, done)
        builder.position_at_end(done)
        return None

    def emit_fence(_: Any, builder: Any, __: Any, ___: Any) -> Any:
        builder.fence("seq_cst")

    def lines_type(_: Any, _target: Any, _source: Any, _n_bytes: Any) -> Any:
        """Copy whole steps; the target is aligned to a line."""
        return types.void(types.intp, types.intp, types.intp), emit_lines

    def fence_type(_: Any) -> Any:
        """Order all stores before it, streamed ones too, before those after it."""
        return types.void(), emit_fence

    copy_lines, fence = extending.intrinsic(lines_type), extending.intrinsic(fence_type)

    def copy(target: Any, source: Any, n_bytes: Any) -> None:
        if n_bytes < _MIN_STREAM_BYTES:
            memcpy(target, source, n_bytes)
            return
        head = -target % _VECTOR_BYTES
        if head:
            memcpy(target, source, head)
        body = (n_bytes - head) // step * step
        copy_lines(target + head, source + head, body)
        tail = n_bytes - head - body
        if tail:
            memcpy(target + head + body, source + head + body, tail)

    return numba.njit(nogil=True)(copy), fence


@functools.cache
def python_kernel() -> CopyKernel:
    """Return the loop as plain Python over ctypes' ``memcpy``."""
    libc = ctypes.CDLL(None)
    memcpy, clock_gettime = libc.memcpy, libc.clock_gettime
    memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    memcpy.restype = ctypes.c_void_p
    clock_gettime.argtypes = (ctypes.c_int, ctypes.c_void_p)
    clock_gettime.restype = ctypes.c_int
    # ctypes takes int, not numpy's integers.
    return _bind(lambda target, source, n: memcpy(int(target), int(source), int(n)), clock_gettime)


@functools.cache
def compiled_kernel() -> CopyKernel:
    """Compile the loop, or take it from numba's cache on disk (1 to 2 s with the import).

    Raises:
        ImportError: numba is not installed.
    """
    types = importlib.import_module("numba.core.types")
    # Addresses are passed as integers: the same registers on every 64-bit ABI.
    memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.intp))
    clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
    copy, fence = _streaming_copy(memcpy)
    loop = _bind(copy, clock_gettime, fence)
    return cast("CopyKernel", compiled(loop, _SIGNATURE))


def load_kernel() -> CopyKernel:
    """Return the compiled loop, else the Python one with a warning."""
    try:
        return compiled_kernel()
    except ImportError as error:
        logger.warning("numba is missing (%s): copies will contend with the engine", error)
        return python_kernel()
