"""Copy orders and their translation into runs of contiguous bytes.

The scheduler's half names block ids and slots; `plan_order` checks every bound before a byte
moves and merges what is contiguous on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvtier.copies.kv_layout import KVLayout

Direction = Literal["store", "load"]
"""``store``: KV blocks -> slots. ``load``: slots -> KV blocks."""


PIN_PIECE_BYTES = 64 << 30
"""The slots' region is page-locked in pieces of at most so many bytes: drivers refuse or stall on
more in one ``cudaHostRegister``."""

NO_SLOT = -1
"""In place of a slot: this chunk is not to be copied."""


class CopyOrderError(ValueError):
    """An order that must not be executed; nothing was written."""


@dataclass(frozen=True, eq=False)
class CopyOrder:
    """Blocks and slots of one transfer; picklable, travels in the connector's metadata.

    Block ``i`` of ``block_ids`` belongs at position ``i % chunk_blocks`` of slot
    ``slots[i // chunk_blocks]``; chunks whose slot is `NO_SLOT` are left out. A store fills its
    slots completely; a load may skip ``skip_blocks`` leading blocks, whose ids are then ignored,
    and may end within its last chunk.
    """

    order_id: int | str
    direction: Direction
    request_id: str
    block_ids: NDArray[np.int64] | Sequence[int]
    slots: Sequence[int]
    """Byte offset of each chunk's slot in the shared region, or `NO_SLOT`."""
    chunk_blocks: int
    skip_blocks: int = 0
    deadline_s: float | None = None
    """End of the slots' lease on the engine's clock (``time.monotonic`` unless injected). A copy
    that starts or ends later fails: its slots may belong to someone else."""
    generation: int | str = 0
    """Generation of the shared region that the slots refer to."""


@dataclass(frozen=True)
class CopyResult:
    """What became of an order."""

    order_id: int | str
    request_id: str
    direction: Direction
    n_bytes: int
    """Bytes copied; fewer than ordered, or 0, when not ``ok``."""
    seconds: float
    """Time in which bytes moved, without queueing and interruptions."""
    queued_s: float
    """From submission to the first byte."""
    run_bytes: float
    """Mean bytes per contiguous run of the order: the size that the link model goes by."""
    ok: bool
    error: str = ""
    """Empty, or a reason in words. A failed load may have written some of its blocks."""
    issue_s: float = 0.0
    """Processor time of putting the copy on a stream; 0 where a thread copies."""


@dataclass(frozen=True, eq=False)
class RunPlan:
    """Runs of consecutive blocks, the same for every plane.

    ``runs``: int64 [R, 4], C-contiguous, rows ``(first block id, slot offset in the region,
    position of the first block in the slot, blocks)``.
    """

    runs: NDArray[np.int64]
    planes: NDArray[np.int64]
    n_blocks: int
    n_bytes: int
    n_runs: int
    """Contiguous byte runs over all planes."""

    @property
    def run_bytes(self) -> float:
        """Mean bytes per contiguous run; 0 for an empty plan."""
        return self.n_bytes / self.n_runs if self.n_runs else 0.0


def plan_order(layout: KVLayout, order: CopyOrder, region_bytes: int) -> RunPlan:
    """Check ``order`` against the KV cache and the region, and merge it into runs.

    Vectorised over the blocks; planes are expanded where the bytes are copied.

    Raises:
        CopyOrderError: any block id or slot out of range, or counts that do not fit together.
    """
    if order.direction not in ("store", "load"):
        msg = f"unknown direction {order.direction!r}"
        raise CopyOrderError(msg)
    ids = np.asarray(order.block_ids, dtype=np.int64)
    slots = np.asarray(order.slots, dtype=np.int64)
    _check_shape(order, ids, slots)
    slot_bytes = layout.slot_bytes(order.chunk_blocks)
    _check_slots(order, slots[slots != NO_SLOT], slot_bytes, region_bytes)
    index = np.arange(order.skip_blocks, len(ids), dtype=np.int64)
    index = index[slots[index // order.chunk_blocks] != NO_SLOT]
    ids = ids[index]
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= layout.num_blocks):
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        msg = f"block id {bad} is outside the KV cache of {layout.num_blocks} blocks"
        raise CopyOrderError(msg)
    chunk, position = np.divmod(index, order.chunk_blocks)
    offset = slots[chunk]
    if len(offset) and np.any(np.diff(offset) < 0):
        by_slot = np.argsort(offset, kind="stable")
        ids, chunk, position, offset = (a[by_slot] for a in (ids, chunk, position, offset))
    joined = np.diff(ids) == 1
    if len(layout.planes) == 1:  # then the end of one slot can touch the start of the next
        joined &= np.diff(offset + position * layout.block_bytes_total) == layout.block_bytes_total
    else:
        joined &= np.diff(chunk) == 0
    starts = np.flatnonzero(np.concatenate(([True], ~joined))) if len(ids) else np.zeros(0, int)
    counts = np.diff(np.append(starts, len(ids)))
    runs = np.stack((ids[starts], offset[starts], position[starts], counts), axis=1)
    n_dense = sum(plane.is_dense for plane in layout.planes)
    return RunPlan(
        runs=np.ascontiguousarray(runs, dtype=np.int64),
        planes=layout.plane_table(order.chunk_blocks),
        n_blocks=len(ids),
        n_bytes=len(ids) * layout.block_bytes_total,
        n_runs=len(runs) * n_dense + len(ids) * (len(layout.planes) - n_dense),
    )


def _check_shape(order: CopyOrder, ids: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
    if ids.ndim != 1 or slots.ndim != 1 or order.chunk_blocks < 1:
        msg = "block_ids and slots must be flat, chunk_blocks positive"
        raise CopyOrderError(msg)
    full = len(slots) * order.chunk_blocks
    short = full - len(ids)
    if short < 0 or short >= order.chunk_blocks or (short and order.direction == "store"):
        msg = (
            f"{len(ids)} blocks do not fit {len(slots)} slots of {order.chunk_blocks} blocks "
            f"(direction {order.direction})"
        )
        raise CopyOrderError(msg)
    allowed = len(ids) if order.direction == "load" else 0
    if not 0 <= order.skip_blocks <= allowed:
        msg = f"skip_blocks {order.skip_blocks} is not within 0..{allowed}"
        raise CopyOrderError(msg)


def _check_slots(
    order: CopyOrder, slots: NDArray[np.int64], slot_bytes: int, region_bytes: int
) -> None:
    if not len(slots):
        return
    low, high = int(slots.min()), int(slots.max())
    if low < 0 or high > region_bytes - slot_bytes:
        bad = low if low < 0 else high
        msg = f"slot at {bad} (+{slot_bytes} bytes) is outside the region of {region_bytes} bytes"
        raise CopyOrderError(msg)
    if order.direction == "store" and np.any(np.diff(np.sort(slots)) < slot_bytes):
        msg = f"slots overlap: a slot has {slot_bytes} bytes"
        raise CopyOrderError(msg)
