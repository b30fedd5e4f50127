"""What the tier holds of the turns that are prefetched: asked, locked until all is copied, given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.turns.reading import TierReader
from kvtier.turns.returns import LOOKUP_DEADLINE_S

if TYPE_CHECKING:
    from kvtier.backend import OperationEvent, TierBackend
    from kvtier.chunk_keys import ChunkChain
    from kvtier.orders import OrderIds
    from kvtier.stats import Stats
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.prefetching.jobs import Prefetch
    from kvtier.turns.staged_copies import StagedCopies


class PrefetchLookups:
    """See the module's docstring. One question a program at a time."""

    def __init__(
        self,
        facts: EngineFacts,
        tier: TierBackend,
        copies: StagedCopies,
        stats: Stats,
        order_ids: OrderIds,
    ) -> None:
        self._facts = facts
        self._copies = copies
        self._stats = stats
        # Of its own: what it asks is no request's.
        self._reader = TierReader(
            tier,
            stats,
            namespace=copies.namespace,
            block_tokens=facts.block_tokens,
            chunk_blocks=facts.chunk_blocks,
            order_ids=order_ids,
        )

    @property
    def n_open(self) -> int:
        """Questions without an answer, whether somebody still waits for it or not."""
        return self._reader.n_questions

    def ask(self, prefetch: Prefetch) -> None:
        """Ask for all that is wanted."""
        strand = self._copies.strands.find(prefetch.program, prefetch.turn.chain)
        self._reader.ask(prefetch.program, strand, self._wanted(prefetch))

    def answer(self, prefetch: Prefetch, now_s: float) -> str:
        """Take the answer in, if it has come: why the prefetch cannot go on, or an empty string."""
        hit_chunks = self._reader.hit_chunks(prefetch.program)
        if hit_chunks is None:
            if now_s - prefetch.begun_s < LOOKUP_DEADLINE_S:
                return ""
            self._stats.count("failures", 1, "prefetch_lookup_late")
            return "lookup_late"
        per_chunk = self._facts.chunk_blocks
        self._copies.correct(prefetch.program, self._wanted(prefetch), hit_chunks)
        prefetch.end_block = min(prefetch.end_block, hit_chunks * per_chunk)
        first = min(prefetch.next_block // per_chunk, hit_chunks)
        last = max(first, prefetch.end_block // per_chunk)
        prefetch.found = self._reader.take(prefetch.program, first, last)
        return "" if prefetch.next_block < prefetch.end_block else "no_kv"

    def on_event(self, event: OperationEvent) -> bool:
        """Take an event of the tier; False when it is not a prefetch's."""
        return self._reader.on_event(event)

    def stopped(self, prefetch: Prefetch) -> None:
        """Nobody waits for the answer any more."""
        self._reader.release(prefetch.program)

    def unlock(self, prefetch: Prefetch) -> None:
        """All is copied that will be."""
        if prefetch.found is not None:
            self._reader.unlock(prefetch.found)

    def tier_lost(self) -> None:
        """What is locked is no longer ours."""
        self._reader.tier_lost()

    def new_epoch(self, namespace: str) -> None:
        """KV of other weights from now on."""
        self._reader.namespace = namespace

    def _wanted(self, prefetch: Prefetch) -> ChunkChain:
        return prefetch.turn.chain.head(prefetch.end_block // self._facts.chunk_blocks)
