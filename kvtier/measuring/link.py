"""Measures the link: the copy engine's own rate by run size, each way, and by DMA and by kernel."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtier.copies.kv_layout import KVLayout
from kvtier.copies.switch import MOVERS, Mover, Switch, always
from kvtier.copy_engine import INLINE_BYTES, CopyEngine, CopyOrder, CpuCopyEngine, Direction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from kvtier.costs.link_model import LinkModel

    EngineFactory = Callable[[KVLayout, NDArray[np.uint8]], CopyEngine]

RUN_SIZES_BYTES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
SCRATCH_BYTES = 128 << 20
"""Per side: well beyond the caches that cores share, so that memory is measured."""
READER_NAME = "kvtier-reader"
_LATENCY_BYTES = 2 * INLINE_BYTES
_ORDER_TIMEOUT_S = 10.0
_MAX_ROUNDS = 32
_MIN_ROUNDS = 3


class CalibrationError(RuntimeError):
    """A measurement failed; the message is the copy engine's."""


@dataclass(frozen=True)
class LinkMeasurement:
    """One direction: ``latency_s`` of an order, and ``(run bytes, bytes/s)`` by run size."""

    latency_s: float
    points: tuple[tuple[int, float], ...]

    def model(self) -> LinkModel:
        """Return the estimators' model of this link."""
        from kvtier.costs.link_model import LinkModel  # noqa: PLC0415 - only where a model is wanted

        return LinkModel(latency_s=self.latency_s, points=self.points)


@dataclass(frozen=True)
class MoverMeasurement:
    """One direction by one mover of the GPU, see `copies.switch`."""

    direction: Direction
    mover: Mover
    link: LinkMeasurement


def _cpu_engine(layout: KVLayout, region: NDArray[np.uint8]) -> CopyEngine:
    return CpuCopyEngine(layout, region, inline_bytes=INLINE_BYTES)


def _cuda_engine(layout: KVLayout, region: NDArray[np.uint8]) -> CopyEngine:
    from kvtier.copies.cuda import CudaCopyEngine  # noqa: PLC0415 - only where CUDA is

    return CudaCopyEngine(layout, torch.from_numpy(region))


def measure_movers(device: torch.device) -> tuple[MoverMeasurement, ...]:
    """Both directions by DMA and by kernel; empty on the CPU, and DMA alone without a kernel.

    Raises:
        CalibrationError: see `measure_link`.
    """
    if device.type == "cpu":
        return ()
    from kvtier.copies.cuda import CudaCopyEngine  # noqa: PLC0415 - only where CUDA is

    found: list[MoverMeasurement] = []
    for mover in MOVERS:
        switch = always(mover)
        usable: list[bool] = []

        def factory(
            layout: KVLayout,
            region: NDArray[np.uint8],
            switch: Switch = switch,
            usable: list[bool] = usable,
        ) -> CopyEngine:
            engine = CudaCopyEngine(layout, torch.from_numpy(region), switch=switch)
            usable.append(engine.has_kernel())
            return engine

        links = measure_link(device, engine_factory=factory)
        if mover == "dma" or all(usable):
            found += [MoverMeasurement(d, mover, link) for d, link in links.items()]
    return tuple(found)


def fastest(movers: Sequence[MoverMeasurement]) -> dict[Direction, LinkMeasurement]:
    """The engine's own link where it may choose: the faster mover for each run size."""
    directions: tuple[Direction, ...] = ("store", "load")
    links = {}
    for direction in directions:
        mine = [m.link for m in movers if m.direction == direction]
        sizes = [size for size, _ in mine[0].points]
        rates = [
            max(rates)
            for rates in zip(*([r for _, r in link.points] for link in mine), strict=True)
        ]
        links[direction] = LinkMeasurement(
            min(link.latency_s for link in mine), tuple(zip(sizes, rates, strict=True))
        )
    return links


