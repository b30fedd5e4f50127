"""Checksums of the CPU tier's chunks, kept behind each chunk in its slot: XXH64 in one call without the lock.

The sum of a chunk is that of its pieces' XXH64 values, one piece for each plane and block, with the piece's
position as seed. So it is the same over a slot and over the blocks that the slot was copied from or to,
wherever these lie, and a copy can be checked from end to end where both ends are host memory.

What stands behind a chunk (`orders.TRAILER_BYTES`): a mark, the chunk's key, the sum. The key tells a chunk that is
whole from the right one. A mark of neither kind means that the slot was not written as a whole.

All that is compiled stands in this one file: numba's cache on disk notices no other.
"""

from __future__ import annotations

import functools
import importlib
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import numpy as np

from kvtier.copies.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

WHOLE: Final = -1
"""What `Checksums.verify` returns where all chunks are as they were stored."""

_SUMMED = np.uint64(0x6B7674_53554D31)
_UNSUMMED = np.uint64(0x6B7674_4E4F5331)
_NONE = np.uint64(0)
_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)
_BITS = np.uint64(64)
_R1, _R7, _R11, _R12, _R18 = (np.uint64(n) for n in (1, 7, 11, 12, 18))
_R23, _R27, _R29, _R31, _R32, _R33 = (np.uint64(n) for n in (23, 27, 29, 31, 32, 33))

_SUM_SIGNATURE = "uint64(int64, int64, uint64)"
_CHUNKS_SIGNATURE = (
    "int64(int64, int64[::1], int64[:,::1], int64[:,::1], int64, uint64[:,::1], uint64)"
)


class ChunkLoop(Protocol):
    """Goes through an order's chunks.

    Args:
        region_address: Address of the slots' region.
        slots: int64 [chunks], offsets in the region.
        blocks: int64 [chunks, blocks a chunk], ids in the KV cache; -1: read that piece in the slot.
        planes: See `KVLayout.plane_table`.
        trailer_offset: KV bytes of a slot.
        keys: uint64 [chunks, 2], the chunks' keys.
        share: One chunk in so many is summed, chosen by its key; 1: all.
    """

    def __call__(  # noqa: D102 - see the class
        self,
        region_address: int,
        slots: NDArray[np.int64],
        blocks: NDArray[np.int64],
        planes: NDArray[np.int64],
        trailer_offset: int,
        keys: NDArray[np.uint64],
        share: np.uint64,
        /,
    ) -> int: ...


class Checksums:
    """The compiled loops.

    Attributes:
        xxh64: ``(address, bytes, seed)``.
        seal: Writes the trailers of chunks that were stored.
        verify: Index of the first chunk that is not as it was stored, or `WHOLE`.
    """

    def __init__(self, xxh64: Any, seal: ChunkLoop, verify: ChunkLoop) -> None:
        self.xxh64 = xxh64
        self.seal = seal
        self.verify = verify


def _load64(address: Any) -> Any:
    raise NotImplementedError


def _load32(address: Any) -> Any:
    raise NotImplementedError


def _load8(address: Any) -> Any:
    raise NotImplementedError


def _store64(address: Any, value: Any) -> Any:
    raise NotImplementedError


def _rotated(value: Any, bits: Any) -> Any:
    return (value << bits) | (value >> (_BITS - bits))


def _mixed(lane: Any, word: Any) -> Any:
    return _rotated(lane + word * _P2, _R31) * _P1


def _merged(total: Any, lane: Any) -> Any:
    return (total ^ _mixed(_NONE, lane)) * _P1 + _P4


def _xxh64(address: Any, n_bytes: Any, seed: Any) -> Any:
    """XXH64 as its specification has it (github.com/Cyan4973/xxHash)."""
    at, end = address, address + n_bytes
    if n_bytes >= 32:  # noqa: PLR2004 - a stripe of the specification
        a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
        while at + 32 <= end:
            a, b = _mixed(a, _load64(at)), _mixed(b, _load64(at + 8))
            c, d = _mixed(c, _load64(at + 16)), _mixed(d, _load64(at + 24))
            at += 32
        total = _rotated(a, _R1) + _rotated(b, _R7) + _rotated(c, _R12) + _rotated(d, _R18)
        total = _merged(_merged(_merged(_merged(total, a), b), c), d)
    else:
        total = seed + _P5
    total += np.uint64(n_bytes)
    while at + 8 <= end:
        total = _rotated(total ^ _mixed(_NONE, _load64(at)), _R27) * _P1 + _P4
        at += 8
    if at + 4 <= end:
        total = _rotated(total ^ (_load32(at) * _P1), _R23) * _P2 + _P3
        at += 4
    while at < end:
        total = _rotated(total ^ (_load8(at) * _P5), _R11) * _P1
        at += 1
    total = (total ^ (total >> _R33)) * _P2
    total = (total ^ (total >> _R29)) * _P3
    return total ^ (total >> _R32)


