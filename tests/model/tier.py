"""A CPU tier with the server's own bookkeeping, whose answers come late, in any order, twice, or as failures."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Final

from kvtier.backend import CommitDone, Evicted, StateChanged
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
        remembers: Whether `told` is kept: a long life has many chunks.
        told: By namespace and name, the chunks that kvtier has been told of: the tier held them when it answered a
            commit, and has not told since that they had to go. Nothing from before kvtier was last told that the tier had gone or come.
    """

    def __init__(self, n_slots: int, chance: random.Random) -> None:
        self.is_calm = True
        self.max_delay = 0
        self.fail_share = self.repeat_share = 0.0
        self.remembers = True
        self.told: dict[tuple[str, str], set[bytes]] = {}
        # By commit, what its answer will tell of: the chain, and how much of it is held.
        self._to_tell: dict[int, tuple[tuple[str, str], list[bytes], int]] = {}
        # The chain of that commit, by what it was about.
        self._chains: dict[tuple[str, str], list[bytes]] = {}
        # The last commit whose answer was heard, by what it was about.
        self._heard: dict[tuple[str, str], int] = {}
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
        for event in due:
            self._tell(event)
        # Nobody reads them here, and a life is long.
        self.marked.clear()
        self.dropped.clear()
        if self.repeat_share and not self.is_calm:
            due += [
                event
                for event in due
                if not isinstance(event, StateChanged | Evicted)
                and self._chance.random() < self.repeat_share
            ]
        return due

    def commit(self, reserve_id: int, *, ok: bool) -> int:
        reservation = self.table._reservations.get((self._owner, reserve_id))
        op_id = super().commit(reserve_id, ok=ok)
        if self.remembers and ok and reservation is not None:
            namespace, keys = reservation.namespace, reservation.keys
            n_held = sum(1 for _ in takewhile(lambda k: self.holds(namespace, k) is not None, keys))
            self._to_tell[op_id] = (namespace, reservation.program), keys, n_held
        return op_id

    def drop(self, namespace: str, program: str) -> None:
        super().drop(namespace, program)
        self.told.pop((namespace, program), None)

    def spoilt(self, namespace: str, key: bytes) -> None:
        super().spoilt(namespace, key)
        for (where, _), keys in self.told.items():
            if where == namespace:
                keys.discard(key)

    def holds(self, namespace: str, key: bytes) -> int | None:
        """Offset of the slot with a chunk; None where the tier does not hold it."""
        slot = self.l1.chunks.get(ChunkId(namespace, key, 0))
        return None if slot is None else slot * self._slot_bytes

    def told_missing(self, copy: tuple[str, str], keys: list[bytes], op_id: int) -> None:
        """A lookup has told that the tier did not hold these. Asked for before a commit that was heard, that is old."""
        if op_id > self._heard.get(copy, 0):
            self.told.get(copy, set()).difference_update(keys)

    def _tell(self, event: TierEvent) -> None:
        """kvtier hears of an event now."""
        if isinstance(event, StateChanged):
            self.told.clear()
            return
        if isinstance(event, Evicted):
            copy = event.namespace, event.program
            gone = self._chains.get(copy, [])[event.resident_chunks :]
            self.told.get(copy, set()).difference_update(gone)
            return
        copy, keys, n_held = self._to_tell.pop(event.op_id, (None, [], 0))
        if copy is None or not isinstance(event, CommitDone):
            return
        told = self.told.setdefault(copy, set())
        told.update(keys[:n_held])
        if event.op_id > self._heard.get(copy, 0):
            # Answers may overtake each other: an old one takes nothing back.
            self._heard[copy] = event.op_id
            told.difference_update(keys[n_held:])
            self._chains[copy] = keys

    def _answer(self, event: TierEvent, after: int | None = None) -> None:
        if after is None and self.max_delay and not self.is_calm:
            after = self._chance.randrange(self.max_delay + 1)
        super()._answer(event, after)

    def _reason(self, what: str) -> str | None:
        if self.is_calm or self._chance.random() >= self.fail_share:
            return None
        return f"{what}_failed"
