"""The CPU tier in virtual time: the server module's own bookkeeping, without a server."""

from __future__ import annotations

from typing import Final

from kvtier.backend import (
    Activity,
    CommitDone,
    Evicted,
    LookupDone,
    OperationFailed,
    Region,
    ReserveDone,
    TierEvent,
    TierState,
)
from kvtier.replay.memory_l1 import MemoryL1
from kvtier.server.residency import ResidencyTable

_OWNER: Final = "engine"


class VirtualTier:
    """A `TierBackend` on a real `ResidencyTable`. What is asked is answered by the next `poll`.

    In production an answer takes some 0.2 ms, far less than a step.

    Args:
        n_slots: Chunks that fit.
        slot_bytes: Bytes of a chunk, all GPUs together.

    Attributes:
        table: Which chunks the tier holds, and why.
        l1: Its memory.
    """

    state = TierState.READY

    def __init__(self, n_slots: int, slot_bytes: int) -> None:
        self.region: Region | None = Region("virtual", n_slots * slot_bytes, "1")
        self.l1 = MemoryL1(n_slots)
        self.table = ResidencyTable(self.l1)
        self._slot_bytes = slot_bytes
        self._now_s = 0.0
        self._next_id = 0
        self._answers: list[TierEvent] = []

    @property
    def used_bytes(self) -> int | None:
        """See `TierBackend`."""
        return self.table.counts()["chunks"] * self._slot_bytes

    def lookup(self, namespace: str, program: str, keys: bytes) -> int:
        """See `TierBackend`."""
        op_id = self._take_id()
        hit, slots = self.table.lookup(_OWNER, op_id, namespace, program, keys, 1, self._now_s)
        self._answers.append(LookupDone(op_id, "1", hit, slots))
        return op_id

    def trim(self, lookup_id: int, keep_from: int, keep_to: int) -> None:
        """See `TierBackend`."""
        self.table.trim(_OWNER, lookup_id, keep_from, keep_to)

    def reserve(
        self,
        namespace: str,
        program: str,
        keys: bytes,
        start: int,
        end: int,
        value_s: float,
        lease_s: float,
    ) -> int:
        """See `TierBackend`."""
        op_id = self._take_id()
        slots = self.table.reserve(
            _OWNER,
            op_id,
            namespace,
            program,
            keys,
            start,
            end,
            1,
            self._slot_bytes,
            value_s,
            lease_s,
            self._now_s,
        )
        if slots is None:
            self._answers.append(OperationFailed(op_id, "l1_full", ""))
        else:
            self._answers.append(ReserveDone(op_id, "1", slots))
        for told in self.table.take_shortened(_OWNER):
            self._answers.append(Evicted(*told))
        return op_id

    def commit(self, reserve_id: int, *, ok: bool) -> int:
        """See `TierBackend`."""
        op_id = self._take_id()
        resident = self.table.commit(_OWNER, reserve_id, self._now_s, ok=ok)
        if resident is None:
            self._answers.append(OperationFailed(op_id, "unknown_reservation", str(reserve_id)))
        else:
            self._answers.append(CommitDone(op_id, resident))
        return op_id

    def drop(self, namespace: str, program: str) -> None:
        """See `TierBackend`."""
        self.table.drop(namespace, program)

    def spoilt(self, namespace: str, key: bytes) -> None:
        """See `TierBackend`."""
        self.table.spoilt(namespace, key)

    def mark(self, namespace: str, program: str, activity: Activity) -> None:
        """See `TierBackend`."""
        self.table.mark(_OWNER, namespace, program, activity, self._now_s)

    def poll(self, now_s: float, wait_s: float = 0.0) -> list[TierEvent]:  # noqa: ARG002
        """See `TierBackend`."""
        self._now_s = now_s
        answers, self._answers = self._answers, []
        return answers

    def close(self) -> None:
        """Nothing to leave."""

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id
