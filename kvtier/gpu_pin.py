"""Pins: references that keep a paused program's blocks in GPU memory.

A pin is a bounded, breakable reservation, never a lock (DESIGN D2). `PinTable` counts references; who
deserves one and for how long is decided elsewhere, and given here as a deadline and a regret.

Two kinds of reference:

- a **pin** keeps the KV of a finished turn until its deadline, its program's return, or pressure;
- a **hold** keeps blocks while a copy reads them, and ends with the copy alone.

Invariants: a block is referenced here once for each pin and each hold that lists it, and by nobody else
through this table; `release_all` returns the pool to where it was; pinned blocks (counted once, however
many pins share them) never exceed the budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class BlockReferences(Protocol):
    """The block pool, as pins see it."""

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Take a reference on each block."""

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop a reference on each block, the last to be evicted first."""

    def n_references(self, block_id: int) -> int:
        """All references on a block."""


class ReleaseCause(StrEnum):
    """Why a pin ended; a metric label."""

    HANDOFF = "handoff"
    TTL = "ttl"
    PRESSURE = "pressure"
    SUPERSEDED = "superseded"
    RESET = "reset"
    ENDED = "ended"
    OFF = "off"
    BUDGET = "budget"
    SHUTDOWN = "shutdown"


@dataclass(slots=True)
class Pin:
    """One finished turn's blocks. `regret` is filled in by whoever orders releases."""

    key: str
    program: str
    block_ids: tuple[int, ...]
    pinned_s: float
    deadline_s: float
    data: object = None


@dataclass(frozen=True, slots=True)
class Released:
    """A pin that ended."""

    pin: Pin
    cause: ReleaseCause


@dataclass(slots=True)
class PinTable:
    """Pins by key (a request id), and holds by key.

    Attributes:
        pool: Where references are counted.
        budget_blocks: Most distinct blocks that pins may keep.
    """

    pool: BlockReferences
    budget_blocks: int
    _pins: dict[str, Pin] = field(default_factory=dict)
    _by_program: dict[str, dict[str, None]] = field(default_factory=dict)
    _holds: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)

    @property
    def pinned_blocks(self) -> int:
        """Distinct blocks kept by pins."""
        return len(self._counts)

    @property
    def held_blocks(self) -> int:
        """Blocks kept by holds, counted once a hold."""
        return sum(len(blocks) for blocks in self._holds.values())

    def __len__(self) -> int:
        return len(self._pins)

    def __contains__(self, key: str) -> bool:
        return key in self._pins

    def pins(self) -> Iterable[Pin]:
        """All pins, oldest first."""
        return self._pins.values()

    def of_program(self, program: str) -> list[Pin]:
        """A program's pins, oldest first."""
        return [self._pins[key] for key in self._by_program.get(program, ())]

    def new_blocks(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks no pin keeps yet: what a pin would add to the budget's use."""
        return sum(1 for b in block_ids if b not in self._counts)

    def pin(
        self,
        key: str,
        program: str,
        block_ids: Sequence[int],
        *,
        now_s: float,
        ttl_s: float,
        data: object = None,
    ) -> bool:
        """Take references for a turn. False, and nothing taken, when the budget does not allow it.

        Raises:
            ValueError: `key` is pinned already, or `ttl_s` is not positive.
        """
        if key in self._pins:
            message = f"{key} is pinned already"
            raise ValueError(message)
        if not ttl_s > 0:
            message = f"ttl_s must be positive, got {ttl_s}"
            raise ValueError(message)
        if not block_ids or self.pinned_blocks + self.new_blocks(block_ids) > self.budget_blocks:
            return False
        self.pool.acquire(block_ids)
        for block in block_ids:
            self._counts[block] = self._counts.get(block, 0) + 1
        self._pins[key] = Pin(key, program, tuple(block_ids), now_s, now_s + ttl_s, data)
        self._by_program.setdefault(program, {})[key] = None
        return True

    def unpin(self, key: str, cause: ReleaseCause) -> Released | None:
        """End a pin; None when there is none (ending twice is harmless)."""
        pin = self._pins.pop(key, None)
        if pin is None:
            return None
        keys = self._by_program[pin.program]
        del keys[key]
        if not keys:
            del self._by_program[pin.program]
        for block in pin.block_ids:
            count = self._counts[block] - 1
            if count:
                self._counts[block] = count
            else:
                del self._counts[block]
        self.pool.release(pin.block_ids)
        return Released(pin, cause)

    def unpin_program(self, program: str, cause: ReleaseCause) -> list[Released]:
        """End all pins of a program."""
        keys = list(self._by_program.get(program, ()))
        return [released for key in keys if (released := self.unpin(key, cause))]

    def expire(self, now_s: float) -> list[Released]:
        """End the pins whose deadline has passed."""
        keys = [key for key, pin in self._pins.items() if pin.deadline_s <= now_s]
        return [released for key in keys if (released := self.unpin(key, ReleaseCause.TTL))]

    def repin(self, pin: Pin) -> None:
        """Undo an `unpin` made in this same scheduling call: nothing was allocated in between."""
        self.pool.acquire(pin.block_ids)
        for block in pin.block_ids:
            self._counts[block] = self._counts.get(block, 0) + 1
        self._pins[pin.key] = pin
        self._by_program.setdefault(pin.program, {})[pin.key] = None

    def reclaimable_blocks(self, keys: Iterable[str]) -> int:
        """Blocks that would become free if these pins ended: those that nobody else references."""
        counts: dict[int, int] = {}
        for key in keys:
            for block in self._pins[key].block_ids:
                counts[block] = counts.get(block, 0) + 1
        return sum(1 for block, n in counts.items() if self.pool.n_references(block) == n)

    def in_release_order(self, regret: Callable[[Pin], float]) -> list[Pin]:
        """Pins by ascending regret per block, ties by the earlier deadline."""
        return sorted(self._pins.values(), key=lambda pin: (regret(pin), pin.deadline_s))

    def to_end_for(self, block_ids: Sequence[int], order: Iterable[Pin]) -> list[Pin] | None:
        """The leading pins of `order` whose end makes room in the budget for these blocks.

        Returns:
            No pins where there is room already; None where ending all of them is not enough.
        """
        mine = set(block_ids)
        excess = self.pinned_blocks + self.new_blocks(mine) - self.budget_blocks
        chosen: list[Pin] = []
        left: dict[int, int] = {}
        for pin in order:
            if excess <= 0:
                break
            chosen.append(pin)
            for block in pin.block_ids:
                # Blocks that other pins share, or that would be pinned anew, stay.
                left[block] = left.get(block, self._counts[block]) - 1
                if not left[block] and block not in mine:
                    excess -= 1
        return chosen if excess <= 0 else None

    def hold(self, key: str, block_ids: Sequence[int]) -> None:
        """Keep blocks while a copy reads them.

        Raises:
            ValueError: `key` holds blocks already.
        """
        if key in self._holds:
            message = f"{key} holds blocks already"
            raise ValueError(message)
        self.pool.acquire(block_ids)
        self._holds[key] = tuple(block_ids)

    def unhold(self, key: str) -> None:
        """The copy is over. Ending twice is harmless."""
        blocks = self._holds.pop(key, None)
        if blocks is not None:
            self.pool.release(blocks)

    def release_all(self, cause: ReleaseCause) -> list[Released]:
        """End every pin and every hold."""
        released = [r for key in list(self._pins) if (r := self.unpin(key, cause))]
        for key in list(self._holds):
            self.unhold(key)
        return released
