"""Staging: copying a paused program's KV to the CPU tier, piece by piece.

A job is one finished turn. It holds references on its blocks while it reads them, and goes through its
chunks in splits, so that a large program fits a tier that makes room as it goes and can be given up in
between. For each split: reserve slots, copy, commit. What counts as staged is only what a commit has
confirmed to be resident.

A job can be cancelled at any time (pressure, reset, a newer turn): its blocks are given back at once. A
copy that is under way then reads blocks that may be overwritten, which is harmless because its
reservation is discarded.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtier.backend import (
    CommitDone,
    OperationEvent,
    OperationFailed,
    ReserveDone,
    TierBackend,
    TierState,
)
from kvtier.orders import Order

if TYPE_CHECKING:
    from kvtier.chunk_keys import ChunkChain
    from kvtier.gpu_pin import PinTable
    from kvtier.orders import OrderResult
    from kvtier.stats import Stats

ORDER_DEADLINE_S = 10.0
"""A copy order older than this must not touch memory: the server keeps slots 15 s for a lost engine."""

MAX_SPLITS_IN_FLIGHT = 2


@dataclass(slots=True)
class _Split:
    start: int
    end: int
    reserve_id: int
    attempt: int


@dataclass(slots=True)
class StageJob:
    """One finished turn on its way to the CPU tier.

    `void`: what it has stored is of no use any more, whatever a late commit says. `attempt` counts
    restarts after a hole was found in what the tier held before.
    """

    key: str
    program: str
    chain: ChunkChain
    block_ids: tuple[int, ...]
    value_s: float
    lease_s: float
    next_chunk: int
    cancelled: bool = False
    void: bool = False
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Staged:
    """A program's confirmed KV in the tier: the first `n_chunks` chunks of `chain`."""

    chain: ChunkChain
    n_chunks: int