def _chunk_sum(slot: Any, blocks: Any, planes: Any) -> Any:
    total = np.uint64(0)
    for plane in range(planes.shape[0]):
        size = planes[plane, 2]
        for i in range(blocks.shape[0]):
            address = slot + planes[plane, 3] + i * size
            if blocks[i] >= 0:
                address = planes[plane, 0] + blocks[i] * planes[plane, 1]
            total += _xxh64(address, size, np.uint64(plane * blocks.shape[0] + i))
    return total


def _seal(
    region_address: Any,
    slots: Any,
    blocks: Any,
    planes: Any,
    trailer_offset: Any,
    keys: Any,
    share: Any,
) -> Any:
    """See `Checksums.seal`."""
    for i in range(slots.shape[0]):
        slot = region_address + slots[i]
        trailer = slot + trailer_offset
        mark, total = _UNSUMMED, np.uint64(0)
        if keys[i, 0] % share == _NONE:
            mark, total = _SUMMED, _chunk_sum(slot, blocks[i], planes)
        _store64(trailer + 8, keys[i, 0])
        _store64(trailer + 16, keys[i, 1])
        _store64(trailer + 24, total)
        _store64(trailer, mark)
    return WHOLE


def _verify(
    region_address: Any,
    slots: Any,
    blocks: Any,
    planes: Any,
    trailer_offset: Any,
    keys: Any,
    share: Any,
) -> Any:
    """See `Checksums.verify`."""
    for i in range(slots.shape[0]):
        slot = region_address + slots[i]
        trailer = slot + trailer_offset
        mark = _load64(trailer)
        if mark != _SUMMED and mark != _UNSUMMED:  # noqa: PLR1714 - numba knows no such tuples
            return i
        if _load64(trailer + 8) != keys[i, 0] or _load64(trailer + 16) != keys[i, 1]:
            return i
        is_checked = mark == _SUMMED and keys[i, 0] % share == _NONE
        if is_checked and _load64(trailer + 24) != _chunk_sum(slot, blocks[i], planes):
            return i
    return WHOLE


def _memory_functions() -> dict[str, Any]:
    """Return loads and stores at addresses, to be called in numba functions."""
    extending: Any = importlib.import_module("numba.extending")
    types = importlib.import_module("numba.core.types")
    ir = importlib.import_module("llvmlite.ir")
    word = ir.IntType(64)

    def load_of(bits: int) -> Any:
        def emit(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            value = builder.load(pointer)
            value.align = 1
            return builder.zext(value, word) if bits < word.width else value

        def load(_: Any, _address: Any) -> Any:
            """Read an unsigned integer."""
            return types.uint64(types.intp), emit

        return extending.intrinsic(load)

    def emit_store(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        address, value = arguments
        store = builder.store(value, builder.inttoptr(address, word.as_pointer()))
        store.align = 1

    def store64(_: Any, _address: Any, _value: Any) -> Any:
        """Write 64 bits."""
        return types.void(types.intp, types.uint64), emit_store

    return {
        "_load64": load_of(64),
        "_load32": load_of(32),
        "_load8": load_of(8),
        "_store64": extending.intrinsic(store64),
    }


@functools.cache
def load_checksums() -> Checksums:
    """Compile the loops, or take them from numba's cache on disk.

    Raises:
        RuntimeError: numba is not installed: a loop in Python would hold the engine up.
    """
    try:
        numba: Any = importlib.import_module("numba")
        names = {**globals(), **_memory_functions()}
    except ImportError as error:
        raise RuntimeError(f"checksums of KV need numba: {error}") from error

    def bound(function: Any) -> Any:
        # Bound as globals and not as a closure, which would defeat numba's cache on disk.
        return FunctionType(function.__code__, names)

    for name in ("_rotated", "_mixed", "_merged", "_xxh64", "_chunk_sum"):
        names[name] = numba.njit(nogil=True)(bound(names[name]))
    return Checksums(
        compiled(bound(_xxh64), _SUM_SIGNATURE),
        cast("ChunkLoop", compiled(bound(_seal), _CHUNKS_SIGNATURE)),
        cast("ChunkLoop", compiled(bound(_verify), _CHUNKS_SIGNATURE)),
    )
