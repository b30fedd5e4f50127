"""Pins: references that keep a paused program's blocks in GPU memory.

A pin is a bounded, breakable reservation, never a lock (DESIGN D2). `PinTable` counts references; who
deserves one and for how long is decided elsewhere, and given here as a deadline and a regret.

Two kinds of reference:

- a **pin** keeps the KV of a finished turn until its deadline, its program's return, or pressure;
- a **hold** keeps blocks while a copy reads or writes them, and ends with the copy alone.

A hold that begins on the first blocks of a pin shares the pin's references, as taking and dropping them
costs time; when the pin ends first, those references become the hold's.

Invariants: a block is referenced here once for each pin and each hold that lists it, unless the hold
shares a pin's, and by nobody else through this table; `release_all` returns the pool to where it was, but for blocks that
copies write to, which nobody else may have yet; pinned blocks (counted once, however
many pins share them) never exceed the budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvtier.block_ids import BlockCounts, BlockIds, as_block_ids
from kvtier.cheapest_first import CheapestFirst
from kvtier.due_times import DueTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray


class BlockReferences(Protocol):
    """The block pool, as pins see it."""

    def take_over(self, request_id: str, block_ids: BlockIds) -> bool:
        """Make a finished request's references on its leading blocks ours; False: not possible."""

    def acquire(self, block_ids: BlockIds) -> None:
        """Take a reference on each block."""

    def release(self, block_ids: BlockIds) -> None:
        """Drop a reference on each block, the last to be evicted first."""

    def references(self, block_ids: BlockIds) -> NDArray[np.int64]:
        """For each block, all references on it: running requests', and ours."""


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
    COMMAND = "command"
    SHUTDOWN = "shutdown"


