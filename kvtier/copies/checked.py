"""Copies that are checked: each chunk has a checksum behind it in its slot, which a load compares.

`CheckedCopies` stands before another copy engine. When a store has ended, a thread of its own sums what the
store was to copy and writes the sum into the slot; when a load has ended, it sums what was brought. A load
that brought anything else fails, and its tokens are computed. Where the KV cache is host memory, the sums
are over the cache's blocks, so that both copies are under the check; on a GPU they are over the slots.

Sums lie in the shared memory, so every engine of the host that shares the KV can check them.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from kvtier.copies.checksums import WHOLE, load_checksums
from kvtier.copy_engine import CLOSED, LEASE_ENDED, rejected
from kvtier.orders import TRAILER_BYTES
from kvtier.wire import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvtier.copies.kv_layout import KVLayout
    from kvtier.copies.plan import CopyOrder, CopyResult, Direction
    from kvtier.copy_engine import CopyEngine

SHARES: Final = {"sample": 16, "full": 1}
"""By the setting: one chunk in so many has a checksum. Which ones, their keys say: to every engine the same."""

_FIRST, _SECOND, _LAST = range(3)

NOT_AS_STORED = "chunk {chunk} of the order is not as it was stored"
NO_TRAILER = "slots and keys do not fit: {slots} slots, {keys} keys"


class CheckedCopies:
    """`kvtier.copy_engine.CopyEngine` that checks what another one copies.

    Args:
        inner: Copies.
        layout: Where the blocks are.
        region: The slots, uint8; held until `close`. Behind the KV of each there are `TRAILER_BYTES`.
        share: One chunk in so many is summed.
        rank: Of the worker: a chunk of another rank is not what was stored.
        clock: Seconds; deadlines of orders are on this clock.

    Raises:
        RuntimeError: The machine cannot compute checksums.
    """

    def __init__(
        self,
        inner: CopyEngine,
        layout: KVLayout,
        region: NDArray[np.uint8],
        *,
        share: int,
        rank: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sums = load_checksums()
        self.inner = inner
        self._layout = layout
        self._region: NDArray[np.uint8] | None = region
        self._share = np.uint64(share)
        # Into the second half of each key: by the first half the chunks are chosen that are summed.
        self._rank_mark = np.array([0, rank], np.uint64)
        self._clock = clock
        self._orders: dict[int | str, CopyOrder] = {}
        self._results: list[CopyResult] = []
        self._n_checking = 0
        self._closing = False
        self._changed = threading.Condition()
        # Loads first, which requests wait for; the number keeps jobs in order and uncompared. None ends it.
        self._jobs: queue.PriorityQueue[tuple[int, int, tuple[CopyOrder, CopyResult] | None]] = (
            queue.PriorityQueue()
        )
        self._job_number = itertools.count()
        self._thread = threading.Thread(target=self._run, name="kvtier-check", daemon=True)
        self._thread.start()

    def submit(self, order: CopyOrder, now_s: float) -> None:
        """See `CopyEngine.submit`."""
        assert self._region is not None
        slots = np.asarray(order.slots, dtype=np.int64)
        slots = slots[slots >= 0]
        if not self._has_trailers(order, slots):
            text = NO_TRAILER.format(slots=len(order.slots), keys=len(order.keys) // KEY_BYTES)
            with self._changed:
                self._results.append(rejected(order, text))
            return
        if self._is_late(order):
            # Its slots may be somebody else's by now.
            with self._changed:
                self._results.append(rejected(order, LEASE_ENDED))
            return
        if order.direction == "store":
            # Whoever reads it before it is whole finds no mark.
            words = self._region[: self._region.nbytes // 8 * 8].view(np.uint64)
            words[(slots + self._layout.slot_bytes(order.chunk_blocks)) // 8] = 0
        self.inner.submit(order, now_s)
        self._orders[order.order_id] = order

    def poll(self) -> list[CopyResult]:
        """See `CopyEngine.poll`."""
        self._take()
        with self._changed:
            results, self._results = self._results, []
        for result in results:
            self._orders.pop(result.order_id, None)
        return results

    def backlog_bytes(self, direction: Direction) -> int:
        """See `CopyEngine.backlog_bytes`."""
        return self.inner.backlog_bytes(direction)

    def drain(self, timeout_s: float) -> bool:
        """See `CopyEngine.drain`."""
        deadline_s = time.monotonic() + timeout_s
        if not self.inner.drain(timeout_s):
            return False
        self._take()
        with self._changed:
            left_s = max(0.0, deadline_s - time.monotonic())
            return self._changed.wait_for(lambda: not self._n_checking, left_s)

    def cancel(self, order_id: int | str) -> bool:
        """See `CopyEngine.cancel`. A check that is under way ends as usual."""
        return self.inner.cancel(order_id) or order_id in self._orders

    def close(self) -> None:
        """See `CopyEngine.close`."""
        self.inner.close()
        self._closing = True
        self._take()
        self._jobs.put((_LAST, next(self._job_number), None))
        self._thread.join()
        self._region = None

    # -- internals ---------------------------------------------------------------------------------

    def _has_trailers(self, order: CopyOrder, slots: NDArray[np.int64]) -> bool:
        assert self._region is not None
        trailers = slots + self._layout.slot_bytes(order.chunk_blocks)
        outside = trailers > self._region.nbytes - TRAILER_BYTES
        fit = len(order.keys) == len(order.slots) * KEY_BYTES
        return fit and not bool(np.any(outside | (trailers % 8 != 0)))

    def _take(self) -> None:
        """Have checked what was copied."""
        for result in self.inner.poll():
            order = self._orders.get(result.order_id)
            with self._changed:
                if order is None or not result.ok:
                    self._results.append(result)
                    continue
                self._n_checking += 1
            urgency = _FIRST if order.direction == "load" else _SECOND
            self._jobs.put((urgency, next(self._job_number), (order, result)))

    def _run(self) -> None:
        while True:
            _, _, job = self._jobs.get()
            if job is None:
                return
            order, result = job
            try:
                checked = self._checked(order, result)
            except Exception as error:  # noqa: BLE001 - becomes the result; the thread lives on
                checked = _failed(result, f"{type(error).__name__}: {error}")
            with self._changed:
                self._results.append(checked)
                self._n_checking -= 1
                self._changed.notify_all()

    def _checked(self, order: CopyOrder, result: CopyResult) -> CopyResult:
        if self._closing:
            return _failed(result, CLOSED)
        if self._is_late(order):
            return _failed(result, LEASE_ENDED)
        assert self._region is not None
        slots, blocks, keys = self._arrays(order)
        names = keys ^ self._rank_mark
        address, planes = self._region.ctypes.data, self._layout.plane_table(order.chunk_blocks)
        trailer, bad = self._layout.slot_bytes(order.chunk_blocks), WHOLE
        if order.direction == "load":
            bad = self._sums.verify(address, slots, blocks, planes, trailer, names, self._share)
        else:
            for i in range(len(slots)):
                # Chunk by chunk: nothing is written to a slot that may be somebody else's.
                if self._is_late(order):
                    break
                one = slice(i, i + 1)
                self._sums.seal(
                    address, slots[one], blocks[one], planes, trailer, names[one], self._share
                )
        if self._is_late(order):
            # Somebody else's by now: what was found there says nothing.
            return _failed(result, LEASE_ENDED)
        if bad == WHOLE:
            return result
        return dataclasses.replace(
            _failed(result, NOT_AS_STORED.format(chunk=bad)),
            spoilt_key=keys[bad].tobytes(),
            missing_blocks=frozenset(blocks[bad:][blocks[bad:] >= 0].tolist())
            if self._layout.device.type == "cpu"
            else None,
        )

    def _is_late(self, order: CopyOrder) -> bool:
        return order.deadline_s is not None and self._clock() > order.deadline_s

    def _arrays(
        self, order: CopyOrder
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
        """Slots, blocks that can be read here, and keys, of the chunks that were copied."""
        all_slots = np.asarray(order.slots, dtype=np.int64)
        blocks = np.full(len(all_slots) * order.chunk_blocks, -1, np.int64)
        if self._layout.device.type == "cpu":
            ids = np.asarray(order.block_ids, dtype=np.int64)
            blocks[order.skip_blocks : len(ids)] = ids[order.skip_blocks :]
        keys = np.frombuffer(order.keys, np.uint64).reshape(-1, KEY_BYTES // 8)
        copied = all_slots >= 0
        return (
            np.ascontiguousarray(all_slots[copied]),
            np.ascontiguousarray(blocks.reshape(-1, order.chunk_blocks)[copied]),
            np.ascontiguousarray(keys[copied]),
        )


def _failed(result: CopyResult, error: str) -> CopyResult:
    return dataclasses.replace(result, ok=False, error=error)
