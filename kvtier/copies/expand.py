"""The runs of a plan as arrays of addresses, what a driver call takes, made without the interpreter lock.

A context of 100,000 tokens has some hundred thousand of them where its blocks are scattered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvtier.copies.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtier.copies.plan import RunPlan

_SIGNATURE = "int64(int64[:,::1], int64[:,::1], int64, int64, int64, int64[:,::1])"


def expand_runs(
    plan: RunPlan, region_address: int, *, most_bytes: int, edge_bytes: int
) -> NDArray[np.int64]:
    """The contiguous runs over all planes, int64 [3, n]: KV addresses, slot addresses, bytes.

    Ordered by run, then plane, then block.

    Args:
        plan: what is copied.
        region_address: address of the slots' region.
        most_bytes: longer runs are cut.
        edge_bytes: runs are also cut where the region's offset is a multiple of it: memory that was
            page-locked in pieces is not copied across the edge of two.
    """
    expand = load_expand()
    nothing = np.zeros((3, 0), np.int64)
    fixed = (plan.runs, plan.planes, region_address, most_bytes, edge_bytes)
    addresses = np.empty((3, expand(*fixed, nothing)), np.int64)
    if addresses.size:
        expand(*fixed, addresses)
    return addresses


def _expand(
    runs: Any, planes: Any, region_address: Any, most_bytes: Any, edge_bytes: Any, out: Any
) -> Any:
    """Count, and fill ``out`` if it has room."""
    fills = out.shape[1] > 0
    n = 0
    for run in range(runs.shape[0]):
        for plane in range(planes.shape[0]):
            stride, size = planes[plane, 1], planes[plane, 2]
            kv = planes[plane, 0] + runs[run, 0] * stride
            slot = runs[run, 1] + planes[plane, 3] + runs[run, 2] * size
            total = runs[run, 3] * size
            contiguous = total if stride == size else size
            at = 0
            while at < total:
                block, within = at // contiguous, at % contiguous
                here = slot + at
                length = min(contiguous - within, most_bytes, edge_bytes - here % edge_bytes)
                if fills:
                    out[0, n] = kv + block * stride + within
                    out[1, n] = region_address + here
                    out[2, n] = length
                n += 1
                at += length
    return n


def load_expand() -> Any:
    """Compile; a second or two at first."""
    return compiled(_expand, _SIGNATURE)
