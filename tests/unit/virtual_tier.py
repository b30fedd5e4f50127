"""A CPU tier without a server: `TierBackend` on a real `ResidencyTable` and a fake L1.

Deterministic. A request is served when it is made; its answer comes out of `poll` later, as many
calls later as `answer_after` says, so answers to different requests can overtake nothing but the
caller's own actions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.backend import (
    Activity,
    CommitDone,
    Evicted,
    LookupDone,
    OperationFailed,
    Region,
    ReserveDone,
    StateChanged,
    TierEvent,
    TierState,
)
from kvtier.server.residency import ResidencyTable
from tests.unit.fake_l1 import FakeL1

if TYPE_CHECKING:
    from collections.abc import Callable


class VirtualTier:
    """See the module's docstring.

    Args:
        n_slots: Chunks of one rank that fit.
        ranks: Workers that each hold a part of a chunk.
        slot_bytes: Distance of two slots.
        answer_after: Polls that pass before an answer comes; 0 answers in the next one.

    Raises RuntimeError where it is used after `close`.

    Attributes:
        fail: Asked for each operation (`lookup`, `reserve`, `commit`); a reason fails it.
        dropped: (namespace, program) that were dropped.
        marked: (program, what it does) as it was told.
        table: The server's bookkeeping, replaced when the server restarts.
        l1: The server's memory.
    """

    def __init__(
        self, n_slots: int = 1000, ranks: int = 1, slot_bytes: int = 1, answer_after: int = 0
    ) -> None:
        self.state = TierState.READY
        self.answer_after = answer_after
        self.fail: Callable[[str], str | None] = lambda _: None
        self.dropped: list[tuple[str, str]] = []
        self.marked: list[tuple[str, str]] = []
        self.closed = False
        self._n_slots = n_slots
        self._ranks = ranks
        self._slot_bytes = slot_bytes
        self._generation = 0
        self._session = 0
        self._next_id = 0
        self._polls = 0
        self._now_s = 0.0
        self._answers: list[tuple[int, TierEvent]] = []
        self._started: set[int] = set()
        self._start_server()

    # -- the world ---------------------------------------------------------------------------------

    @property
    def region(self) -> Region:
        return Region("virtual", self._n_slots * self._slot_bytes, str(self._generation))

    @property
    def used_bytes(self) -> int | None:
        if self.state is not TierState.READY:
            return None
        return self.table.counts()["chunks"] * self._slot_bytes

    @property
    def idle(self) -> bool:
        """No answer is out."""
        return not self._answers

    def leaks(self) -> dict[str, int]:
        """Locks and reservations that the server still holds; empty when there are none."""
        counts = self.table.counts()
        return {k: counts[k] for k in ("locked_chunks", "reservations") if counts[k]} | (
            {"l1_locks": sum(self.l1.locks.values())} if self.l1.locks else {}
        )

    def lose(self) -> None:
        """The connection breaks: what is out fails, as in `LMCacheBridge`."""
        if self.state is TierState.AWAY:
            return
        self.state = TierState.AWAY
        told = [(at, e) for at, e in self._answers if isinstance(e, StateChanged)]
        lost = [e for _, e in self._answers if not isinstance(e, StateChanged | Evicted)]
        self._answers = told
        for event in lost:
            self._answer(OperationFailed(event.op_id, "timeout", "lost"), 0)
        self._answer(StateChanged(TierState.AWAY, "timeout: lost"), 0)

    def come_back(self, *, restarted: bool) -> None:
        """The connection is there again, to the same server (after its grace) or to a new one."""
        if self.state is not TierState.AWAY:
            return
        self.state = TierState.READY
        self.table.owner_gone(self._owner)
        self._session += 1
        if restarted:
            self._start_server()
        self._answer(StateChanged(TierState.READY, "back"), 0)

    # -- TierBackend -------------------------------------------------------------------------------

    def lookup(self, namespace: str, program: str, keys: bytes) -> int:
        op_id, refused = self._begin("lookup")
        if not refused:
            hit, slots = self.table.lookup(
                self._owner, op_id, namespace, program, keys, self._ranks, self._now_s
            )
            self._answer(LookupDone(op_id, self.region.generation, hit, slots))
        return op_id

    def trim(self, lookup_id: int, keep_from: int, keep_to: int) -> None:
        self._check_open()
        if self.state is TierState.READY:
            self.table.trim(self._owner, lookup_id, keep_from, keep_to)

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
        op_id, refused = self._begin("reserve")
        if refused:
            return op_id
        slots = self.table.reserve(
            self._owner,
            op_id,
            namespace,
            program,
            keys,
            start,
            end,
            self._ranks,
            self._slot_bytes,
            value_s,
            lease_s,
            self._now_s,
        )
        if slots is None:
            self._answer(OperationFailed(op_id, "l1_full", ""))
        else:
            self._answer(ReserveDone(op_id, self.region.generation, slots))
        for shortened in self.table.take_shortened(self._owner):
            self._answer(Evicted(*shortened))
        return op_id

    def commit(self, reserve_id: int, *, ok: bool) -> int:
        op_id, refused = self._begin("commit")
        if refused:
            # The server sees that a failed commit's reservation is over, when the session ends.
            self.table.commit(self._owner, reserve_id, self._now_s, ok=False)
            return op_id
        resident = self.table.commit(self._owner, reserve_id, self._now_s, ok=ok)
        if resident is None:
            self._answer(OperationFailed(op_id, "unknown_reservation", str(reserve_id)))
        else:
            self._answer(CommitDone(op_id, resident))
        return op_id

    def drop(self, namespace: str, program: str) -> None:
        self._check_open()
        self.dropped.append((namespace, program))
        if self.state is TierState.READY:
            self.table.drop(namespace, program)

    def spoilt(self, namespace: str, key: bytes) -> None:
        self._check_open()
        if self.state is TierState.READY:
            self.table.spoilt(namespace, key)

    def mark(self, namespace: str, program: str, activity: Activity) -> None:
        self._check_open()
        self.marked.append((program, activity))
        if self.state is TierState.READY:
            self.table.mark(self._owner, namespace, program, activity, self._now_s)

    def poll(self, now_s: float, wait_s: float = 0.0) -> list[TierEvent]:
        self._check_open()
        self._now_s = now_s
        self._polls += 1
        due = [event for at, event in self._answers if at < self._polls]
        self._answers = [(at, event) for at, event in self._answers if at >= self._polls]
        for event in due:
            if not isinstance(event, StateChanged | Evicted):
                # Every operation ends in exactly one event.
                self._started.remove(event.op_id)
        return due

    def close(self) -> None:
        self.closed = True
        # As `LMCacheBridge`: who looks is told that nobody is there.
        self.state = TierState.AWAY

    # -- internals ---------------------------------------------------------------------------------

    @property
    def _owner(self) -> str:
        return f"engine/{self._session}"

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the tier was closed")

    def _start_server(self) -> None:
        self._generation += 1
        self.l1 = FakeL1(self._n_slots)
        self.table = ResidencyTable(self.l1)

    def _begin(self, operation: str) -> tuple[int, bool]:
        """A new operation's id, and whether it was refused (then its event is on the way)."""
        self._check_open()
        self._next_id += 1
        self._started.add(self._next_id)
        if self.state is not TierState.READY:
            self._answer(OperationFailed(self._next_id, f"tier_{self.state}", "not connected"), 0)
            return self._next_id, True
        reason = self.fail(operation)
        if reason is not None:
            self._answer(OperationFailed(self._next_id, reason, "injected"))
        return self._next_id, reason is not None

    def _answer(self, event: TierEvent, after: int | None = None) -> None:
        after = self.answer_after if after is None else after
        self._answers.append((self._polls + after, event))
