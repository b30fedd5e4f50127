"""Random stores and loads through a copy engine, checked by checksums; the same for the same seed.

It runs on any device: `tests/unit/test_random_walk.py` runs it on the CPU's engine.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvtier.copies.kv_layout import KVLayout
from kvtier.copy_engine import CANCELLED, CopyOrder

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.copy_engine import CopyEngine, CopyResult

WAIT_S = 60.0


@dataclass(frozen=True)
class WalkSize:
    """How much memory a walk uses, and how long it is.

    Attributes:
        layers: planes, of one size.
        block_bytes: of one block in one plane; odd sizes are copied in narrow words.
        blocks: of the KV cache.
        chunk_blocks: blocks of a slot.
        slots: of the region.
        steps: orders.
    """

    layers: int = 4
    block_bytes: int = 4096
    blocks: int = 256
    chunk_blocks: int = 4
    slots: int = 32
    steps: int = 60


class Walk:
    """KV blocks and slots, and the checksum that each slot's content must have.

    Blocks in use by an order are left alone until its result is there, as a scheduler does.
    """

    def __init__(
        self,
        seed: int,
        size: WalkSize,
        device: torch.device,
        engine_of: Callable[[KVLayout, torch.Tensor], CopyEngine],
    ) -> None:
        self.chance = random.Random(seed)
        self.size = size
        torch.manual_seed(seed)
        self.caches = {
            f"layer.{i}": torch.randint(
                0, 256, (size.blocks, size.block_bytes), dtype=torch.uint8, device=device
            )
            for i in range(size.layers)
        }
        layout = KVLayout.from_kv_caches(self.caches, num_blocks=size.blocks)
        slot_bytes = layout.slot_bytes(size.chunk_blocks)
        pinned = device.type == "cuda"
        self.region = torch.zeros(size.slots * slot_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.slot_offsets = [i * slot_bytes for i in range(size.slots)]
        self.engine = engine_of(layout, self.region)
        self.free_blocks = set(range(size.blocks))
        self.free_slots = set(range(size.slots))
        self.stored: dict[int, list[int]] = {}
        self.running: dict[int, tuple[CopyOrder, list[int], list[list[int]]]] = {}
        self.checked = 0
        self.cancelled = 0

    def run(self) -> None:
        """All steps, and a last look at every slot."""
        for step in range(self.size.steps):
            act = self.chance.choice(("store", "load", "write", "cancel", "collect"))
            getattr(self, f"_{act}")(step)
        assert self.engine.drain(WAIT_S)
        self._collect(self.size.steps)
        assert not self.running
        for slot in sorted(self.stored):
            self._load(self.size.steps + slot, [slot])
            assert self.engine.drain(WAIT_S)
            self._collect(0)
        self.engine.close()

    def checksums(self, block_ids: list[int]) -> list[int]:
        """Of blocks over all planes, ordered after the work on the current stream."""
        rows = torch.tensor(block_ids, device=next(iter(self.caches.values())).device)
        total = torch.zeros(len(block_ids), dtype=torch.int64, device=rows.device)
        for i, cache in enumerate(self.caches.values()):
            words = cache[rows].to(torch.int64) + 1
            places = torch.arange(words.shape[1], device=rows.device) * 2_654_435_761 + i
            total = total * 31 + (words * places).sum(1)
        return total.tolist()

    def _take(self, pool: set[int], n: int) -> list[int]:
        taken = self.chance.sample(sorted(pool), n)
        pool.difference_update(taken)
        return taken

    def _store(self, step: int) -> None:
        n = self.chance.randint(1, 4)
        if n > len(self.free_slots) or n * self.size.chunk_blocks > len(self.free_blocks):
            return
        slots = self._take(self.free_slots, n)
        blocks = self._take(self.free_blocks, n * self.size.chunk_blocks)
        if self.chance.random() < 0.5:  # side by side, to have runs of several lengths
            blocks.sort()
        # Changed on the compute stream just before: the copy must wait for it.
        rows = torch.tensor(blocks)
        for cache in self.caches.values():
            cache[rows.to(cache.device)] += self.chance.randint(1, 255)
        self._submit(step, "store", blocks, slots, [])

    def _load(self, step: int, slots: list[int] | None = None) -> None:
        if slots is None:
            n = self.chance.randint(1, 4)
            if n > len(self.stored):
                return
            slots = self.chance.sample(sorted(self.stored), n)
        if len(slots) * self.size.chunk_blocks > len(self.free_blocks):
            return
        blocks = self._take(self.free_blocks, len(slots) * self.size.chunk_blocks)
        expected = [self.stored.pop(slot) for slot in slots]  # nobody else uses them meanwhile
        self._submit(step, "load", blocks, slots, expected)

    def _submit(
        self, step: int, direction: str, blocks: list[int], slots: list[int], sums: list[list[int]]
    ) -> None:
        order = CopyOrder(
            order_id=step,
            direction=direction,  # type: ignore[arg-type]
            request_id="walk",
            block_ids=blocks,
            slots=[self.slot_offsets[slot] for slot in slots],
            chunk_blocks=self.size.chunk_blocks,
        )
        self.running[step] = (order, slots, sums)
        self.engine.submit(order, time.monotonic())

    def _write(self, _: int) -> None:
        blocks = sorted(self.free_blocks)[:16]
        for cache in self.caches.values():
            cache[blocks] = self.chance.randint(0, 255)

    def _cancel(self, _: int) -> None:
        if self.running:
            self.engine.cancel(self.chance.choice(sorted(self.running)))

    def _collect(self, _: int) -> None:
        for result in self.engine.poll():
            order, slots, sums = self.running.pop(int(result.order_id))
            assert result.ok or result.error == CANCELLED, result.error
            self.cancelled += not result.ok
            blocks = list(order.block_ids)
            if order.direction == "load":
                self._check(result, blocks, slots, sums)
            elif result.ok:
                found = self.checksums(blocks)
                chunk = self.size.chunk_blocks
                for i, slot in enumerate(slots):
                    self.stored[slot] = found[i * chunk : (i + 1) * chunk]
            else:
                self.free_slots.update(slots)
            self.free_blocks.update(blocks)

    def _check(
        self, result: CopyResult, blocks: list[int], slots: list[int], sums: list[list[int]]
    ) -> None:
        if result.ok:
            expected = [value for slot_sums in sums for value in slot_sums]
            assert self.checksums(blocks) == expected, f"order {result.order_id}: wrong bytes"
            self.checked += len(slots)
        for slot, slot_sums in zip(slots, sums, strict=True):
            if result.ok and self.chance.random() < 0.5:
                self.free_slots.add(slot)
            else:
                self.stored[slot] = slot_sums