class Stager:
    """All staging jobs of an engine. Used from connector hooks only."""

    def __init__(
        self,
        tier: TierBackend,
        pins: PinTable,
        stats: Stats,
        *,
        namespace: str,
        chunk_blocks: int,
        split_chunks: int,
        next_order_id: OrderIds,
    ) -> None:
        self._tier = tier
        self._pins = pins
        self._stats = stats
        self.namespace = namespace
        self._chunk_blocks = chunk_blocks
        self._split_chunks = split_chunks
        self._order_ids = next_order_id
        self._jobs: OrderedDict[str, StageJob] = OrderedDict()
        self._by_reserve: dict[int, tuple[StageJob, _Split]] = {}
        self._by_order: dict[int, tuple[StageJob, _Split]] = {}
        self._by_commit: dict[int, tuple[StageJob, _Split, bool]] = {}
        self._staged: dict[str, Staged] = {}
        self._ready: list[Order] = []

    # -- what is staged ----------------------------------------------------------------------------

    def staged_chunks(self, program: str, chain: ChunkChain) -> int:
        """How many leading chunks of `chain` the tier has confirmed for this program."""
        staged = self._staged.get(program)
        if staged is None:
            return 0
        n_common = 0
        limit = min(staged.n_chunks, len(chain), len(staged.chain))
        while n_common < limit and staged.chain.marks[n_common] == chain.marks[n_common]:
            n_common += 1
        return n_common

    def confirmed_chunks(self, program: str) -> int:
        """Chunks of the program's last staged chain that the tier has confirmed."""
        staged = self._staged.get(program)
        return staged.n_chunks if staged is not None else 0

    def forget(self, program: str) -> None:
        """The program is over: its jobs end too, and what they are still told is ignored."""
        self._staged.pop(program, None)
        self._void([job for job in self._active() if job.program == program])

    def forget_all(self) -> None:
        """Nothing is known to be staged any more, and nothing under way will be."""
        self._staged.clear()
        self._void(self._active())

    def correct(self, program: str, chain: ChunkChain, resident_chunks: int) -> None:
        """A lookup of `chain` has seen how much of it is really there.

        Only what the chain shares with the staged one tells: a sub-agent's prompt may share little.
        """
        if resident_chunks < self.staged_chunks(program, chain):
            self._staged[program] = Staged(self._staged[program].chain, resident_chunks)

    # -- jobs --------------------------------------------------------------------------------------

    @property
    def n_jobs(self) -> int:
        """Jobs not finished, cancelled ones whose copies still run included."""
        return len({id(job) for job in self._active()})

    def busy(self) -> bool:
        """Whether the engine must keep stepping for staging's sake."""
        return bool(
            self._jobs or self._by_reserve or self._by_order or self._by_commit or self._ready
        )

    def start(
        self,
        key: str,
        program: str,
        chain: ChunkChain,
        block_ids: tuple[int, ...],
        value_s: float,
        lease_s: float,
    ) -> bool:
        """Begin to stage a turn; a job of the same program whose work this one includes gives way.

        Args:
            key: The turn's request id.
            program: Its program.
            chain: Chunk keys of the turn's reusable tokens.
            block_ids: At least `len(chain) * chunk_blocks` blocks, in token order, referenced by the
                caller at the time of the call.
            value_s: Expected loss, in seconds, if the KV were not there at the program's return.
            lease_s: How long that value holds.

        Returns:
            False when there is nothing to stage.
        """
        done = self.staged_chunks(program, chain)
        if done >= len(chain):
            return False
        for other in [j for j in self._jobs.values() if j.program == program]:
            end = len(other.chain)
            if end <= len(chain) and (
                end == 0 or other.chain.marks[end - 1] == chain.marks[end - 1]
            ):
                self.cancel(other.key)
        blocks = tuple(block_ids[: len(chain) * self._chunk_blocks])
        self._pins.hold(f"stage:{key}", blocks)
        self._jobs[key] = StageJob(key, program, chain, blocks, value_s, lease_s, done)
        return True

    def cancel(self, key: str) -> None:
        """Give the job's blocks back now; discard what its running copies write."""
        job = self._jobs.pop(key, None)
        if job is None:
            return
        job.cancelled = True
        self._pins.unhold(f"stage:{key}")

    def cancel_all(self) -> None:
        """Cancel every job."""
        for key in list(self._jobs):
            self.cancel(key)

    def cancel_one_for_room(self) -> bool:
        """Under memory pressure: cancel the youngest job. False when there is none."""
        if not self._jobs:
            return False
        self._stats.count("failures", 1, "stage_cancelled_pressure")
        self.cancel(next(reversed(self._jobs)))
        return True

    def advance(self, now_s: float) -> list[Order]:
        """Start the next splits; returns the copy orders that are ready for the workers."""
        if self._tier.state is not TierState.READY:
            for key in list(self._jobs):
                self._stats.count("failures", 1, "stage_no_tier")
                self.cancel(key)
        for job in list(self._jobs.values()):
            in_flight = len(self._by_reserve) + len(self._by_order)
            if in_flight >= MAX_SPLITS_IN_FLIGHT:
                break
            if job.next_chunk < len(job.chain):
                self._reserve(job)
        ready = [o for o in self._ready if self._order_is_live(o, now_s)]
        self._ready = []
        return ready

    def on_event(self, event: OperationEvent, now_s: float) -> bool:
        """Take an event of the tier; False when it is not staging's."""
        if event.op_id in self._by_reserve:
            job, split = self._by_reserve.pop(event.op_id)
            if isinstance(event, ReserveDone):
                self._reserved(job, split, event, now_s)
            elif isinstance(event, OperationFailed):
                self._fail(job, event.reason)
            return True
        if event.op_id in self._by_commit:
            job, split, ok = self._by_commit.pop(event.op_id)
            if isinstance(event, CommitDone):
                if ok:
                    self._committed(job, split, event.resident_chunks)
            elif isinstance(event, OperationFailed):
                self._fail(job, event.reason)
            return True
        return False

    def on_result(self, result: OrderResult) -> bool:
        """A worker has finished a copy; False when the order is not staging's."""
        entry = self._by_order.pop(result.order_id, None)
        if entry is None:
            return False
        job, split = entry
        if not result.ok:
            self._fail(job, "store_copy")
        ok = result.ok and not job.cancelled
        self._by_commit[self._tier.commit(split.reserve_id, ok=ok)] = (job, split, ok)
        return True

    # -- internals ---------------------------------------------------------------------------------

    def _void(self, jobs: list[StageJob]) -> None:
        for job in jobs:
            job.void = True
            if not job.cancelled:
                self.cancel(job.key)

    def _active(self) -> list[StageJob]:
        running = [job for job, _ in (*self._by_reserve.values(), *self._by_order.values())]
        return [*self._jobs.values(), *running, *(job for job, _, _ in self._by_commit.values())]

    def _reserve(self, job: StageJob) -> None:
        end = min(job.next_chunk + self._split_chunks, len(job.chain))
        reserve_id = self._tier.reserve(
            self.namespace,
            job.program,
            bytes(job.chain.keys),
            job.next_chunk,
            end,
            job.value_s,
            job.lease_s,
        )
        split = _Split(job.next_chunk, end, reserve_id, job.attempt)
        job.next_chunk = end
        self._by_reserve[reserve_id] = (job, split)

    def _reserved(self, job: StageJob, split: _Split, event: ReserveDone, now_s: float) -> None:
        if job.cancelled:
            self._by_commit[self._tier.commit(split.reserve_id, ok=False)] = (job, split, False)
            return
        if all(slot < 0 for rank in event.slots for slot in rank):
            self._by_commit[self._tier.commit(split.reserve_id, ok=True)] = (job, split, True)
            return
        order_id = self._order_ids.take()
        self._by_order[order_id] = (job, split)
        first, last = split.start * self._chunk_blocks, split.end * self._chunk_blocks
        self._ready.append(
            Order(
                order_id=order_id,
                direction="store",
                request_id=job.key,
                block_ids=job.block_ids[first:last],
                slots=event.slots,
                chunk_blocks=self._chunk_blocks,
                skip_blocks=0,
                generation=event.generation,
                deadline_s=now_s + ORDER_DEADLINE_S,
            )
        )

    def _order_is_live(self, order: Order, now_s: float) -> bool:
        job, split = self._by_order[order.order_id]
        if not job.cancelled and now_s < order.deadline_s:
            return True
        del self._by_order[order.order_id]
        self._fail(job, "order_expired")
        self._by_commit[self._tier.commit(split.reserve_id, ok=False)] = (job, split, False)
        return False

    def _committed(self, job: StageJob, split: _Split, resident_chunks: int) -> None:
        if job.void:
            return
        done = self._staged.get(job.program)
        before = 0 if done is None else done.n_chunks
        self._staged[job.program] = Staged(job.chain, resident_chunks)
        self._stats.count(
            "staged_tokens", max(0, resident_chunks - before) * job.chain.chunk_tokens
        )
        if resident_chunks < split.end and not job.cancelled:
            # What the tier held before has a hole now: start again from there, once. A split that
            # was reserved before the restart only says the same again.
            if split.attempt < job.attempt:
                return
            if job.attempt:
                self._fail(job, "lost_prefix")
                return
            job.attempt += 1
            job.next_chunk = resident_chunks
            return
        finished = job.next_chunk >= len(job.chain) and resident_chunks >= len(job.chain)
        if finished and self._jobs.get(job.key) is job:
            del self._jobs[job.key]
            self._pins.unhold(f"stage:{job.key}")

    def _fail(self, job: StageJob, reason: str) -> None:
        if not job.cancelled:
            self._stats.count("failures", 1, f"stage_{reason}")
            self.cancel(job.key)


class OrderIds:
    """Ids of copy orders, unique in an engine."""

    def __init__(self) -> None:
        self._last = 0

    def take(self) -> int:
        """A new id."""
        self._last += 1
        return self._last