def measure_link(
    device: torch.device | str = "cpu",
    *,
    run_sizes_bytes: Sequence[int] = RUN_SIZES_BYTES,
    scratch_bytes: int = SCRATCH_BYTES,
    budget_s: float = 0.6,
    beside_reader: bool = True,
    engine_factory: Callable[[KVLayout, NDArray[np.uint8]], CopyEngine] | None = None,
) -> dict[Direction, LinkMeasurement]:
    """Copy scratch memory through the copy engine, both ways, with runs of several sizes.

    Live KV is not touched: the blocks are scratch memory on ``device`` of one run each, in random
    order. The rate is the median over rounds of the bytes over the time that they took.

    On a GPU that is the time from submission to completion, less the latency: the switch between DMA and
    kernel compares what each costs in all. The latency is the median of what a small order takes from
    submission to completion beyond the time in which its bytes moved.

    On a CPU it is the time in which bytes moved, as the engine reports it of the orders in service, too: the
    estimator goes on from there with like. The thread's waking, some 0.1 ms, is left out, and nothing else
    is fixed: the latency is 0.

    Args:
        device: where the KV cache lies, ``"cpu"`` or a CUDA device.
        run_sizes_bytes: block sizes, in bytes; those above ``scratch_bytes`` are left out.
        scratch_bytes: memory used on each side, at least one block.
        budget_s: for all sizes and directions together, start-up and first touch excluded.
            Every size is measured at least three times each way, whatever it takes.
        beside_reader: on a CPU with several cores one of them reads memory in the meantime, as an engine
            does while it computes: copies share the memory with it.
        engine_factory: builds the engine over a layout and slots; default by device.

    Raises:
        CalibrationError: an order failed or did not end.
    """
    device = torch.device(device)
    sizes = sorted({size for size in run_sizes_bytes if size <= scratch_bytes})
    if not sizes or sizes[0] <= 0:
        msg = f"no run size in {tuple(run_sizes_bytes)} fits {scratch_bytes} bytes"
        raise CalibrationError(msg)
    if engine_factory is None:
        engine_factory = _cpu_engine if device.type == "cpu" else _cuda_engine
    kv = torch.zeros(scratch_bytes, dtype=torch.uint8, device=device)
    # Page-locked memory of torch stands in for the registered region.
    slots = torch.ones(scratch_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    region: NDArray[np.uint8] = slots.numpy()
    share_s = budget_s / (2 * len(sizes))
    points: dict[Direction, list[tuple[int, float]]] = {"store": [], "load": []}
    latency_s: dict[Direction, float] = {}
    directions: tuple[Direction, ...] = ("store", "load")
    on_cpu = device.type == "cpu"
    with _reader() if beside_reader and on_cpu else contextlib.nullcontext():
        for size in sizes:
            n_blocks = scratch_bytes // size
            layout = KVLayout.from_kv_caches(
                {"scratch": kv[: n_blocks * size].view(n_blocks, size)}
            )
            engine = engine_factory(layout, region)
            try:
                for direction in directions:
                    if size == sizes[0]:
                        latency_s[direction] = (
                            0.0 if on_cpu else _latency_s(engine, direction, n_blocks, size)
                        )
                    latency = None if on_cpu else latency_s[direction]
                    rate = _rate(engine, direction, n_blocks, size, share_s, latency)
                    points[direction].append((size, rate))
            finally:
                engine.close()
    return {d: LinkMeasurement(latency_s[d], tuple(points[d])) for d in directions}


@contextlib.contextmanager
def _reader() -> Iterator[None]:
    """Have another core read more memory than caches hold, over and over."""
    if len(os.sched_getaffinity(0)) == 1:
        yield
        return
    data = np.ones(SCRATCH_BYTES // 8)
    reading, stopped = threading.Event(), threading.Event()

    def read() -> None:
        while not stopped.is_set():
            data.sum()
            reading.set()

    thread = threading.Thread(target=read, name=READER_NAME, daemon=True)
    thread.start()
    try:
        reading.wait()
        yield
    finally:
        stopped.set()
        thread.join()


def _timed(
    engine: CopyEngine, direction: Direction, ids: NDArray[np.int64], size: int
) -> tuple[float, float]:
    """Copy blocks of ``size`` bytes; seconds in which bytes moved, seconds from submission to the end."""
    order = CopyOrder(
        order_id="calibration",
        direction=direction,
        request_id="calibration",
        block_ids=ids,
        slots=(np.arange(len(ids)) * size).tolist(),
        chunk_blocks=1,
    )
    started_s = time.perf_counter()
    engine.submit(order, time.monotonic())
    drained = engine.drain(_ORDER_TIMEOUT_S)
    elapsed_s = time.perf_counter() - started_s
    results = engine.poll()
    if not drained or len(results) != 1 or not results[0].ok:
        msg = f"calibration copy failed: {results[0].error if results else 'no result'}"
        raise CalibrationError(msg)
    return results[0].seconds, elapsed_s


def _latency_s(engine: CopyEngine, direction: Direction, n_blocks: int, size: int) -> float:
    # Not of a copy so small that it is made at once.
    count = max(1, min(n_blocks, _LATENCY_BYTES // size))
    ids = np.random.default_rng(0).permutation(n_blocks)[:count].astype(np.int64)
    times = [_timed(engine, direction, ids, size) for _ in range(_MAX_ROUNDS)]
    return statistics.median(max(elapsed - seconds, 0.0) for seconds, elapsed in times)


def _rate(
    engine: CopyEngine,
    direction: Direction,
    n_blocks: int,
    size: int,
    share_s: float,
    latency_s: float | None,
) -> float:
    """Bytes/s over all blocks in random order; the first round only touches the memory.

    With a latency the time is from submission to the end, less the latency; with None that in which bytes moved.
    """
    ids = np.random.default_rng(0).permutation(n_blocks).astype(np.int64)
    _timed(engine, direction, ids, size)
    deadline_s = time.perf_counter() + share_s
    rates: list[float] = []
    while len(rates) < _MIN_ROUNDS or (
        len(rates) < _MAX_ROUNDS and time.perf_counter() < deadline_s
    ):
        seconds, elapsed_s = _timed(engine, direction, ids, size)
        if latency_s is not None:
            seconds = max(elapsed_s - latency_s, seconds)
        rates.append(n_blocks * size / max(seconds, 1e-9))
    return statistics.median(rates)
