"""Throughput of the CPU copy engine against numpy's memcpy, and what its thread costs Python.

    python bench/copy_cpu.py [--mib 256] [--json FILE]

Prints GB/s (1e9 bytes/s, median over rounds) for contiguous and scattered blocks, and how far a
busy Python thread slows down beside a copying thread, against a copying process: what the process
costs as well is cores and memory, the rest is the interpreter lock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import threading
import time
from multiprocessing import Process
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from kvtier.copy_engine import CopyOrder, CpuCopyEngine, Direction, KVLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK_BLOCKS = 4
TIMEOUT_S = 60.0
DIRECTIONS: tuple[Direction, ...] = ("store", "load")


class Event(Protocol):
    """What threading's and multiprocessing's events share."""

    def is_set(self) -> bool:
        """Whether `set` was called."""

    def set(self) -> None:
        """Raise the flag."""


def copy_s(engine: CpuCopyEngine, order: CopyOrder) -> float:
    """Seconds of copying of one order."""
    engine.submit(order, time.monotonic())
    engine.drain(TIMEOUT_S)
    (result,) = engine.poll()
    if not result.ok:
        raise SystemExit(result.error)
    return result.seconds


def numpy_s(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> float:
    """Seconds of one ``numpy.copyto``."""
    started_s = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - started_s


def python_work_s() -> float:
    """Seconds of a fixed amount of pure Python."""
    started_s = time.perf_counter()
    sum(i * i for i in range(1_000_000))
    return time.perf_counter() - started_s


def copy_until(stop: Event, ready: Event) -> None:
    """Copy 64 KiB pages, one long call after the other, until told to end."""
    kv = torch.ones(1024, 64 << 10, dtype=torch.uint8)
    layout = KVLayout.from_kv_caches({"a": kv})
    region = np.ones(layout.slot_bytes(1024), np.uint8)
    ids = np.random.default_rng(0).permutation(1024)
    order = CopyOrder("bench", "load", "bench", ids, [0], 1024)
    with CpuCopyEngine(layout, region) as engine:
        copy_s(engine, order)
        ready.set()
        while not stop.is_set():
            copy_s(engine, order)


def python_beside(worker: type[Thread | Process], rounds: int) -> float:
    """Median seconds of `python_work_s` while a thread or process copies."""
    make = threading.Event if worker is Thread else multiprocessing.Event
    stop, ready = make(), make()
    copier = worker(target=copy_until, args=(stop, ready))
    copier.start()
    try:
        ready.wait(TIMEOUT_S)
        return statistics.median(python_work_s() for _ in range(rounds))
    finally:
        stop.set()
        copier.join()


def measure_interference(rounds: int) -> list[dict[str, object]]:
    """How much slower Python runs beside copies of its own process, and of another one.

    The other process shares cores and memory but no interpreter lock: only the difference between
    the two is the lock's.
    """
    rows: list[dict[str, object]] = []
    workers: dict[str, type[Thread | Process]] = {"thread": Thread, "process": Process}
    for name, worker in workers.items():
        alone_s = statistics.median(python_work_s() for _ in range(rounds))
        slowdown = python_beside(worker, rounds) / alone_s
        rows.append({"table": f"python beside a copying {name}", "slowdown": slowdown})
    return rows


def measure(total_bytes: int, page_bytes: int, rounds: int) -> list[dict[str, object]]:
    """All cases for one page size: eight layers, ``total_bytes`` together."""
    n_layers = 8
    n_blocks = total_bytes // page_bytes // n_layers // CHUNK_BLOCKS * CHUNK_BLOCKS
    kv = {str(i): torch.ones(n_blocks, page_bytes, dtype=torch.uint8) for i in range(n_layers)}
    layout = KVLayout.from_kv_caches(kv)
    slot_bytes = layout.slot_bytes(CHUNK_BLOCKS)
    region = np.zeros(n_blocks // CHUNK_BLOCKS * slot_bytes, np.uint8)
    slots = list(range(0, region.nbytes, slot_bytes))
    tables = {
        "contiguous": np.arange(n_blocks),
        "scattered": np.random.default_rng(0).permutation(n_blocks),
    }
    source = np.ones(region.nbytes, np.uint8)
    orders: dict[tuple[str, Direction], CopyOrder] = {
        (table, direction): CopyOrder("bench", direction, "bench", ids, slots, CHUNK_BLOCKS)
        for table, ids in tables.items()
        for direction in DIRECTIONS
    }
    seconds: dict[tuple[str, str], list[float]] = {("numpy.copyto", ""): []}
    # All cases in turn in each round, or drift of the machine would look like a difference.
    with CpuCopyEngine(layout, region) as engine:
        for i in range(rounds + 1):
            for (table, direction), order in orders.items():
                taken_s = copy_s(engine, order)
                if i:  # the first round touches the memory
                    seconds.setdefault((table, direction), []).append(taken_s)
            taken_s = numpy_s(source, region)
            if i:
                seconds["numpy.copyto", ""].append(taken_s)
    rows: list[dict[str, object]] = []
    for (table, way), times in seconds.items():
        rate = region.nbytes / statistics.median(times) / 1e9
        rows.append({"table": table, "direction": way, "page_bytes": page_bytes, "gb_per_s": rate})
    return rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="CPU copy engine against numpy")
    parser.add_argument("--mib", type=int, default=256, help="MiB per copy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    total_bytes = arguments.mib << 20
    results: list[dict[str, object]] = []
    for page_bytes in (8 << 10, 64 << 10, 512 << 10):
        results += measure(total_bytes, page_bytes, arguments.rounds)
    results += measure_interference(arguments.rounds)
    for row in results:
        texts = (f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        sys.stdout.write("  ".join(texts) + "\n")
    if arguments.json:
        config = {"mib": arguments.mib, "rounds": arguments.rounds, "chunk_blocks": CHUNK_BLOCKS}
        arguments.json.write_text(json.dumps({"config": config, "results": results}, indent=1))


if __name__ == "__main__":
    main()
