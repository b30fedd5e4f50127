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
from itertools import islice
from typing import TYPE_CHECKING

from kvtier.backend import (
    CommitDone,
    OperationEvent,
    OperationFailed,
    ReserveDone,
    TierBackend,
    TierState,
)
from kvtier.block_ids import as_block_ids
from kvtier.orders import Order
from kvtier.turns.stage_jobs import Split, StageJob
from kvtier.turns.staged_copies import StagedCopies
from kvtier.wire import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.block_ids import BlockIds
    from kvtier.chunk_keys import ChunkChain
    from kvtier.gpu_pin import PinTable
    from kvtier.orders import OrderIds, OrderResult
    from kvtier.stats import Stats

ORDER_DEADLINE_S = 10.0
"""A copy order older than this must not touch memory: the server keeps slots 15 s for a lost engine."""

MIN_SPLITS_IN_FLIGHT = 2
IN_FLIGHT_BYTES = 256 << 20
"""Copies that are ordered ahead: some milliseconds of a fast link, so that it never waits for a step."""

TIER_FULL = "l1_full"
"""The tier's reason where it would have to drop something of more value."""

STALL_S = 0.25
STALL_STEPS = 4
"""Staging without progress for so long, and in so many steps, gives its blocks to a request that waits for
them. A healthy tier answers within milliseconds, and a split is copied within tens of them; but both are
only seen between steps, and one long prefill takes longer than that."""


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
        chunk_bytes: int = 0,
        confirmed: Callable[[str, int], None] = lambda program, chunks: None,  # noqa: ARG005
    ) -> None:
        self._tier = tier
        self._pins = pins
        self._stats = stats
        self._chunk_blocks = chunk_blocks
        self._split_chunks = split_chunks
        split_bytes = max(1, split_chunks * chunk_bytes)
        self._max_in_flight = max(MIN_SPLITS_IN_FLIGHT, IN_FLIGHT_BYTES // split_bytes)
        if not chunk_bytes:
            self._max_in_flight = MIN_SPLITS_IN_FLIGHT
        self._order_ids = next_order_id
        self._confirmed = confirmed
        self._jobs: OrderedDict[str, StageJob] = OrderedDict()
        self._jobs_of: dict[str, dict[str, StageJob]] = {}
        self._by_reserve: dict[int, Split] = {}
        self._by_order: dict[int, Split] = {}
        self._by_commit: dict[int, Split] = {}
        self.copies = StagedCopies(tier, namespace)
        self._ready: list[Order] = []
        self._now_s = 0.0
        # When the tier or a worker last did something for staging, or there was nothing to do.
        self._progress_s = 0.0
        self._quiet_steps = 0

    def forget(self, program: str) -> None:
        """The program is over, or what is known of its copies is wrong.

        Its jobs end too, and what they are still told is ignored.
        """
        self.copies.forget(program)
        self._void([job for job in self._active() if job.program == program])

    def forget_all(self) -> None:
        """Nothing is known to be staged any more, and nothing under way will be."""
        self.copies.clear()
        self._void(self._active())

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
        block_ids: Sequence[int] | BlockIds,
        value_s: float,
        lease_s: float,
        *,
        owner: str | None = None,
    ) -> bool:
        """Begin to stage a turn; a job of the same program whose work this one includes gives way.

        Args:
            key: The turn's request id.
            program: Its program.
            chain: Chunk keys of the turn's reusable tokens.
            block_ids: At least `len(chain) * chunk_blocks` blocks, in token order, referenced by the
                caller at the time of the call.
            value_s: What it is worth to have it there, see `Policy.staged_value_s`.
            lease_s: How long that value holds.
            owner: See `PinTable.hold`.

        Returns:
            False when there is nothing to stage.
        """
        done = self.copies.chunks_of(program, chain)
        if done >= len(chain):
            return False
        for other in list(self._jobs_of.get(program, {}).values()):
            end = len(other.chain)
            if end <= len(chain) and (
                end == 0 or other.chain.marks[end - 1] == chain.marks[end - 1]
            ):
                self.cancel(other.key)
        blocks = as_block_ids(block_ids)[: len(chain) * self._chunk_blocks]
        self._pins.hold(f"stage:{key}", blocks, share=key, owner=owner)
        strand = self.copies.strands.take(program, chain)
        job = StageJob(key, program, strand, chain, blocks, value_s, lease_s, done, len(chain))
        self._jobs[key] = self._jobs_of.setdefault(program, {})[key] = job
        return True

    def is_staging(self, key: str) -> bool:
        """Whether a job for this turn is under way."""
        return key in self._jobs

    def cancel(self, key: str) -> None:
        """Give the job's blocks back now; discard what its running copies write."""
        job = self._jobs.get(key)
        if job is not None:
            job.cancelled = True
            self._end(job)

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

    def cancel_one_stalled(self, now_s: float) -> bool:
        """Cancel the youngest job if staging as a whole stands still. False when nothing was.

        A job that only waits its turn is not cancelled: its KV would have to be computed again.
        """
        if self._quiet_steps < STALL_STEPS or now_s - self._progress_s < STALL_S:
            return False
        if not self._jobs:
            return False
        self._stats.count("failures", 1, "stage_stalled")
        self.cancel(next(reversed(self._jobs)))
        return True

    def _progresses(self, now_s: float) -> None:
        self._progress_s, self._quiet_steps = now_s, 0

    def advance(self, now_s: float) -> list[Order]:
        """Start the next splits; returns the copy orders that are ready for the workers."""
        self._now_s = now_s
        self._quiet_steps += 1
        if not self._jobs and not self._ready:
            if not self.busy():
                self._progresses(now_s)
            return []
        if self._tier.state is not TierState.READY:
            for key in list(self._jobs):
                self._stats.count("failures", 1, "stage_no_tier")
                self.cancel(key)
        if self._jobs:
            self._reserve_next()
        ready = [o for o in self._ready if self._order_is_live(o, now_s)]
        self._ready = []
        return ready

    def on_event(self, event: OperationEvent, now_s: float) -> bool:
        """Take an event of the tier; False when it is not staging's."""
        split = self._by_reserve.pop(event.op_id, None)
        if split is not None:
            self._progresses(now_s)
            if isinstance(event, ReserveDone):
                self._reserved(split, event, now_s)
            elif isinstance(event, OperationFailed):
                self._not_reserved(split, event.reason)
            return True
        split = self._by_commit.pop(event.op_id, None)
        if split is not None:
            self._progresses(now_s)
            split.job.n_commits -= 1
            if isinstance(event, OperationFailed):
                self._fail(split.job, event.reason)
            elif isinstance(event, CommitDone) and split.copied:
                self._committed(split, event.resident_chunks)
            return True
        return False

    def on_result(self, result: OrderResult) -> bool:
        """A worker has finished a copy; False when the order is not staging's."""
        split = self._by_order.pop(result.order_id, None)
        if split is None:
            return False
        self._progresses(self._now_s)
        if not result.ok:
            self._fail(split.job, "store_copy")
        self._copied(split, ok=result.ok)
        return True

    # -- internals ---------------------------------------------------------------------------------

    def _void(self, jobs: list[StageJob]) -> None:
        for job in jobs:
            job.void = True
            if not job.cancelled:
                self.cancel(job.key)

    def _active(self) -> list[StageJob]:
        splits = (*self._by_reserve.values(), *self._by_order.values(), *self._by_commit.values())
        return [*self._jobs.values(), *(split.job for split in splits)]

    def _reserve_next(self) -> None:
        """One split of each job in turn, as long as there may be more in flight."""
        in_flight = len(self._by_reserve) + len(self._by_order)
        while in_flight < self._max_in_flight:
            # Of many jobs, those behind the last whose turn it is are not looked at.
            waiting = (job for job in self._jobs.values() if job.next_chunk < job.end_chunk)
            jobs = list(islice(waiting, self._max_in_flight - in_flight))
            if not jobs:
                break
            for job in jobs:
                self._reserve(job)
            in_flight += len(jobs)

    def _reserve(self, job: StageJob) -> None:
        end = min(job.next_chunk + self._split_chunks, job.end_chunk)
        reserve_id = self._tier.reserve(
            self.copies.namespace,
            job.strand,
            bytes(job.chain.keys),
            job.next_chunk,
            end,
            job.value_s,
            job.lease_s,
        )
        split = Split(job, job.next_chunk, end, reserve_id, job.attempt)
        job.next_chunk = end
        job.open.append(split)
        self._by_reserve[reserve_id] = split

    def _reserved(self, split: Split, event: ReserveDone, now_s: float) -> None:
        job = split.job
        if job.cancelled:
            self._copied(split, ok=False)
            return
        if all(slot < 0 for rank in event.slots for slot in rank):
            self._copied(split, ok=True)
            return
        order_id = self._order_ids.take()
        self._by_order[order_id] = split
        first, last = split.start * self._chunk_blocks, split.end * self._chunk_blocks
        self._ready.append(
            Order(
                order_id=order_id,
                direction="store",
                request_id=job.key,
                block_ids=tuple(job.block_ids[first:last].tolist()),
                slots=event.slots,
                chunk_blocks=self._chunk_blocks,
                skip_blocks=0,
                generation=event.generation,
                deadline_s=now_s + ORDER_DEADLINE_S,
                keys=bytes(job.chain.keys[split.start * KEY_BYTES : split.end * KEY_BYTES]),
            )
        )

    def _not_reserved(self, split: Split, reason: str) -> None:
        """There are no slots. Where the tier is full, the job ends here, with what has fitted."""
        job = split.job
        job.open.remove(split)
        if reason != TIER_FULL:
            self._fail(job, reason)
        elif split.attempt == job.attempt and split.start < job.end_chunk:
            if not job.cancelled:
                self._stats.count("failures", 1, f"stage_{reason}")
            job.end_chunk = split.start
        self._commit_in_order(job)
        self._end_if_done(job)

    def _order_is_live(self, order: Order, now_s: float) -> bool:
        split = self._by_order[order.order_id]
        if not split.job.cancelled and now_s < order.deadline_s:
            return True
        del self._by_order[order.order_id]
        self._fail(split.job, "order_expired")
        self._copied(split, ok=False)
        return False

    def _copied(self, split: Split, *, ok: bool) -> None:
        """The split's copy has ended, or there was nothing to copy."""
        # What a cancelled job's copy has read may have been overwritten while it read.
        split.copied = ok and not split.job.cancelled
        self._commit_in_order(split.job)

    def _commit_in_order(self, job: StageJob) -> None:
        while job.open and job.open[0].copied is not None:
            split = job.open.popleft()
            self._by_commit[self._tier.commit(split.reserve_id, ok=bool(split.copied))] = split
            job.n_commits += 1

    def _committed(self, split: Split, resident_chunks: int) -> None:
        job = split.job
        if job.void:
            return
        added = self.copies.confirm(job.strand, job.chain, resident_chunks)
        self._confirmed(job.program, resident_chunks)
        self._stats.count("staged_tokens", added * job.chain.chunk_tokens)
        if resident_chunks < split.end and not job.cancelled:
            # What the tier held before has a hole now: start again from there, once. A split that
            # was reserved before the restart only says the same again.
            if split.attempt and split.attempt == job.attempt:
                self._fail(job, "lost_prefix")
            elif split.attempt == job.attempt:
                job.attempt += 1
                job.next_chunk = resident_chunks
        self._end_if_done(job)

    def _end_if_done(self, job: StageJob) -> None:
        done = job.next_chunk >= job.end_chunk and not job.open and not job.n_commits
        if done and self._jobs.get(job.key) is job:
            self._end(job)

    def _end(self, job: StageJob) -> None:
        del self._jobs[job.key]
        of_program = self._jobs_of[job.program]
        del of_program[job.key]
        if not of_program:
            del self._jobs_of[job.program]
        self._pins.unhold(f"stage:{job.key}")

    def _fail(self, job: StageJob, reason: str) -> None:
        if not job.cancelled:
            self._stats.count("failures", 1, f"stage_{reason}")
            self.cancel(job.key)
