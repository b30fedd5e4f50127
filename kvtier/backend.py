"""What the scheduler half needs from a CPU tier: the `TierBackend` contract.

LMCache (`lmcache_bridge`) implements it for engines; replay and the model checker bring virtual ones.

Everything is asynchronous: a call starts something and returns an id, the answer is an event from
`poll()`. No call blocks. Every started operation ends in exactly one event (also when the server is
away: then in `OperationFailed`), except `trim`, `drop` and `mark`, which are fire-and-forget.

Life cycle of a read: `lookup` -> `LookupDone` (hit chunks are locked) -> `trim` to what is loaded, an
empty range unlocks all. Of a write: `reserve` -> `ReserveDone` (slots) -> copy -> `commit` ->
`CommitDone`, whose `resident_chunks` is the only proof that the tier holds the KV (a store is never
believed: DESIGN D4). `Evicted` tells the engine that staged it last when the tier holds less, if it can.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

Activity = Literal["paused", "waiting", "running"]


class TierState(StrEnum):
    """`absent`: no tier is configured. `away`: configured, not reachable now: pin-only."""

    ABSENT = "absent"
    CONNECTING = "connecting"
    READY = "ready"
    AWAY = "away"


@dataclass(frozen=True, slots=True)
class Region:
    """The shared memory that slots point into. A new `generation` means a restarted server."""

    shm_name: str
    size_bytes: int
    generation: str


@dataclass(frozen=True, slots=True)
class LookupDone:
    """Chunks [0, hit_chunks) are resident and locked; `slots[rank][i]` is the offset of chunk i."""

    op_id: int
    generation: str
    hit_chunks: int
    slots: list[list[int]]


@dataclass(frozen=True, slots=True)
class ReserveDone:
    """`slots[rank][i]` is where chunk start+i goes, -1 where it is resident already."""

    op_id: int
    generation: str
    slots: list[list[int]]


@dataclass(frozen=True, slots=True)
class CommitDone:
    """The program's chain is resident for its first `resident_chunks` chunks."""

    op_id: int
    resident_chunks: int


@dataclass(frozen=True, slots=True)
class OperationFailed:
    """The operation did not happen. `reason` is machine-readable and becomes a metric label."""

    op_id: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The tier came or went."""

    state: TierState
    detail: str


@dataclass(frozen=True, slots=True)
class Evicted:
    """Of this program's chain `resident_chunks` are left, counted from its start: the tier had to make room, say."""

    namespace: str
    program: str
    resident_chunks: int


OperationEvent = LookupDone | ReserveDone | CommitDone | OperationFailed
TierEvent = OperationEvent | StateChanged | Evicted


class TierBackend(Protocol):
    """A CPU tier. Used from the scheduler's thread alone."""

    @property
    def state(self) -> TierState:
        """Whether operations can succeed now."""

    @property
    def region(self) -> Region | None:
        """What workers map; None until the tier is ready."""

    @property
    def used_bytes(self) -> int | None:
        """What the chunks of all engines take, as the tier told last; None while that is not known."""

    def lookup(self, namespace: str, program: str, keys: bytes) -> int:
        """Find and lock the longest resident prefix of `keys`. Ends in `LookupDone`."""

    def trim(self, lookup_id: int, keep_from: int, keep_to: int) -> None:
        """Unlock what the lookup holds outside [keep_from, keep_to)."""

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
        """Get slots for chunks [start, end) of the chain. Ends in `ReserveDone`."""

    def commit(self, reserve_id: int, *, ok: bool) -> int:
        """Admit or discard what was written. Ends in `CommitDone`."""

    def drop(self, namespace: str, program: str) -> None:
        """The program is over: free what only it used."""

    def spoilt(self, namespace: str, key: bytes) -> None:
        """A chunk is not what was stored: let nobody find it, whoever's it is."""

    def mark(self, namespace: str, program: str, activity: Activity) -> None:
        """What the program does, and so what its copy is worth.

        `paused`, as after a commit; `waiting`: a turn has come and needs the copy; `running`: a turn has
        the KV in GPU memory, and the copy is of little use.
        """

    def poll(self, now_s: float, wait_s: float = 0.0) -> list[TierEvent]:
        """Events since the last call, in order; waits up to `wait_s` for one if there is none.

        Also drives time-outs and reconnection.
        """

    def close(self) -> None:
        """Leave the tier; engines that stay keep it."""


class NoTier:
    """Pin-only: no tier is configured."""

    state = TierState.ABSENT
    region: Region | None = None
    used_bytes: int | None = None

    def __init__(self) -> None:
        self._next_id = 0
        self._events: list[TierEvent] = []

    def _refuse(self) -> int:
        self._next_id += 1
        self._events.append(OperationFailed(self._next_id, "no_tier", "no CPU tier is configured"))
        return self._next_id

    def lookup(self, namespace: str, program: str, keys: bytes) -> int:  # noqa: ARG002
        """Refuse."""
        return self._refuse()

    def trim(self, lookup_id: int, keep_from: int, keep_to: int) -> None:
        """Nothing is held."""

    def reserve(
        self,
        namespace: str,  # noqa: ARG002
        program: str,  # noqa: ARG002
        keys: bytes,  # noqa: ARG002
        start: int,  # noqa: ARG002
        end: int,  # noqa: ARG002
        value_s: float,  # noqa: ARG002
        lease_s: float,  # noqa: ARG002
    ) -> int:
        """Refuse."""
        return self._refuse()

    def commit(self, reserve_id: int, *, ok: bool) -> int:  # noqa: ARG002
        """Refuse."""
        return self._refuse()

    def drop(self, namespace: str, program: str) -> None:
        """Nothing is held."""

    def spoilt(self, namespace: str, key: bytes) -> None:
        """Nothing is held."""

    def mark(self, namespace: str, program: str, activity: Activity) -> None:
        """Nothing is held."""

    def poll(self, now_s: float, wait_s: float = 0.0) -> list[TierEvent]:  # noqa: ARG002
        """Return the refusals."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Nothing to leave."""
