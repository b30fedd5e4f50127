"""Copies between paged KV blocks and slots of shared memory, in the background.

`CopyEngine` is what the worker's half uses. `CpuCopyEngine` copies with one thread, `copy_cuda`
holds the one for CUDA. Loads go before stores and interrupt them, because a request waits for a
load and nobody for a store.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from kvtier.copies.kernel import (
    CONTROL_DEADLINE_NS,
    CONTROL_FIELDS,
    CONTROL_STOP,
    DONE,
    LATE,
    NO_DEADLINE_NS,
    STATE_BYTES,
    STATE_FIELDS,
    STATE_NS,
    STATE_SAFE_RUN,
    CopyKernel,
    load_kernel,
)
from kvtier.copies.kv_layout import KVLayout, KVLayoutError, Plane
from kvtier.copies.merge import NO_SLOT, load_merge
from kvtier.copies.plan import (
    CopyOrder,
    CopyOrderError,
    CopyResult,
    Direction,
    RunPlan,
    plan_order,
)
from kvtier.copies.urgency import Urgency

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


__all__ = [
    "NO_SLOT",
    "CopyEngine",
    "CopyOrder",
    "CopyOrderError",
    "CopyResult",
    "CpuCopyEngine",
    "Direction",
    "KVLayout",
    "KVLayoutError",
    "Plane",
    "RunPlan",
    "plan_order",
]

INLINE_BYTES = 512 << 10
"""Waking the thread takes longer than copying so many bytes."""

CANCELLED = "cancelled"
CLOSED = "the copy engine was closed"
LEASE_ENDED = "the lease on the slots ended before the copy did"
BACKLOG_FULL = "backlog full: {backlog} bytes of stores wait, the limit is {limit}"


class CopyEngine(Protocol):
    """Executes copy orders; every order submitted yields exactly one result.

    The caller owns the blocks and slots of an order until its result was polled, also after
    `cancel`. All methods are called from one thread.
    """

    def submit(self, order: CopyOrder, now_s: float) -> None:
        """Queue ``order``; ``now_s`` is the present on the engine's clock.

        An order that fails its checks becomes a failed result.

        Raises:
            RuntimeError: the engine is closed.
        """

    def poll(self) -> list[CopyResult]:
        """Results since the last call, in the order of completion. Never blocks on a copy."""

    def backlog_bytes(self, direction: Direction) -> int:
        """Bytes submitted in this direction and not finished."""

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or running; False if ``timeout_s`` passed before."""

    def cancel(self, order_id: int | str) -> bool:
        """Ask for an order to be given up; True if it was still queued or running.

        Its result comes through `poll` as always: failed with `CANCELLED`, or ok if the copy
        was done before it noticed.
        """

    def close(self) -> None:
        """Stop. Unfinished orders fail; when this returns no byte moves any more."""


@dataclass(eq=False)
class CopyJob:
    """An accepted order on its way through an engine."""

    order: CopyOrder
    plan: RunPlan
    submitted_s: float
    started_s: float | None = None
    cancelled: bool = False
    state: NDArray[np.int64] = field(default_factory=lambda: np.zeros(STATE_FIELDS, np.int64))

    def result(
        self,
        *,
        seconds: float,
        n_bytes: int,
        error: str = "",
        issue_s: float = 0.0,
        missing_blocks: frozenset[int] | None = None,
    ) -> CopyResult:
        """Close the job; it is ok if ``error`` is empty."""
        started_s = self.submitted_s if self.started_s is None else self.started_s
        return CopyResult(
            order_id=self.order.order_id,
            request_id=self.order.request_id,
            direction=self.order.direction,
            n_bytes=n_bytes,
            seconds=seconds,
            queued_s=started_s - self.submitted_s,
            run_bytes=self.plan.run_bytes,
            ok=not error,
            error=error,
            issue_s=issue_s,
            missing_blocks=missing_blocks,
        )


def rejected(order: CopyOrder, error: str) -> CopyResult:
    """Return the failed result of an order of which no byte was copied."""
    return CopyResult(
        order_id=order.order_id,
        request_id=order.request_id,
        direction=order.direction,
        n_bytes=0,
        seconds=0.0,
        queued_s=0.0,
        run_bytes=0.0,
        ok=False,
        error=error,
    )


