"""The random walk of the GPU tests, on the CPU's engine: it finds nothing wrong there, and finds what is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kvtier.copy_engine import CpuCopyEngine
from tests.gpu.random_walk import Walk, WalkSize

if TYPE_CHECKING:
    from kvtier.copies.kv_layout import KVLayout
    from kvtier.copy_engine import CopyEngine, CopyOrder

SMALL = WalkSize(layers=2, block_bytes=96, blocks=64, slots=8)


def cpu_engine(layout: KVLayout, region: torch.Tensor) -> CopyEngine:
    return CpuCopyEngine(layout, region.numpy())


def test_walks_end_with_every_byte_right() -> None:
    # Cancelled orders depend on time: in a single short walk all loads may be.
    checked = 0
    for seed in range(10):
        walk = Walk(seed, SMALL, torch.device("cpu"), cpu_engine)
        walk.run()
        checked += walk.checked
    assert checked


def test_a_seed_is_a_walk() -> None:
    # Cancelled orders depend on time; what was asked for does not.
    walks = [Walk(3, SMALL, torch.device("cpu"), cpu_engine) for _ in range(2)]
    for walk in walks:
        walk._store(0)
        walk.engine.close()
    one, two = ([list(order.block_ids) for order, _, _ in w.running.values()] for w in walks)
    assert one == two


def test_one_wrong_byte_is_found() -> None:
    class Faulty(CpuCopyEngine):
        def submit(self, order: CopyOrder, now_s: float) -> None:
            if order.direction == "load":
                self._region[order.slots[0] + 5] += 1  # type: ignore[index]
            super().submit(order, now_s)

    walk = Walk(0, SMALL, torch.device("cpu"), lambda la, re: Faulty(la, re.numpy()))
    with pytest.raises(AssertionError, match="wrong bytes"):
        walk.run()
    walk.engine.close()
