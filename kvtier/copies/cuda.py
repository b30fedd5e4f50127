"""`CopyEngine` for CUDA: a low-priority stream and an issuing thread for each direction.

Written against the documented driver and stream API and tested on a CPU with stand-ins for both;
**it has not run on a GPU yet**.

A thread takes an order, turns it into arrays of addresses, and puts them on its stream in one call
that holds no interpreter lock (`copies.issue`): vLLM's thread neither waits for the driver, which
takes about half a microsecond a run, nor for a full queue.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from kvtier.copies import issue
from kvtier.copies.driver import Driver, load_driver
from kvtier.copies.expand import expand_runs, load_expand
from kvtier.copies.gpu_kernel import BLOCK_THREADS, PART_BYTES, GpuKernel, load_kernel
from kvtier.copies.kernel import NO_DEADLINE_NS
from kvtier.copies.lane import Issued, Lane
from kvtier.copies.merge import load_merge
from kvtier.copies.plan import (
    PIN_PIECE_BYTES,
    CopyOrder,
    CopyOrderError,
    CopyResult,
    Direction,
    RunPlan,
    plan_order,
)
from kvtier.copies.switch import Switch
from kvtier.copy_engine import BACKLOG_FULL, CANCELLED, CLOSED, LEASE_ENDED, CopyJob, rejected

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvtier.copies.kv_layout import KVLayout

_DRAIN_POLL_S: Final = 0.0005
_DRAIN_SPIN_S: Final = 0.005
_BATCH_RUNS: Final = 4096
"""Runs of a batch: about 2 ms of the driver's time, after which a copy can be stopped."""


