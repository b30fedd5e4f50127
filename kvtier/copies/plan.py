"""Copy orders and their translation into runs of contiguous bytes.

The scheduler's half names block ids and slots; `plan_order` checks every bound before a byte
moves and merges what is contiguous on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from kvtier.copies.merge import BAD_BLOCK, BAD_SLOT, OK, OVERLAP, merge_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvtier.copies.kv_layout import KVLayout

Direction = Literal["store", "load"]
"""``store``: KV blocks -> slots. ``load``: slots -> KV blocks."""


PIN_PIECE_BYTES = 64 << 30
"""The slots' region is page-locked in pieces of at most so many bytes: drivers refuse or stall on
more in one ``cudaHostRegister``."""


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
    keys: bytes = b""
    """Key of each slot's chunk, one after the other; needed only where chunks are checked."""


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
    """Empty, or a reason in words."""
    missing_blocks: frozenset[int] | None = None
    """Blocks that a failed load has not written in time; None: possibly all of them."""
    issue_s: float = 0.0
    """Processor time of putting the copy on a stream; 0 where a thread copies."""
    spoilt_key: bytes = b""
    """Of the first chunk that a load has brought otherwise than it was stored; empty where there is none."""


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

    def blocks_from(self, first_run: int) -> frozenset[int]:
        """Ids of the KV cache's blocks in this run and those after it."""
        left = self.runs[first_run:]
        return frozenset(b for first, _, _, n in left.tolist() for b in range(first, first + n))

    @property
    def run_bytes(self) -> float:
        """Mean bytes per contiguous run; 0 for an empty plan."""
        return self.n_bytes / self.n_runs if self.n_runs else 0.0


def plan_order(layout: KVLayout, order: CopyOrder, region_bytes: int) -> RunPlan:
    """Check ``order`` against the KV cache and the region, and merge it into runs.

    This runs on the thread of vLLM's steps: a few microseconds, and some nanoseconds a block. Planes
    are expanded where the bytes are copied.

    Raises:
        CopyOrderError: any block id or slot out of range, or counts that do not fit together.
    """
    if order.direction not in ("store", "load"):
        msg = f"unknown direction {order.direction!r}"
        raise CopyOrderError(msg)
    ids = np.ascontiguousarray(order.block_ids, dtype=np.int64)
    slots = np.ascontiguousarray(order.slots, dtype=np.int64)
    _check_shape(order, ids, slots)
    slot_bytes, block_bytes = layout.slot_bytes(order.chunk_blocks), layout.block_bytes_total
    code, bad, n_blocks, runs = merge_blocks(
        ids,
        slots,
        chunk_blocks=order.chunk_blocks,
        skip_blocks=order.skip_blocks,
        num_blocks=layout.num_blocks,
        region_bytes=region_bytes,
        slot_bytes=slot_bytes,
        joined_block_bytes=block_bytes if len(layout.planes) == 1 else 0,
        slots_are_written=order.direction == "store",
    )
    if code != OK:
        msg = {
            BAD_BLOCK: f"block id {bad} is outside the KV cache of {layout.num_blocks} blocks",
            BAD_SLOT: f"slot at {bad} (+{slot_bytes} bytes) is outside the region of "
            f"{region_bytes} bytes",
            OVERLAP: f"slots overlap at {bad}: a slot has {slot_bytes} bytes",
        }[code]
        raise CopyOrderError(msg)
    return RunPlan(
        runs=runs,
        planes=layout.plane_table(order.chunk_blocks),
        n_blocks=n_blocks,
        n_bytes=n_blocks * block_bytes,
        n_runs=len(runs) * layout.n_dense + n_blocks * (len(layout.planes) - layout.n_dense),
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