# eq=False: pins are compared by identity, as they hold arrays.
@dataclass(slots=True, eq=False)
class Pin:
    """One finished turn's blocks, in token order; `data` is its owner's."""

    key: str
    program: str
    block_ids: BlockIds
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
    _holds: dict[str, BlockIds] = field(default_factory=dict)
    # The hold that shares a pin's references, and the other way round.
    _shares: dict[str, str] = field(default_factory=dict)
    _sharing: dict[str, str] = field(default_factory=dict)
    _written: set[str] = field(default_factory=set)
    _pinned: BlockCounts = field(default_factory=BlockCounts)
    _held: BlockCounts = field(default_factory=BlockCounts)
    _loose_blocks: int = 0
    _deadlines: DueTimes[str] = field(default_factory=DueTimes)
    _order: CheapestFirst[Pin] = field(default_factory=CheapestFirst)

    @property
    def pinned_blocks(self) -> int:
        """Distinct blocks kept by pins."""
        return self._pinned.n_distinct

    @property
    def loose_blocks(self) -> int:
        """Distinct blocks kept by pins and by no hold: the most that ending all pins can free."""
        return self._loose_blocks

    @property
    def kept_blocks(self) -> int:
        """Distinct blocks kept by pins or holds: the most that ending both can free."""
        return self._loose_blocks + self._held.n_distinct

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

    def get(self, key: str) -> Pin | None:
        """The pin of this name."""
        return self._pins.get(key)

    def of_program(self, program: str) -> list[Pin]:
        """A program's pins, oldest first."""
        return [self._pins[key] for key in self._by_program.get(program, ())]

    def new_blocks(self, block_ids: Sequence[int] | BlockIds) -> int:
        """How many of these blocks no pin keeps yet: what a pin would add to the budget's use."""
        ids = as_block_ids(block_ids)
        return len(ids) - self._pinned.n_listed(ids)

    def pin(
        self,
        key: str,
        program: str,
        block_ids: Sequence[int] | BlockIds,
        *,
        now_s: float,
        ttl_s: float,
        data: object = None,
        owner: str | None = None,
    ) -> bool:
        """Take references for a turn. False, and nothing taken, when the budget does not allow it.

        Args:
            key: Names the pin.
            program: Whose it is.
            block_ids: The blocks, in token order.
            now_s: Monotonic time.
            ttl_s: For how long.
            data: The owner's.
            owner: A request that is about to give these blocks back: its references become the pin's.

        Raises:
            ValueError: `key` is pinned already, or `ttl_s` is not positive.
        """
        if key in self._pins:
            message = f"{key} is pinned already"
            raise ValueError(message)
        if not ttl_s > 0:
            message = f"ttl_s must be positive, got {ttl_s}"
            raise ValueError(message)
        ids = as_block_ids(block_ids)
        if not len(ids):
            return False
        fresh = self._pinned.add(ids)
        if self.pinned_blocks > self.budget_blocks:
            self._pinned.remove(ids)
            return False
        n_held = self._held.n_listed(fresh)
        # From here on nothing can fail: references taken over would be nobody's otherwise.
        if owner is None or not self.pool.take_over(owner, ids):
            self.pool.acquire(ids)
        self._take_in(Pin(key, program, ids, now_s, now_s + ttl_s, data), len(fresh) - n_held)
        return True

    def extend(self, key: str, block_ids: BlockIds) -> bool:
        """Let a pin keep the blocks behind its own too. False, and nothing taken, beyond the budget.

        Raises:
            KeyError: there is no such pin.
        """
        pin = self._pins[key]
        fresh = self._pinned.add(block_ids)
        if self.pinned_blocks > self.budget_blocks:
            self._pinned.remove(block_ids)
            return False
        self.pool.acquire(block_ids)
        self._loose_blocks += len(fresh) - self._held.n_listed(fresh)
        pin.block_ids = np.concatenate((pin.block_ids, block_ids))
        self._order.add(pin)
        return True

    def repin(self, pin: Pin) -> None:
        """Undo the end of a pin, in the same scheduling call."""
        fresh = self._pinned.add(pin.block_ids)
        n_loose = len(fresh) - self._held.n_listed(fresh)
        self.pool.acquire(pin.block_ids)
        self._take_in(pin, n_loose)

    def _take_in(self, pin: Pin, n_loose: int) -> None:
        self._loose_blocks += n_loose
        self._pins[pin.key] = pin
        self._by_program.setdefault(pin.program, {})[pin.key] = None
        self._deadlines.set(pin.key, pin.deadline_s)
        self._order.add(pin)

    def unpin(self, key: str, cause: ReleaseCause) -> Released | None:
        """End a pin; None when there is none (ending twice is harmless)."""
        pin = self._pins.pop(key, None)
        if pin is None:
            return None
        self._deadlines.discard(key)
        self._order.discard(pin)
        keys = self._by_program[pin.program]
        del keys[key]
        if not keys:
            del self._by_program[pin.program]
        gone = self._pinned.remove(pin.block_ids)
        self._loose_blocks -= len(gone) - self._held.n_listed(gone)
        heir = self._shares.pop(key, None)
        n_inherited = 0
        if heir is not None:
            del self._sharing[heir]
            n_inherited = len(self._holds[heir])
        if n_inherited < len(pin.block_ids):
            self.pool.release(pin.block_ids[n_inherited:])
        return Released(pin, cause)

    def set_deadline(self, key: str, deadline_s: float) -> None:
        """A pin lasts until then now.

        Raises:
            KeyError: there is no such pin.
        """
        pin = self._pins[key]
        pin.deadline_s = deadline_s
        self._deadlines.set(key, deadline_s)
        self._order.add(pin)

    def unpin_program(self, program: str, cause: ReleaseCause) -> list[Released]:
        """End all pins of a program."""
        keys = list(self._by_program.get(program, ()))
        return [released for key in keys if (released := self.unpin(key, cause))]

    def expire(self, now_s: float) -> list[Released]:
        """End the pins whose deadline has passed; free when none has."""
        due = self._deadlines.take_due(now_s)
        return [released for key in due if (released := self.unpin(key, ReleaseCause.TTL))]

    def reclaimable_blocks(self) -> int:
        """Blocks that would become free if all pins ended: those that nobody else references.

        Exact, and walks the pinned blocks; `loose_blocks` is an upper bound that costs nothing.
        """
        pinned = self._pinned.all_listed()
        pinned = pinned[~self._held.listed(pinned)]
        ours = self._pinned.of(pinned)
        return int(np.count_nonzero(self.pool.references(pinned) == ours))

    def is_all_held(self, pin: Pin) -> bool:
        """Whether ending this pin would free nothing now, as copies read all of its blocks."""
        return bool(self._held.listed(pin.block_ids).all())

    def in_release_order(
        self, regret: Callable[[Pin], float], now_s: float | None = None
    ) -> Iterator[Pin]:
        """Pins by ascending regret per block, ties by the earlier deadline.

        Those that end meanwhile are left out. With ``now_s``, the order of many pins may be a second old, but for
        those that come first, see `CheapestFirst`; without, it is exact.
        """
        return self._order.walk(lambda pin: (regret(pin), pin.deadline_s), now_s)

    def to_end_for(
        self, block_ids: Sequence[int] | BlockIds, order: Callable[[], Iterable[Pin]]
    ) -> list[Pin] | None:
        """The leading pins of `order` whose end makes room in the budget for these blocks.

        Args:
            block_ids: What is to be pinned.
            order: Called only where there is not room enough already.

        Returns:
            No pins where there is room already; None where ending all of them is not enough.
        """
        ids = as_block_ids(block_ids)
        if self.pinned_blocks + len(ids) <= self.budget_blocks:
            return []
        excess = self.pinned_blocks + self.new_blocks(ids) - self.budget_blocks
        if excess <= 0:
            return []
        if not self._pins:
            return None
        chosen: list[Pin] = []
        with self._pinned.trial() as trial:
            # Blocks that would be pinned anew stay, as do those that other pins share.
            trial.add(ids)
            for pin in order():
                chosen.append(pin)
                excess -= trial.remove(pin.block_ids)
                if excess <= 0:
                    return chosen
        return None

    def hold(
        self,
        key: str,
        block_ids: Sequence[int] | BlockIds,
        *,
        share: str | None = None,
        written: bool = False,
        owned: bool = False,
        owner: str | None = None,
    ) -> None:
        """Keep blocks while a copy reads or writes them.

        Args:
            key: Names the hold.
            block_ids: The blocks.
            share: A pin whose references the hold shares if it can.
            written: The copy writes to them: only `unhold` ends the hold.
            owned: The caller's references on the blocks become the hold's.
            owner: A request that is about to give these blocks back: its references become the hold's.

        Raises:
            ValueError: `key` holds blocks already.
        """
        if key in self._holds:
            message = f"{key} holds blocks already"
            raise ValueError(message)
        ids = as_block_ids(block_ids)
        pin = self._pins.get(share) if share is not None else None
        if (
            pin is not None
            and pin.key not in self._shares
            and np.array_equal(pin.block_ids[: len(ids)], ids)
        ):
            self._shares[pin.key], self._sharing[key] = key, pin.key
        elif not owned and (owner is None or not self.pool.take_over(owner, ids)):
            self.pool.acquire(ids)
        if written:
            self._written.add(key)
        self._loose_blocks -= self._pinned.n_listed(self._held.add(ids))
        self._holds[key] = ids

    def unhold(self, key: str) -> None:
        """The copy is over. Ending twice is harmless."""
        ids = self._holds.pop(key, None)
        if ids is None:
            return
        self._written.discard(key)
        self._loose_blocks += self._pinned.n_listed(self._held.remove(ids))
        sharing = self._sharing.pop(key, None)
        if sharing is not None:
            del self._shares[sharing]
        else:
            self.pool.release(ids)

    def references(self) -> list[BlockIds]:
        """The blocks of every reference that this table has taken, for those who check the pool."""
        shared = set(self._shares.values())
        holds = [ids for key, ids in self._holds.items() if key not in shared]
        return [*(pin.block_ids for pin in self._pins.values()), *holds]

    def release_all(self, cause: ReleaseCause) -> list[Released]:
        """End every pin, and every hold but those of blocks that a copy writes to."""
        released = [r for key in list(self._pins) if (r := self.unpin(key, cause))]
        for key in [key for key in self._holds if key not in self._written]:
            self.unhold(key)
        return released
