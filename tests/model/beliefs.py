"""Invariant 3: what kvtier believes of the CPU tier is what the tier's answers have told it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.wire import split_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.chunk_keys import ChunkChain
    from kvtier.turns.reading import TierReader
    from kvtier.turns.stage_jobs import StageJob
    from tests.model.life import Life
    from tests.model.tier import UnreliableTier


class Beliefs:
    """See the module's docstring.

    kvtier may believe in a chunk that the tier held when it answered a commit, until it hears otherwise: that the
    tier has gone or come, that a later commit or lookup has found less, that it has dropped the copy itself. What is
    evicted in between is news under way, and so is a loss that it has not been told of: they are allowed.

    Args:
        life: Whose beliefs are looked at.
        tier: What they are about.
    """

    def __init__(self, life: Life, tier: UnreliableTier) -> None:
        self._half = life.half
        self._tier = tier
        self._copies = life.half.stager.copies
        # By turn, its last job and the chunk that that began with.
        self._began: dict[str, tuple[StageJob, int]] = {}
        turns = life.half._turns
        self._follow(life.half.reader, lambda request_id: turns[request_id].program)
        # A prefetch asks by the name of its program.
        self._follow(life.half.prefetcher._lookups._reader, lambda program: program)

    def unfounded(self) -> str:
        """What counts as staged and should not; empty where there is nothing."""
        for strand, staged in self._copies._staged.items():
            if untold := self._untold([strand], staged.chain, staged.n_chunks):
                return f"3: chunks {untold} count as staged, and the tier does not say so"
        return ""

    def began(self, job: StageJob) -> None:
        """A turn is to be staged."""
        self._began[job.key] = job, job.next_chunk

    def given_up(self, job: StageJob) -> str:
        """Why a turn that was staged should not have been given up as such; empty where it should."""
        known, first_chunk = self._began.pop(job.key)
        assert known is job
        if job.end_chunk <= first_chunk:
            # None of its own chunks has fitted: it was given up as what has no room.
            return ""
        # It may have begun behind what another conversation of its program had staged.
        names = [job.strand, *self._copies.strands.names(job.program)]
        untold = self._untold(names, job.chain, job.end_chunk)
        return f"3: given up as staged, and the tier does not say so of {untold}" if untold else ""

    def _untold(self, names: list[str], chain: ChunkChain, n_chunks: int) -> list[int]:
        namespace = self._copies.namespace
        told = set().union(*(self._tier.told.get((namespace, name), ()) for name in names))
        keys = split_keys(bytes(chain.keys))[:n_chunks]
        return [i for i, key in enumerate(keys) if key not in told]

    def _follow(self, reader: TierReader, program_of: Callable[[str], str]) -> None:
        """A lookup's answer is heard by whom it was for when it is asked for."""
        hit_chunks = reader.hit_chunks

        def heard(request_id: str) -> int | None:
            hit, read = hit_chunks(request_id), reader._reads[request_id]
            # A lookup that has failed, or whose tier was lost, tells nothing.
            if hit is not None and read.slots:
                missing = split_keys(read.keys)[hit:]
                for name in self._copies.strands.names(program_of(request_id)):
                    self._tier.told_missing((reader.namespace, name), missing, read.op_id)
            return hit

        reader.hit_chunks = heard  # type: ignore[method-assign]