class CudaCopyEngine:
    """`kvtier.copy_engine.CopyEngine` on two CUDA streams.

    Loads and stores run beside each other, as a GPU has copy engines for both. Stores are paced while
    the compute stream is busy. `cancel` reaches everything that is not on its stream yet.
    """

    def __init__(
        self,
        layout: KVLayout,
        region: torch.Tensor,
        *,
        clock: Callable[[], float] = time.monotonic,
        switch: Switch | None = None,
        driver: Driver | None = None,
        kernel: GpuKernel | None = None,
        loop: issue.IssueLoop | None = None,
        batch_bytes: int = 32 << 20,
        max_batches: int = 8,
        busy_share: float = 0.5,
        max_store_backlog_bytes: int | None = None,
    ) -> None:
        """Create streams and threads.

        Args:
            layout: planes on a CUDA device.
            region: the slots, uint8 [region bytes] in host memory; asynchronous only if page-locked.
            clock: seconds; deadlines of orders are on this clock.
            switch: chooses between DMA and kernel. Default: DMA.
            driver: default: the machine's.
            kernel: default: compiled for the device when the switch first chooses it.
            loop: issues batches; default: compiled.
            batch_bytes: a copy is stopped between batches of so many bytes (32 MiB: 0.6 ms at 55 GB/s).
            max_batches: batches in flight in each direction.
            busy_share: part of the link's measured rate that stores take while the GPU computes. At
                its full rate a PCIe 5 link takes 1.6 % of an H100's memory bandwidth.
            max_store_backlog_bytes: stores beyond it fail at once. Default: the region's size.

        Raises:
            DriverError: the CUDA driver lacks what copies need.
        """
        self._layout = layout
        self._region = region
        self._address = region.data_ptr()
        self._pinned = region.is_pinned()
        self._clock = clock
        self._switch = switch or Switch()
        self._driver = load_driver() if driver is None else driver
        self._kernel = kernel
        self._kernel_sought = kernel is not None
        self._kernel_lock = threading.Lock()
        self._loop = issue.load_loop(self._driver) if loop is None else loop
        load_expand()
        load_merge()
        self._batch_bytes = batch_bytes
        self._busy_share = busy_share
        self._max_store_backlog_bytes = (
            region.numel() if max_store_backlog_bytes is None else max_store_backlog_bytes
        )
        self._no_launch = np.zeros(issue.LAUNCH_FIELDS, np.int64)
        # After the model's work of each step: not there yet means that the GPU computes.
        self._computing = torch.cuda.Event()
        self._computing.record(torch.cuda.current_stream(layout.device))
        self._results: list[CopyResult] = []
        self._closing = False
        self._lock = threading.Lock()
        directions: tuple[Direction, ...] = ("load", "store")
        self._lanes = {d: Lane.create(d, layout.device, max_batches) for d in directions}
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name="kvtier-copy", daemon=True)
            for lane in self._lanes.values()
        ]
        for thread in self._threads:
            thread.start()

    # -- the caller's side ---------------------------------------------------------------------

    def submit(self, order: CopyOrder, now_s: float) -> None:
        """See `CopyEngine.submit`. The copy waits for what is on the current stream by now."""
        try:
            plan = plan_order(self._layout, order, self._region.numel())
        except CopyOrderError as error:
            with self._lock:
                self._check_open()
                self._results.append(rejected(order, str(error)))
            return
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._layout.device))
        with self._lock:
            self._check_open()
            lane = self._lanes[order.direction]
            backlog, limit = lane.backlog_bytes, self._max_store_backlog_bytes
            if order.direction == "store" and backlog + plan.n_bytes > limit:
                error_text = BACKLOG_FULL.format(backlog=backlog, limit=limit)
                self._results.append(rejected(order, error_text))
                return
            lane.backlog_bytes += plan.n_bytes
            lane.queue.append((CopyJob(order, plan, now_s), ready))
        lane.wakes.put(None)

    def poll(self) -> list[CopyResult]:
        """See `CopyEngine.poll`."""
        self._computing.record(torch.cuda.current_stream(self._layout.device))
        with self._lock:
            for lane in self._lanes.values():
                while lane.issued and lane.issued[0].end.query():
                    self._complete(lane, lane.issued.popleft())
            results, self._results = self._results, []
        return results

    def backlog_bytes(self, direction: Direction) -> int:
        """See `CopyEngine.backlog_bytes`."""
        with self._lock:
            return self._lanes[direction].backlog_bytes

    def drain(self, timeout_s: float) -> bool:
        """See `CopyEngine.drain`."""
        # CUDA events cannot be waited for with a time limit.
        started_s = time.monotonic()
        results: list[CopyResult] = []
        while True:
            results += self.poll()
            with self._lock:
                done = all(lane.is_idle for lane in self._lanes.values())
            waited_s = time.monotonic() - started_s
            if done or waited_s > timeout_s:
                break
            # Short copies are worth a busy loop: the sleep is longer than they are.
            time.sleep(_DRAIN_POLL_S if waited_s > _DRAIN_SPIN_S else 0)
        with self._lock:
            self._results = results + self._results
        return done

    def cancel(self, order_id: int | str) -> bool:
        """See `CopyEngine.cancel`. What is on its stream already ends as usual."""
        with self._lock:
            for lane in self._lanes.values():
                for item in lane.queue:
                    if item[0].order.order_id == order_id:
                        lane.queue.remove(item)
                        self._fail(lane, item[0], CANCELLED)
                        return True
                if lane.active is not None and lane.active.order.order_id == order_id:
                    lane.active.cancelled = True
                    lane.control[issue.CONTROL_STOP] = 1
                    return True
                if any(issued.job.order.order_id == order_id for issued in lane.issued):
                    return True
        return False

    def has_kernel(self) -> bool:
        """Whether copies can go by kernel. Compiles it, which takes seconds."""
        return self._pinned and self._sought_kernel() is not None

    def close(self) -> None:
        """See `CopyEngine.close`."""
        with self._lock:
            self._closing = True
            for lane in self._lanes.values():
                lane.control[issue.CONTROL_STOP] = 1
        for lane in self._lanes.values():
            lane.wakes.put(None)
        for thread in self._threads:
            thread.join()
        for lane in self._lanes.values():
            lane.stream.synchronize()
        with self._lock:
            for lane in self._lanes.values():
                while lane.issued:
                    self._complete(lane, lane.issued.popleft())
                while lane.queue:
                    job, _ = lane.queue.popleft()
                    self._fail(lane, job, CLOSED)

    def _check_open(self) -> None:
        if self._closing:
            raise RuntimeError(CLOSED)

    def _complete(self, lane: Lane, issued: Issued) -> None:
        """Report what its stream is past; the caller holds the lock."""
        deadline_s = issued.job.order.deadline_s
        late = deadline_s is not None and self._clock() > deadline_s
        seconds = issued.start.elapsed_time(issued.end) / 1e3
        if issued.n_bytes >= self._batch_bytes and seconds > 0:
            lane.best_bytes_per_s = max(lane.best_bytes_per_s, issued.n_bytes / seconds)
        error = issued.error or (LEASE_ENDED if late else "")
        lane.backlog_bytes -= issued.job.plan.n_bytes
        result = issued.job.result(
            seconds=seconds, n_bytes=issued.n_bytes, error=error, issue_s=issued.issue_s
        )
        self._results.append(result)

    def _fail(self, lane: Lane, job: CopyJob, error: str) -> None:
        lane.backlog_bytes -= job.plan.n_bytes
        self._results.append(job.result(seconds=0.0, n_bytes=0, error=error))

    # -- the issuing threads -------------------------------------------------------------------

    def _run(self, lane: Lane) -> None:
        torch.cuda.set_device(self._layout.device)
        while True:
            lane.wakes.get()
            with self._lock:
                if self._closing:
                    return
                if not lane.queue:
                    continue  # cancelled
                job, ready = lane.queue.popleft()
                lane.active = job
                lane.control[issue.CONTROL_STOP] = 0
            job.started_s = self._clock()
            try:
                issued = self._put(lane, job, ready)
                error = ""
            except Exception as raised:  # noqa: BLE001 - becomes the result; the thread lives on
                issued, error = None, f"{type(raised).__name__}: {raised}"
                with contextlib.suppress(RuntimeError):  # of a device that is lost
                    # What was issued must not run on after the result.
                    lane.stream.synchronize()
            with self._lock:
                lane.active = None
                if issued is not None:
                    lane.issued.append(issued)
                else:
                    self._fail(lane, job, error)

    def _put(self, lane: Lane, job: CopyJob, ready: torch.cuda.Event) -> Issued:
        """Put the order on the stream, as far as it is not stopped."""
        plan, deadline_s = job.plan, job.order.deadline_s
        mode = self._mode(lane.direction, plan)
        started_s = time.perf_counter()
        table = expand_runs(
            plan,
            self._address,
            most_bytes=PART_BYTES if mode == issue.BY_KERNEL else self._batch_bytes,
            edge_bytes=PIN_PIECE_BYTES,
        )
        expand_s = time.perf_counter() - started_s
        if lane.direction == "store":
            table[[0, 1]] = table[[1, 0]]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        keep_alive: list[torch.Tensor] = []
        lane.control[issue.CONTROL_DEADLINE_NS] = (
            NO_DEADLINE_NS
            if deadline_s is None
            else time.monotonic_ns() + round(min(deadline_s - self._clock(), 1e9) * 1e9)
        )
        lane.control[issue.CONTROL_BUSY_EVENT] = int(self._computing.cuda_event)
        lane.control[issue.CONTROL_PACE] = (
            int(lane.best_bytes_per_s * self._busy_share) if lane.direction == "store" else 0
        )
        targets, sources, sizes = table
        state = np.zeros(issue.STATE_FIELDS, np.int64)
        with torch.cuda.stream(lane.stream):
            lane.stream.wait_event(ready)
            launch = self._launch(table, keep_alive) if mode == issue.BY_KERNEL else self._no_launch
            start.record(lane.stream)
            outcome = self._loop(
                mode,
                targets,
                sources,
                sizes,
                self._batch_bytes,
                _BATCH_RUNS,
                ctypes.addressof(lane.attributes),
                int(lane.stream.cuda_stream),
                lane.ring,
                launch,
                lane.scratch,
                state,
                lane.control,
            )
            if outcome == issue.FAILED:
                raise RuntimeError(self._driver.error_text(int(state[issue.STATE_ERROR])))
            end.record(lane.stream)
        error = ""
        if outcome == issue.LATE:
            error = LEASE_ENDED
        elif outcome == issue.STOPPED:
            error = CANCELLED if job.cancelled else CLOSED
        issue_s = expand_s + int(state[issue.STATE_ISSUE_NS]) / 1e9
        n_bytes = int(state[issue.STATE_BYTES])
        return Issued(job, start, end, n_bytes, issue_s, error, keep_alive)

    def _mode(self, direction: Direction, plan: RunPlan) -> int:
        """How the plan's runs are issued. Memory that is not page-locked goes run by run."""
        if not self._pinned:
            return issue.BY_RUN
        mover = self._switch.choose(direction, plan.n_bytes, plan.run_bytes)
        if mover == "kernel" and self._sought_kernel() is not None:
            return issue.BY_KERNEL
        return issue.BY_BATCH if self._driver.has_batch else issue.BY_RUN

    def _sought_kernel(self) -> GpuKernel | None:
        """The kernel; compiled by an issuing thread, since it takes seconds."""
        with self._kernel_lock:
            if not self._kernel_sought:
                self._kernel_sought = True
                self._kernel = load_kernel(self._layout.device, self._driver)
            return self._kernel

    def _launch(
        self, table: NDArray[np.int64], keep_alive: list[torch.Tensor]
    ) -> NDArray[np.int64]:
        """Bring the kernel's runs to the device, on the current stream."""
        assert self._kernel is not None
        host = torch.from_numpy(table)
        host = host.pin_memory() if self._layout.device.type == "cuda" else host
        on_device = host.to(self._layout.device, non_blocking=True)
        keep_alive += [host, on_device]
        launch = np.zeros(issue.LAUNCH_FIELDS, np.int64)
        launch[issue.LAUNCH_FUNCTION] = self._kernel.function
        launch[issue.LAUNCH_TABLE] = on_device.data_ptr()
        launch[issue.LAUNCH_GRID] = self._kernel.grid_blocks
        launch[issue.LAUNCH_BLOCK] = BLOCK_THREADS
        return launch