class CpuCopyEngine:
    """`CopyEngine` for a KV cache in host memory: one daemon thread, one call per order.

    The thread needs the interpreter lock once to take an order and once to report it; the copy
    itself, its clock and its interruption run without it. A copy that takes less than waking the
    thread would is made at once.
    """

    def __init__(
        self,
        layout: KVLayout,
        region: NDArray[np.uint8],
        *,
        clock: Callable[[], float] = time.monotonic,
        kernel: CopyKernel | None = None,
        piece_bytes: int = 4 << 20,
        inline_bytes: int = 0,
        max_store_backlog_bytes: int | None = None,
    ) -> None:
        """Compile the kernel and start the thread.

        Args:
            layout: where the blocks are.
            region: the slots, uint8 [region bytes]. Held until `close`, so that it stays mapped.
            clock: seconds; deadlines of orders are on this clock.
            kernel: replaces the compiled loop.
            piece_bytes: a running copy notices interruption after at most this much (4 MiB is
                about 1 ms).
            inline_bytes: orders of at most this much are copied by `submit`, when nothing else is
                under way. `INLINE_BYTES` takes about 40 us.
            max_store_backlog_bytes: stores beyond it fail at once. Default: the region's size.

        Raises:
            ValueError: the KV cache is not in host memory or the region is not flat uint8.
        """
        if layout.device.type != "cpu":
            msg = f"CpuCopyEngine cannot copy a KV cache on {layout.device}"
            raise ValueError(msg)
        if region.dtype != np.uint8 or region.ndim != 1 or not region.flags.c_contiguous:
            msg = "the region must be a contiguous flat uint8 array"
            raise ValueError(msg)
        self._layout = layout
        self._region: NDArray[np.uint8] | None = region
        self._region_address = region.ctypes.data
        self._region_bytes = region.nbytes
        self._clock = clock
        self._kernel = kernel if kernel is not None else load_kernel()
        load_merge()
        self._piece_bytes = piece_bytes
        self._inline_bytes = inline_bytes
        self._max_store_backlog_bytes = (
            region.nbytes if max_store_backlog_bytes is None else max_store_backlog_bytes
        )
        self._queues: dict[Direction, deque[CopyJob]] = {"load": deque(), "store": deque()}
        self._backlog_bytes: dict[Direction, int] = {"load": 0, "store": 0}
        self._results: list[CopyResult] = []
        self._active: CopyJob | None = None
        self._closing = False
        self._changed = threading.Condition()
        # Wakes the thread. Who waits on a condition needs the interpreter lock twice, which is long
        # beside a running engine: to wake, and to take the condition's own lock.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._control = np.zeros(CONTROL_FIELDS, np.int64)
        self._thread = threading.Thread(target=self._run, name="kvtier-copy", daemon=True)
        self._thread.start()

    def submit(self, order: CopyOrder, now_s: float) -> None:
        """See `CopyEngine.submit`."""
        try:
            plan = plan_order(self._layout, order, self._region_bytes)
        except CopyOrderError as error:
            with self._changed:
                self._check_open()
                self._results.append(rejected(order, str(error)))
            return
        with self._changed:
            self._check_open()
            backlog, limit = self._backlog_bytes["store"], self._max_store_backlog_bytes
            if order.direction == "store" and backlog + plan.n_bytes > limit:
                error_text = BACKLOG_FULL.format(backlog=backlog, limit=limit)
                self._results.append(rejected(order, error_text))
                return
            self._backlog_bytes[order.direction] += plan.n_bytes
            job = CopyJob(order, plan, now_s)
            if plan.n_bytes <= self._inline_bytes and self._is_idle():
                self._control[CONTROL_STOP] = 0
                _, failure = self._copy(job)
                self._finish(job, failure)
                return
            self._queues[order.direction].append(job)
            active = self._active
            if order.direction == "load" and active and active.order.direction == "store":
                self._control[CONTROL_STOP] = 1
        self._wakes.put(None)

    def poll(self) -> list[CopyResult]:
        """See `CopyEngine.poll`."""
        with self._changed:
            results, self._results = self._results, []
        return results

    def backlog_bytes(self, direction: Direction) -> int:
        """See `CopyEngine.backlog_bytes`."""
        with self._changed:
            return self._backlog_bytes[direction]

    def drain(self, timeout_s: float) -> bool:
        """See `CopyEngine.drain`."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout_s)

    def cancel(self, order_id: int | str) -> bool:
        """See `CopyEngine.cancel`."""
        with self._changed:
            for queue in self._queues.values():
                for job in queue:
                    if job.order.order_id == order_id:
                        queue.remove(job)
                        self._finish(job, CANCELLED)
                        return True
            if self._active is not None and self._active.order.order_id == order_id:
                self._active.cancelled = True
                self._control[CONTROL_STOP] = 1
                return True
        return False

    def close(self) -> None:
        """See `CopyEngine.close`."""
        with self._changed:
            self._closing = True
            self._control[CONTROL_STOP] = 1
        self._wakes.put(None)
        self._thread.join()
        with self._changed:
            for queue in self._queues.values():
                while queue:
                    self._finish(queue.popleft(), CLOSED)
        self._region = None

    def _is_idle(self) -> bool:
        return self._active is None and not any(self._queues.values())

    def _check_open(self) -> None:
        if self._closing:
            raise RuntimeError(CLOSED)

    def _finish(self, job: CopyJob, error: str = "") -> None:
        """Record the result; the caller holds the condition."""
        self._backlog_bytes[job.order.direction] -= job.plan.n_bytes
        seconds, n_bytes = int(job.state[STATE_NS]) / 1e9, int(job.state[STATE_BYTES])
        missing = None
        if error and job.order.direction == "load":
            missing = job.plan.blocks_from(int(job.state[STATE_SAFE_RUN]))
        result = job.result(seconds=seconds, n_bytes=n_bytes, error=error, missing_blocks=missing)
        self._results.append(result)
        self._changed.notify_all()

    def _run(self) -> None:
        urgency = Urgency()
        while True:
            self._wakes.get()
            with self._changed:
                if self._closing:
                    return
                if not any(self._queues.values()):
                    continue  # cancelled
                job = (self._queues["load"] or self._queues["store"]).popleft()
                self._active = job
                self._control[CONTROL_STOP] = 0
            # A request waits for a load; nobody does for a store.
            with urgency.raised() if job.order.direction == "load" else contextlib.nullcontext():
                done, error = self._copy(job)
            with self._changed:
                self._active = None
                if done or error:
                    self._finish(job, error)
                elif job.cancelled or self._closing:
                    self._finish(job, CANCELLED if job.cancelled else CLOSED)
                else:  # interrupted by a load; goes on where it was
                    self._queues["store"].appendleft(job)
                    self._wakes.put(None)

    def _copy(self, job: CopyJob) -> tuple[bool, str]:
        """Copy on; True when all is copied, and the reason if the order failed."""
        now_s, deadline_s = self._clock(), job.order.deadline_s
        if job.started_s is None:
            job.started_s = now_s
        # The loop reads the system's clock, which need not be the one that was injected.
        self._control[CONTROL_DEADLINE_NS] = (
            NO_DEADLINE_NS
            if deadline_s is None
            else time.monotonic_ns() + round(min(deadline_s - now_s, 1e9) * 1e9)
        )
        try:
            outcome = self._kernel(
                job.plan.runs,
                job.plan.planes,
                self._region_address,
                int(job.order.direction == "load"),
                self._piece_bytes,
                job.state,
                self._control,
            )
        except Exception as error:  # noqa: BLE001 - becomes the result; the thread lives on
            return False, f"{type(error).__name__}: {error}"
        late = outcome == LATE or (deadline_s is not None and self._clock() > deadline_s)
        return outcome == DONE, LEASE_ENDED if late else ""

    def __enter__(self) -> Self:
        """Return the engine."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the engine."""
        self.close()
