"""`CopyEngine` for CUDA: copies in stream order, without a thread.

Written against torch's documented stream and event API and tested on CPU with stand-ins for both;
**it has not run on a GPU yet**. Each plane costs two kernel launches per batch of chunks; an
engine that issues one batched driver call per order can replace it behind the same interface.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtier.copies.plan import CopyOrder, CopyOrderError, CopyResult, Direction, plan_order
from kvtier.copy_engine import BACKLOG_FULL, CANCELLED, CLOSED, LEASE_ENDED, CopyJob, rejected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvtier.copies.kv_layout import KVLayout

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_DRAIN_POLL_S = 0.0005
_DRAIN_SPIN_S = 0.005


def word_views(layout: KVLayout) -> list[torch.Tensor]:
    """Return the planes ``[num_blocks, words]`` in the widest integer that all are aligned to.

    Indexing kernels work per element: 8 bytes at a time instead of one.
    """
    for dtype in _WORDS:
        aligned = all(
            value % dtype.itemsize == 0
            for plane in layout.planes
            for value in (plane.base_address, plane.block_stride_bytes, plane.block_bytes)
        )
        if aligned:
            return [view.view(dtype) for view in layout.views]
    raise AssertionError  # uint8 is always aligned


def gather_chunks(
    planes: list[torch.Tensor], block_ids: torch.Tensor, chunk_blocks: int, staging: torch.Tensor
) -> None:
    """Copy blocks into slots lying side by side.

    Args:
        planes: see `word_views`.
        block_ids: int64 [n_chunks * chunk_blocks], on the planes' device.
        chunk_blocks: blocks per chunk.
        staging: [n_chunks, slot words], of the planes' dtype and device.
    """
    offset = 0
    for plane in planes:
        words = chunk_blocks * plane.shape[1]
        rows = torch.index_select(plane, 0, block_ids)
        staging[:, offset : offset + words].copy_(rows.view(len(staging), words))
        offset += words


def scatter_chunks(
    planes: list[torch.Tensor],
    block_ids: torch.Tensor,
    positions: torch.Tensor,
    chunk_blocks: int,
    staging: torch.Tensor,
) -> None:
    """Copy chosen blocks of slots lying side by side into the KV cache.

    Args:
        planes: see `word_views`.
        block_ids: int64 [n], the targets.
        positions: int64 [n]; block ``positions[i]``, counted over all slots, goes to
            ``block_ids[i]``.
        chunk_blocks: blocks per chunk.
        staging: [n_chunks, slot words].
    """
    offset = 0
    for plane in planes:
        words = chunk_blocks * plane.shape[1]
        rows = staging[:, offset : offset + words].reshape(-1, plane.shape[1])
        plane.index_copy_(0, block_ids, torch.index_select(rows, 0, positions))
        offset += words


@dataclass(eq=False)
class _Issued:
    """A job on its stream; the tensors live until the stream is past them."""

    job: CopyJob
    start: torch.cuda.Event
    end: torch.cuda.Event
    keep_alive: list[torch.Tensor]


class CudaCopyEngine:
    """`kvtier.copy_engine.CopyEngine` on two low-priority CUDA streams.

    Orders are issued by `submit` and `poll` as long as fewer than ``max_issued_bytes`` are on
    their stream; `cancel` reaches only those not issued yet.
    """

    def __init__(
        self,
        layout: KVLayout,
        region: torch.Tensor,
        *,
        clock: Callable[[], float] = time.monotonic,
        staging_bytes: int = 64 << 20,
        max_issued_bytes: int = 1 << 30,
        max_store_backlog_bytes: int | None = None,
    ) -> None:
        """Create streams.

        Args:
            layout: planes on a CUDA device.
            region: the slots, uint8 [region bytes] in host memory; asynchronous only if pinned.
            clock: seconds; deadlines of orders are on this clock.
            staging_bytes: device memory per direction, rounded to whole slots (at least one).
            max_issued_bytes: per direction; one order may exceed it.
            max_store_backlog_bytes: stores beyond it fail at once. Default: the region's size.
        """
        self._layout = layout
        self._planes = word_views(layout)
        self._region = region
        self._clock = clock
        self._staging_bytes = staging_bytes
        self._max_issued_bytes = max_issued_bytes
        self._max_store_backlog_bytes = (
            region.numel() if max_store_backlog_bytes is None else max_store_backlog_bytes
        )
        # The least urgent priority; kernels of the model's streams are scheduled first.
        least, _ = torch.cuda.Stream.priority_range()
        self._streams: dict[Direction, torch.cuda.Stream] = {
            "load": torch.cuda.Stream(layout.device, priority=least),
            "store": torch.cuda.Stream(layout.device, priority=least),
        }
        self._staging: dict[Direction, torch.Tensor] = {}
        self._queues: dict[Direction, deque[tuple[CopyJob, torch.cuda.Event]]] = {
            "load": deque(),
            "store": deque(),
        }
        self._issued: dict[Direction, deque[_Issued]] = {"load": deque(), "store": deque()}
        self._results: list[CopyResult] = []
        self._closed = False

    def submit(self, order: CopyOrder, now_s: float) -> None:
        """See `CopyEngine.submit`. The copy waits for what is on the current stream by now."""
        if self._closed:
            raise RuntimeError(CLOSED)
        try:
            plan = plan_order(self._layout, order, self._region.numel())
        except CopyOrderError as error:
            self._results.append(rejected(order, str(error)))
            return
        backlog, limit = self.backlog_bytes("store"), self._max_store_backlog_bytes
        if order.direction == "store" and backlog + plan.n_bytes > limit:
            error_text = BACKLOG_FULL.format(backlog=backlog, limit=limit)
            self._results.append(rejected(order, error_text))
            return
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._layout.device))
        self._queues[order.direction].append((CopyJob(order, plan, now_s), ready))
        self._issue()

    def poll(self) -> list[CopyResult]:
        """See `CopyEngine.poll`."""
        for issued in self._issued.values():
            while issued and issued[0].end.query():
                self._complete(issued.popleft())
        self._issue()
        results, self._results = self._results, []
        return results

    def backlog_bytes(self, direction: Direction) -> int:
        """See `CopyEngine.backlog_bytes`."""
        queued = sum(job.plan.n_bytes for job, _ in self._queues[direction])
        return queued + self._issued_bytes(direction)

    def drain(self, timeout_s: float) -> bool:
        """See `CopyEngine.drain`."""
        # CUDA events cannot be waited for with a time limit.
        started_s = time.monotonic()
        results: list[CopyResult] = []
        while any(self._queues.values()) or any(self._issued.values()):
            results += self.poll()
            waited_s = time.monotonic() - started_s
            if waited_s > timeout_s:
                break
            # Short copies are worth a busy loop: the sleep is longer than they are.
            time.sleep(_DRAIN_POLL_S if waited_s > _DRAIN_SPIN_S else 0)
        self._results = results + self._results
        return not (any(self._queues.values()) or any(self._issued.values()))

    def cancel(self, order_id: int | str) -> bool:
        """See `CopyEngine.cancel`. What is on its stream already ends as usual."""
        for queue in self._queues.values():
            for item in queue:
                if item[0].order.order_id == order_id:
                    queue.remove(item)
                    self._results.append(item[0].result(seconds=0.0, n_bytes=0, error=CANCELLED))
                    return True
        return any(
            issued.job.order.order_id == order_id
            for queue in self._issued.values()
            for issued in queue
        )

    def close(self) -> None:
        """See `CopyEngine.close`."""
        self._closed = True
        for queue in self._queues.values():
            while queue:
                job, _ = queue.popleft()
                self._results.append(job.result(seconds=0.0, n_bytes=0, error=CLOSED))
        for direction, stream in self._streams.items():
            stream.synchronize()
            while self._issued[direction]:
                self._complete(self._issued[direction].popleft())
        self._staging.clear()

    def _issued_bytes(self, direction: Direction) -> int:
        return sum(issued.job.plan.n_bytes for issued in self._issued[direction])

    def _issue(self) -> None:
        directions: tuple[Direction, ...] = ("load", "store")
        for direction in directions:
            queue = self._queues[direction]
            while queue and self._issued_bytes(direction) < self._max_issued_bytes:
                job, ready = queue.popleft()
                deadline_s = job.order.deadline_s
                job.started_s = self._clock()
                if deadline_s is not None and job.started_s > deadline_s:
                    self._results.append(job.result(seconds=0.0, n_bytes=0, error=LEASE_ENDED))
                    continue
                try:
                    self._issued[direction].append(self._copy(job, ready))
                except RuntimeError as error:  # CUDA errors, also out of memory
                    # What was issued before the failure must not run on after the result.
                    self._streams[direction].synchronize()
                    text = f"{type(error).__name__}: {error}"
                    self._results.append(job.result(seconds=0.0, n_bytes=0, error=text))

    def _complete(self, issued: _Issued) -> None:
        job, deadline_s = issued.job, issued.job.order.deadline_s
        late = deadline_s is not None and self._clock() > deadline_s
        seconds = issued.start.elapsed_time(issued.end) / 1e3
        error = LEASE_ENDED if late else ""
        self._results.append(job.result(seconds=seconds, n_bytes=job.plan.n_bytes, error=error))

    def _copy(self, job: CopyJob, ready: torch.cuda.Event) -> _Issued:
        """Put the whole order on its stream."""
        stream = self._streams[job.order.direction]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        issued = _Issued(job, start, end, [])
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            issued.start.record(stream)
            for batch in self._batches(job.order):
                self._copy_batch(job.order, *batch, issued.keep_alive)
            issued.end.record(stream)
        return issued

    def _batches(
        self, order: CopyOrder
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Split into ``(slots, block ids, positions, staging)`` that fit the staging buffer."""
        slot_bytes = self._layout.slot_bytes(order.chunk_blocks)
        per_batch = max(1, self._staging_bytes // slot_bytes)
        staging = self._staging.get(order.direction)
        if staging is None or staging.numel() < per_batch * slot_bytes:
            staging = torch.empty(
                per_batch * slot_bytes, dtype=torch.uint8, device=self._layout.device
            )
            self._staging[order.direction] = staging
        staging = staging[: per_batch * slot_bytes].view(per_batch, slot_bytes)
        ids = np.asarray(order.block_ids, dtype=np.int64)
        index = np.arange(len(ids))
        chunk, position = np.divmod(index, order.chunk_blocks)
        slots = np.asarray(order.slots, dtype=np.int64)
        wanted = (index >= order.skip_blocks) & (slots[chunk] >= 0)
        chunks = np.unique(chunk[wanted])
        for first in range(0, len(chunks), per_batch):
            batch = chunks[first : first + per_batch]
            chosen = wanted & np.isin(chunk, batch)
            rows = np.searchsorted(batch, chunk[chosen]) * order.chunk_blocks + position[chosen]
            yield (
                slots[batch].tolist(),
                torch.from_numpy(ids[chosen]),
                torch.from_numpy(rows),
                staging[: len(batch)],
            )

    def _copy_batch(
        self,
        order: CopyOrder,
        slots: list[int],
        block_ids: torch.Tensor,
        positions: torch.Tensor,
        staging: torch.Tensor,
        keep_alive: list[torch.Tensor],
    ) -> None:
        host = [self._region[slot : slot + staging.shape[1]] for slot in slots]
        ids, rows = (self._to_device(tensor, keep_alive) for tensor in (block_ids, positions))
        words = staging.view(self._planes[0].dtype)
        if order.direction == "store":
            gather_chunks(self._planes, ids, order.chunk_blocks, words)
            for target, source in zip(host, staging, strict=True):
                target.copy_(source, non_blocking=True)
        else:
            for target, source in zip(staging, host, strict=True):
                target.copy_(source, non_blocking=True)
            scatter_chunks(self._planes, ids, rows, order.chunk_blocks, words)

    def _to_device(self, indices: torch.Tensor, keep_alive: list[torch.Tensor]) -> torch.Tensor:
        pinned = indices.pin_memory() if self._layout.device.type == "cuda" else indices
        on_device = pinned.to(self._layout.device, non_blocking=True)
        keep_alive += [pinned, on_device]
        return on_device
