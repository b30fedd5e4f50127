"""A CPU tier in memory, for the scheduler half: keeps the `TierBackend` contract, without a server.

Slots are numbers. Room is made by dropping the least recently used chunks that nobody has locked,
so a slot is given to other KV as soon as it may be.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

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
from kvtier.wire import KEY_BYTES

Chunk = tuple[str, bytes]


@dataclass(slots=True)
class _Reservation:
    chain: list[Chunk]
    end: int
    slots: dict[Chunk, int]


class VirtualTier:
    """See the module's docstring.

    Args:
        n_slots: Chunks that fit.
        answer_after: Calls of `poll` until an answer comes; 0 answers in the next one. Also an
            attribute: it holds for what is asked from then on.

    Raises RuntimeError where it is used after `close`.
    """

    region: Region | None = Region("virtual", 1 << 30, "1")
    used_bytes: int | None = None

    def __init__(self, n_slots: int = 1000, answer_after: int = 0) -> None:
        self.state = TierState.READY
        self.dropped: list[str] = []
        self.answer_after = answer_after
        self._free = list(range(n_slots))
        self._resident: OrderedDict[Chunk, int] = OrderedDict()
        self._locks: Counter[Chunk] = Counter()
        self._lookups: dict[int, list[Chunk]] = {}
        self._reservations: dict[int, _Reservation] = {}
        self._answers: list[tuple[int, TierEvent]] = []
        self._next_id = 0
        self._polls = 0
        self._closed = False

    @property
    def locked_chunks(self) -> int:
        """Chunks that a lookup holds."""
        return sum(count > 0 for count in self._locks.values())

    @property
    def open_reservations(self) -> int:
        """Reservations that were not committed."""
        return len(self._reservations)

    @property
    def resident_chunks(self) -> int:
        """Chunks that the tier holds."""
        return len(self._resident)

    def lose(self) -> None:
        """The server went away with all it held."""
        self.state = TierState.AWAY
        self._resident.clear()
        self._locks.clear()
        self._lookups.clear()
        self._reservations.clear()
        self._answers = [
            (
                due,
                event
                if isinstance(event, StateChanged | Evicted)
                else OperationFailed(event.op_id, "away", ""),
            )
            for due, event in self._answers
        ]
        self._answer(StateChanged(TierState.AWAY, "lost"))

    def come_back(self, n_slots: int) -> None:
        """A new server, empty, with a new region."""
        self.state = TierState.READY
        self._free = list(range(n_slots))
        assert self.region is not None
        generation = str(int(self.region.generation) + 1)
        self.region = Region("virtual", 1 << 30, generation)
        self._answer(StateChanged(TierState.READY, "back"))

    # -- TierBackend -------------------------------------------------------------------------------

    def lookup(self, namespace: str, program: str, keys: bytes) -> int:
        del program
        op_id = self._take_id()
        if self.state is not TierState.READY:
            return self._refuse(op_id, "away")
        hit: list[Chunk] = []
        for chunk in _split(namespace, keys):
            if chunk not in self._resident:
                break
            self._resident.move_to_end(chunk)
            hit.append(chunk)
        self._locks.update(hit)
        self._lookups[op_id] = hit
        slots = [[self._resident[chunk] for chunk in hit]]
        self._answer(LookupDone(op_id, self._generation, len(hit), slots))
        return op_id

    def trim(self, lookup_id: int, keep_from: int, keep_to: int) -> None:
        self._check_open()
        held = self._lookups.pop(lookup_id, [])
        kept = held[keep_from:keep_to]
        self._locks.subtract(held)
        self._locks.update(kept)
        if kept:
            self._lookups[lookup_id] = kept

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
        del program, value_s, lease_s
        op_id = self._take_id()
        if self.state is not TierState.READY:
            return self._refuse(op_id, "away")
        chain = _split(namespace, keys)
        wanted = [chunk for chunk in chain[start:end] if chunk not in self._resident]
        protected = set(chain)
        while len(self._free) < len(wanted):
            victim = next(
                (c for c in self._resident if self._locks[c] <= 0 and c not in protected), None
            )
            if victim is None:
                return self._refuse(op_id, "l1_full")
            self._free.append(self._resident.pop(victim))
        slots = {chunk: self._free.pop() for chunk in wanted}
        self._reservations[op_id] = _Reservation(chain, end, slots)
        told = [[slots.get(chunk, -1) for chunk in chain[start:end]]]
        self._answer(ReserveDone(op_id, self._generation, told))
        return op_id

    def commit(self, reserve_id: int, *, ok: bool) -> int:
        op_id = self._take_id()
        reservation = self._reservations.pop(reserve_id, None)
        if reservation is None:
            return self._refuse(op_id, "unknown")
        for chunk, slot in reservation.slots.items():
            if ok and chunk not in self._resident:
                self._resident[chunk] = slot
            else:
                self._free.append(slot)
        resident = 0
        if ok:
            for chunk in reservation.chain[: reservation.end]:
                if chunk not in self._resident:
                    break
                resident += 1
        self._answer(CommitDone(op_id, resident))
        return op_id

    def drop(self, namespace: str, program: str) -> None:
        self._check_open()
        del namespace
        self.dropped.append(program)

    def spoilt(self, namespace: str, key: bytes) -> None:
        self._check_open()
        raise AssertionError(f"{key!r} of {namespace} is what was stored")

    def mark(self, namespace: str, program: str, activity: Activity) -> None:
        self._check_open()
        del namespace, program, activity

    def poll(self, now_s: float, wait_s: float = 0.0) -> list[TierEvent]:
        self._check_open()
        del now_s, wait_s
        self._polls += 1
        due = [event for at, event in self._answers if at < self._polls]
        self._answers = [(at, event) for at, event in self._answers if at >= self._polls]
        return due

    def close(self) -> None:
        self._closed = True
        self.state = TierState.AWAY

    # -- internals ---------------------------------------------------------------------------------

    @property
    def _generation(self) -> str:
        assert self.region is not None
        return self.region.generation

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the tier was closed")

    def _take_id(self) -> int:
        self._check_open()
        self._next_id += 1
        return self._next_id

    def _refuse(self, op_id: int, reason: str) -> int:
        self._answer(OperationFailed(op_id, reason, ""))
        return op_id

    def _answer(self, event: TierEvent) -> None:
        self._answers.append((self._polls + self.answer_after, event))


def _split(namespace: str, keys: bytes) -> list[Chunk]:
    return [(namespace, keys[i : i + KEY_BYTES]) for i in range(0, len(keys), KEY_BYTES)]
