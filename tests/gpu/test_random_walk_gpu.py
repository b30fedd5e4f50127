"""Random stores and loads with checksums on a GPU, for minutes.

``GPU_WALK_MINUTES`` (default 1) bounds the time, ``GPU_WALK_SEED`` (default 0) is the first walk's seed.
A failure names its seed; a run that passes prints the seed to go on with.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch

from kvtier.copies.cuda import CudaCopyEngine
from kvtier.copies.switch import Switch, always
from kvtier.costs.link_model import LinkModel
from tests.gpu.random_walk import Walk, WalkSize

if TYPE_CHECKING:
    from kvtier.copies.kv_layout import KVLayout
    from kvtier.copy_engine import CopyEngine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SIZES = (
    WalkSize(),
    WalkSize(layers=2, block_bytes=64 << 10),
    WalkSize(layers=1, block_bytes=1 << 20, blocks=128),
    WalkSize(layers=3, block_bytes=1000),
    WalkSize(layers=2, block_bytes=77, steps=150),
)
# Small copies by kernel, others by DMA: both in one walk.
_MIXED = Switch(
    {
        (direction, mover): LinkModel(latency_s, ((4096, rate),))
        for direction in ("store", "load")
        for mover, latency_s, rate in (("dma", 1e-5, 1e10), ("kernel", 0.0, 1e9))
    }  # type: ignore[misc]
)
SWITCHES = (always("dma"), always("kernel"), _MIXED)


def test_random_stores_and_loads_keep_every_byte(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("GPU_WALK_SEED", "0"))
    until_s = time.monotonic() + 60 * float(os.environ.get("GPU_WALK_MINUTES", "1"))
    checked = cancelled = 0
    while time.monotonic() < until_s:
        size, switch = SIZES[seed % len(SIZES)], SWITCHES[seed % len(SWITCHES)]

        def engine_of(
            layout: KVLayout, region: torch.Tensor, seed: int = seed, switch: Switch = switch
        ) -> CopyEngine:
            batch_bytes = 1 << (14 + seed % 8)
            return CudaCopyEngine(layout, region, switch=switch, batch_bytes=batch_bytes)

        walk = Walk(seed, size, torch.device("cuda"), engine_of)
        try:
            walk.run()
        except BaseException as error:
            error.add_note(f"GPU_WALK_SEED={seed}")
            raise
        checked, cancelled = checked + walk.checked, cancelled + walk.cancelled
        seed += 1
    with capsys.disabled():
        sys.stderr.write(f"\n{checked} slots checked, {cancelled} copies cancelled; ")
        sys.stderr.write(f"next GPU_WALK_SEED={seed}\n")
    assert checked
