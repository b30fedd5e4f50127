"""What checksums cost: bytes/s of copies with `kvtier.integrity` off, sample and full, and of the sum alone.

python bench/integrity_cost.py --json out.json

Blocks and chunks are those of an 8B model in bfloat16: 32 layers, 16 tokens a block, 256 a chunk (32 MiB).
Copy and check run one after the other in threads of their own; what is measured is the time until an order's
result is there, as a request that waits for its load sees it. Everything in one run, the three by turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvtier.copies.checked import SHARES, CheckedCopies
from kvtier.copies.checksums import load_checksums
from kvtier.copies.kv_layout import KVLayout
from kvtier.copies.plan import CopyOrder
from kvtier.copy_engine import CopyEngine, CpuCopyEngine
from kvtier.linkbench.machine import machine
from kvtier.orders import TRAILER_BYTES
from kvtier.wire import KEY_BYTES

if TYPE_CHECKING:
    from kvtier.copies.plan import Direction

N_LAYERS = 32
LAYER_SHAPE = (16, 8, 128)
CHUNK_BLOCKS = 16


class Arena:
    """KV cache and slots for orders of `n_chunks` chunks."""

    def __init__(self, n_chunks: int) -> None:
        self.n_chunks = n_chunks
        n_blocks = n_chunks * CHUNK_BLOCKS
        caches = {
            f"l{i}": torch.randint(0, 255, (2, n_blocks, *LAYER_SHAPE), dtype=torch.int16)
            for i in range(N_LAYERS)
        }
        self.layout = KVLayout.from_kv_caches(caches, num_blocks=n_blocks)
        self.slot_bytes = self.layout.slot_bytes(CHUNK_BLOCKS)
        self.pitch = -(-(self.slot_bytes + TRAILER_BYTES) // 4096) * 4096
        self.region = np.zeros(n_chunks * self.pitch, np.uint8)
        # Keys of which one in 16 is sampled, as of true ones.
        self.keys = b"".join(bytes([i % 256]) + bytes(KEY_BYTES - 1) for i in range(n_chunks))
        self._n_orders = 0

    @property
    def n_bytes(self) -> int:
        """KV bytes of an order."""
        return self.n_chunks * self.slot_bytes

    def run(self, engine: CopyEngine, direction: Direction) -> float:
        """Seconds from an order to its result."""
        self._n_orders += 1
        order = CopyOrder(
            self._n_orders,
            direction,
            "r",
            np.arange(self.n_chunks * CHUNK_BLOCKS),
            [i * self.pitch for i in range(self.n_chunks)],
            CHUNK_BLOCKS,
            keys=self.keys,
        )
        started_s = time.perf_counter()
        engine.submit(order, time.monotonic())
        while not (results := engine.poll()):
            time.sleep(0.0002)
        seconds = time.perf_counter() - started_s
        if not results[0].ok:
            raise RuntimeError(results[0].error)
        return seconds

    def sum_alone(self) -> float:
        """Seconds for the sums of all chunks, over the KV cache's blocks."""
        blocks = np.arange(self.n_chunks * CHUNK_BLOCKS).reshape(-1, CHUNK_BLOCKS)
        slots = np.arange(self.n_chunks) * self.pitch
        keys = np.frombuffer(self.keys, np.uint64).reshape(-1, KEY_BYTES // 8).copy()
        loop, table = load_checksums().seal, self.layout.plane_table(CHUNK_BLOCKS)
        address, share = self.region.ctypes.data, np.uint64(1)
        started_s = time.perf_counter()
        loop(address, slots, blocks, table, self.slot_bytes, keys, share)
        return time.perf_counter() - started_s


def measure(n_chunks: int, rounds: int) -> dict[str, Any]:
    """Return medians in bytes/s."""
    arena = Arena(n_chunks)
    engines: dict[str, CopyEngine] = {
        mode: CpuCopyEngine(arena.layout, arena.region) for mode in ("off", *SHARES)
    }
    for mode, share in SHARES.items():
        engines[mode] = CheckedCopies(engines[mode], arena.layout, arena.region, share=share)
    seconds: dict[str, list[float]] = {"sum": []}
    directions: tuple[Direction, ...] = ("store", "load")
    for i in range(rounds + 1):
        for mode, engine in engines.items():
            for direction in directions:
                took_s = arena.run(engine, direction)
                if i:  # the first round touches the memory
                    seconds.setdefault(f"{direction} {mode}", []).append(took_s)
        took_s = arena.sum_alone()
        if i:
            seconds["sum"].append(took_s)
    for engine in engines.values():
        engine.close()
    return {name: arena.n_bytes / statistics.median(took) for name, took in seconds.items()}


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=16, help="chunks of 32 MiB in an order")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rates = measure(arguments.chunks, arguments.rounds)
    for name, rate in rates.items():
        print(f"{name:14} {rate / 1e9:6.2f} GB/s")
    if arguments.json:
        found = {"machine": machine(torch.device("cpu"), sys.argv), "bytes_per_s": rates}
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
