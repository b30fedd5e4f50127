"""A CPU tier with the server's own bookkeeping, whose answers come late, in any order, twice, or as failures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvtier.backend import StateChanged
from kvtier.server.l1_store import ChunkId
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    import random

    from kvtier.backend import TierEvent

SERVER_GRACE_S: Final = 15.0
"""How long the server keeps the locks and slots of an engine that has gone."""


class UnreliableTier(VirtualTier):
    """See the module's docstring.

    Args:
        n_slots: Chunks that fit.
        chance: Decides what goes wrong.

    Attributes:
        is_calm: Nothing goes wrong, and answers come with the next poll.
        max_delay: Most polls until an answer comes.
        fail_share: Of operations.
        repeat_share: Of answers that come twice.
        remembers: Whether `held_once` is kept: a long life has many chunks.
        held_once: Chunks that were ever there when something was committed.
    """

    def __init__(self, n_slots: int, chance: random.Random) -> None:
        self.is_calm = True
        self.max_delay = 0
        self.fail_share = self.repeat_share = 0.0
        self.remembers = True
        self.held_once: set[ChunkId] = set()
        self._chance = chance
        self._lost_s = 0.0
        super().__init__(n_slots)
        self.fail = self._reason

    def lose_at(self, now_s: float) -> None:
        """The connection breaks."""
        self._lost_s = now_s
        self.lose()

    def may_return_at(self) -> float:
        """When the same server has given up the engine that it has lost."""
        return self._lost_s + SERVER_GRACE_S

    def use_slots_of(self, slot_bytes: int) -> None:
        """Slots are so far apart, from before anything is stored."""
        self._slot_bytes = slot_bytes

    def poll(self, now_s: float, wait_s: float = 0.0) -> list[TierEvent]:
        due = super().poll(now_s, wait_s)
        # Nobody reads them here, and a life is long.
        self.marked.clear()
        self.dropped.clear()
        if self.repeat_share and not self.is_calm:
            due += [
                event
                for event in due
                if not isinstance(event, StateChanged) and self._chance.random() < self.repeat_share
            ]
        return due

    def commit(self, reserve_id: int, *, ok: bool) -> int:
        op_id = super().commit(reserve_id, ok=ok)
        if self.remembers:
            self.held_once.update(self.l1.chunks)
        return op_id

    def holds(self, namespace: str, key: bytes) -> int | None:
        """Offset of the slot with a chunk; None where the tier does not hold it."""
        slot = self.l1.chunks.get(ChunkId(namespace, key, 0))
        return None if slot is None else slot * self._slot_bytes

    def _answer(self, event: TierEvent, after: int | None = None) -> None:
        if after is None and self.max_delay and not self.is_calm:
            after = self._chance.randrange(self.max_delay + 1)
        super()._answer(event, after)

    def _reason(self, what: str) -> str | None:
        if self.is_calm or self._chance.random() >= self.fail_share:
            return None
        return f"{what}_failed"
