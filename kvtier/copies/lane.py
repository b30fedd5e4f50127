"""One direction of the CUDA copy engine: its stream, what waits for it and what is on it."""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from kvtier.copies import issue

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtier.copies.plan import Direction
    from kvtier.copy_engine import CopyJob

_ORDER_STREAM: Final = 1
_ORDER_ANY: Final = 3
"""CU_MEMCPY_SRC_ACCESS_ORDER: the source is read in stream order; or at any time."""


class CopyAttributes(ctypes.Structure):
    """``CUmemcpyAttributes``; the hints are for managed memory and stay empty."""

    _fields_ = (
        ("src_access_order", ctypes.c_uint),
        ("src_location", ctypes.c_int * 2),
        ("dst_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


@dataclass(eq=False)
class Issued:
    """A job whose bytes are on their stream, as far as it was not stopped.

    Attributes:
        keep_alive: lives until the stream is past ``end``.
    """

    job: CopyJob
    start: torch.cuda.Event
    end: torch.cuda.Event
    n_bytes: int
    issue_s: float
    error: str
    keep_alive: list[torch.Tensor]


@dataclass(eq=False)
class Lane:
    """A stream and its orders. ``queue``, ``active`` and ``issued`` are guarded by the engine.

    Attributes:
        ring: see `issue.IssueLoop`; the handles are those of ``ring_events``.
        best_bytes_per_s: the fastest large copy so far; 0 before the first.
        wakes: wakes the lane's thread, see `CpuCopyEngine`.
    """

    direction: Direction
    stream: torch.cuda.Stream
    ring: NDArray[np.int64]
    ring_events: list[torch.cuda.Event]
    attributes: CopyAttributes
    queue: deque[tuple[CopyJob, torch.cuda.Event]] = field(default_factory=deque)
    wakes: SimpleQueue[None] = field(default_factory=SimpleQueue)
    active: CopyJob | None = None
    issued: deque[Issued] = field(default_factory=deque)
    backlog_bytes: int = 0
    best_bytes_per_s: float = 0.0
    control: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(issue.CONTROL_FIELDS, np.int64)
    )
    scratch: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(issue.SCRATCH_FIELDS, np.int64)
    )

    @classmethod
    def create(cls, direction: Direction, device: torch.device, max_batches: int) -> Lane:
        """A lane on a stream of the least urgent priority, with so many batches in flight."""
        # Kernels of the model's streams are scheduled first.
        least, _ = torch.cuda.Stream.priority_range()
        stream = torch.cuda.Stream(device, priority=least)
        events = [torch.cuda.Event(blocking=True) for _ in range(max_batches)]
        for event in events:
            event.record(stream)  # creates it
        ring = np.array([0, *(int(event.cuda_event) for event in events)], np.int64)
        # A load's slots are written by nobody; a store's blocks may still be, before its turn.
        order = _ORDER_ANY if direction == "load" else _ORDER_STREAM
        return cls(direction, stream, ring, events, CopyAttributes(src_access_order=order))

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is on the stream."""
        return not (self.queue or self.active or self.issued)
