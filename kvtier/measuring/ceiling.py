"""The link's own limit: large copies between page-locked memory and the device; on CPU, ``memcpy``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import numpy as np

from kvtier.linkbench.arena import Memory, Transfer
from kvtier.linkbench.matrix import CHUNK_BLOCKS, MIB, WAYS
from kvtier.linkbench.paths import Ceiling

if TYPE_CHECKING:
    import torch

COPY_BYTES: Final = {"cpu": 256 << 20, "cuda": 1 << 30}
_ROUNDS: Final = 9


def measure_ceilings(device: torch.device, n_bytes: int | None = None) -> dict[str, float]:
    """Bytes/s of one large copy each way and of both at once; the fastest of some rounds."""
    memory = Memory(device, n_bytes or COPY_BYTES[device.type])
    arena = memory.arena(MIB)
    ceiling = Ceiling(arena, 1, arena.kv_bytes.numel())
    ids = np.arange(CHUNK_BLOCKS)
    store, load = Transfer("store", ids, 0), Transfer("load", ids, 0)
    transfers = {"d2h": [store], "h2d": [load], "both": [load, store]}
    best_s = dict.fromkeys(WAYS, float("inf"))
    try:
        for _ in range(_ROUNDS):
            for way in WAYS:
                copy = ceiling.prepare(transfers[way])
                started_s = time.perf_counter()
                copy.start()
                copy.wait()
                best_s[way] = min(best_s[way], time.perf_counter() - started_s)
    finally:
        ceiling.close()
    return {way: ceiling.n_bytes / seconds for way, seconds in best_s.items()}
