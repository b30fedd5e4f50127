"""The fewest runs of consecutive blocks that cover an order, and whether all of it is in bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvtier.copies.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_SLOT: Final = -1
"""In place of a slot: this chunk is not to be copied."""

OK, BAD_BLOCK, BAD_SLOT, OVERLAP = range(4)
"""What `merge_blocks` finds."""
_SIGNATURE: Final = (
    "int64(int64[::1], int64[::1], int64[::1], int64, int64, int64, int64, int64, int64, int64, "
    "int64[:,::1], int64[::1])"
)
_RUNS, _BLOCKS, _BAD, _FIELDS = range(4)


def load_merge() -> Any:
    """Compile; a second or two at first."""
    return compiled(_merge, _SIGNATURE)


def merge_blocks(
    block_ids: NDArray[np.int64],
    slots: NDArray[np.int64],
    *,
    chunk_blocks: int,
    skip_blocks: int,
    num_blocks: int,
    region_bytes: int,
    slot_bytes: int,
    joined_block_bytes: int,
    slots_are_written: bool,
) -> tuple[int, int, int, NDArray[np.int64]]:
    """Merge blocks that are neighbours on both sides, in the order of their slots.

    Args:
        block_ids: see `CopyOrder`.
        slots: see there.
        chunk_blocks: see there.
        skip_blocks: see there.
        num_blocks: of the KV cache.
        region_bytes: of the slots' region.
        slot_bytes: of one slot.
        joined_block_bytes: bytes of a block where it is one piece, so that the end of one slot can
            touch the start of the next; else 0.
        slots_are_written: slots must then not overlap.

    Returns:
        `OK` or what is wrong; the block id or slot that is; the number of blocks; and the runs, int64
        [R, 4], rows ``(first block id, slot, position of the first block in the slot, blocks)``.
    """
    runs = np.empty((max(1, len(block_ids)), 4), np.int64)
    found = np.zeros(_FIELDS, np.int64)
    code = load_merge()(
        block_ids,
        slots,
        np.argsort(slots, kind="stable"),
        chunk_blocks,
        skip_blocks,
        num_blocks,
        region_bytes,
        slot_bytes,
        joined_block_bytes,
        int(slots_are_written),
        runs,
        found,
    )
    n_runs, n_blocks, bad = found.tolist()
    return code, bad, n_blocks, runs[:n_runs].copy()


def _merge(
    ids: Any,
    slots: Any,
    by_slot: Any,
    chunk_blocks: Any,
    skip_blocks: Any,
    num_blocks: Any,
    region_bytes: Any,
    slot_bytes: Any,
    joined_block_bytes: Any,
    slots_are_written: Any,
    runs: Any,
    found: Any,
) -> Any:
    """See `merge_blocks`."""
    n_runs, n_blocks = 0, 0
    last_id, last_chunk, last_end, last_slot = -2, -1, -1, NO_SLOT
    for k in range(by_slot.shape[0]):
        chunk = by_slot[k]
        slot = slots[chunk]
        if slot == NO_SLOT:
            continue
        if slot < 0 or slot > region_bytes - slot_bytes:
            found[_BAD] = slot
            return BAD_SLOT
        if slots_are_written != 0 and last_slot != NO_SLOT and slot - last_slot < slot_bytes:
            found[_BAD] = slot
            return OVERLAP
        last_slot = slot
        first = chunk * chunk_blocks
        for i in range(max(first, skip_blocks), min(first + chunk_blocks, ids.shape[0])):
            block = ids[i]
            if block < 0 or block >= num_blocks:
                found[_BAD] = block
                return BAD_BLOCK
            start = slot + (i - first) * joined_block_bytes
            touches = chunk == last_chunk or (joined_block_bytes > 0 and start == last_end)
            if block == last_id + 1 and touches:
                runs[n_runs - 1, 3] += 1
            else:
                runs[n_runs, 0] = block
                runs[n_runs, 1] = slot
                runs[n_runs, 2] = i - first
                runs[n_runs, 3] = 1
                n_runs += 1
            n_blocks += 1
            last_id, last_chunk, last_end = block, chunk, start + joined_block_bytes
    found[_RUNS], found[_BLOCKS] = n_runs, n_blocks
    return OK
