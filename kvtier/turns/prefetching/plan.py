"""Whether a prefetch begins, and how much of the turn it is to bring: what the caller is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from kvtier.backend import TierBackend, TierState
from kvtier.block_ids import as_block_ids
from kvtier.turns.live_mode import LiveMode, Mode
from kvtier.turns.prefetching.jobs import Piece, Prefetch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from kvtier.gpu_pin import PinTable
    from kvtier.policy import Policy
    from kvtier.turns.block_pool import VllmBlockPool
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.paused_turns import PausedTurn, PausedTurns
    from kvtier.turns.prefetching.pins import PrefetchPins
    from kvtier.turns.staged_copies import StagedCopies

MAX_PREFETCHES: Final = 16
"""Under way at a time: each has chunks locked in the tier, which then cannot make room."""

HEADROOM_SHARE: Final = 32
"""One of so many GPU blocks stays free for running requests, which grow while pieces are on their way."""

Answer = tuple[str, str, str]
"""Outcome (accepted, clipped, rejected, missing), reason, and figures for people."""


class Wish(NamedTuple):
    """For how long a prefetched turn is to be pinned.

    Attributes:
        ttl_s: Seconds from now; None to go by how long programs stay away.
        is_explicit: A client has named it: it is told where it gets another one.
    """

    ttl_s: float | None = None
    is_explicit: bool = False


class Spare:
    """Blocks that a prefetch may take.

    Args:
        is_short: Whether an allocation has failed that has not succeeded since.
        waiting_tokens: Of the requests that wait for their first blocks.
    """

    def __init__(
        self,
        facts: EngineFacts,
        pool: VllmBlockPool,
        pins: PinTable,
        is_short: Callable[[], bool],
        waiting_tokens: Callable[[], int],
    ) -> None:
        self._facts = facts
        self._pool = pool
        self._pins = pins
        self._is_short = is_short
        self._waiting_tokens = waiting_tokens
        self._headroom_blocks = max(1, pool.n_blocks // HEADROOM_SHARE)

    def memory_blocks(self) -> int:
        """Free blocks that nobody else needs."""
        if self._is_short():
            return 0
        waiting = self._facts.blocks_of(self._waiting_tokens())
        return self._pool.n_free - self._headroom_blocks - waiting

    def budget_blocks(self, coming: int) -> int:
        """Blocks that can be pinned besides those that are, and `coming` ones."""
        return self._pins.budget_blocks - self._pins.pinned_blocks - coming


class Planner:
    """See the module's docstring.

    Args:
        is_active: Whether a turn of the program is under way.
    """

    def __init__(
        self,
        facts: EngineFacts,
        tier: TierBackend,
        pool: VllmBlockPool,
        pins: PinTable,
        copies: StagedCopies,
        policy: Policy,
        mode: LiveMode,
        paused: PausedTurns,
        pinning: PrefetchPins,
        spare: Spare,
        is_active: Callable[[str], bool],
    ) -> None:
        self._facts = facts
        self._tier = tier
        self._pool = pool
        self._pins = pins
        self._copies = copies
        self._policy = policy
        self._mode = mode
        self._paused = paused
        self._pinning = pinning
        self._spare = spare
        self._is_active = is_active

    def plan(
        self,
        program: str,
        now_s: float,
        wish: Wish,
        going: Mapping[str, Prefetch],
        in_flight: Collection[Piece],
    ) -> tuple[Answer, Prefetch | None]:
        """The answer, and the prefetch where something is to be loaded. What GPU memory holds is pinned.

        Args:
            program: Handle of the program.
            now_s: Monotonic time.
            wish: For how long it is to be pinned.
            going: The prefetches that are under way, by program.
            in_flight: The pieces that copies write now, of stopped ones too.
        """
        known = self._known(program, now_s, wish, going, in_flight)
        if known is not None:
            return known, None
        turn = self._paused.get(program)
        pin = self._pins.get(turn.request_id) if turn is not None else None
        if turn is None or (pin is not None and pin.program != program):
            return ("missing", "no_kv", "no paused turn of the program is known"), None
        here = pin.block_ids if pin is not None else as_block_ids(())
        more = self._pool.cached_prefix(turn.hashes_from(len(here), turn.n_blocks))
        n_here, end = len(here) + len(more), self._staged_blocks(program, turn)
        if not n_here and not end:
            if self._tier.state is not TierState.READY:
                return ("rejected", "no_tier", f"the CPU tier is {self._tier.state}"), None
            return ("missing", "no_kv", "neither GPU memory nor CPU tier holds KV of it"), None
        end = max(end, n_here)
        granted = self._pinning.granted(program, turn, end, wish.ttl_s, now_s, pin)
        if granted.ttl_s <= 0:
            return ("rejected", "ttl", f"its TTL is 0: {granted.limit or 'asked for'}"), None
        miss_s = self._miss_s(end * self._facts.block_tokens)
        prefetch = Prefetch(program, turn, now_s, now_s + granted.ttl_s, miss_s, n_here, end)
        if wish.is_explicit:
            prefetch.asked_until_s = prefetch.deadline_s
        if pin is not None:
            self._pinning.adopt(prefetch, pin)
        refused = self._pinning.grow(prefetch, more, now_s) if len(more) else ""
        if refused:
            told = "no place for all of it among the pins"
            return ("rejected" if pin is None else "clipped", refused, told), None
        planned = sum(other.end_block - other.next_block for other in going.values())
        coming = sum(len(piece.block_ids) for piece in in_flight)
        payable = self._pinning.affordable_blocks(prefetch, now_s)
        prefetch.end_block, limit = self._affordable(n_here, end, planned, coming, payable)
        told = self._told(prefetch, turn.n_blocks)
        if wish.is_explicit:
            limit = limit or granted.limit
        if prefetch.end_block > n_here:
            return (("clipped", limit, told) if limit else ("accepted", "loading", told)), prefetch
        if not limit:
            return ("accepted", "in_gpu", told), None
        return ("clipped" if n_here else "rejected", limit, told), None

    def _known(
        self,
        program: str,
        now_s: float,
        wish: Wish,
        going: Mapping[str, Prefetch],
        in_flight: Collection[Piece],
    ) -> Answer | None:
        """The answer that does not depend on what is where."""
        if self._mode.mode is not Mode.ON:
            return "rejected", "mode", f"kvtier is {self._mode.mode}"
        if self._is_active(program):
            return "rejected", "running", "a turn of the program is under way"
        if program in going:
            return self._under_way(going[program], wish, now_s)
        if any(piece.prefetch.program == program for piece in in_flight):
            # They would be loaded twice, into one pin.
            return "rejected", "busy", "copies of an earlier prefetch of it have not ended"
        if len(going) >= MAX_PREFETCHES:
            return "rejected", "busy", f"{MAX_PREFETCHES} prefetches are under way"
        return None

    def _under_way(self, prefetch: Prefetch, wish: Wish, now_s: float) -> Answer:
        """It is being loaded already; a time that a client has named holds instead of the one before."""
        told = "it is being loaded already"
        if not wish.is_explicit or prefetch.is_pinned:
            return "accepted", "under_way", told
        granted = self._pinning.granted(
            prefetch.program, prefetch.turn, prefetch.end_block, wish.ttl_s, now_s, None
        )
        if granted.ttl_s <= 0:
            return "rejected", "ttl", f"its TTL is 0: {granted.limit or 'asked for'}"
        prefetch.deadline_s = prefetch.asked_until_s = now_s + granted.ttl_s
        told += f", for {granted.ttl_s:.4g} s"
        return (
            ("clipped", granted.limit, told) if granted.limit else ("accepted", "under_way", told)
        )

    def _staged_blocks(self, program: str, turn: PausedTurn) -> int:
        """How many of the turn's blocks a load could bring."""
        if self._tier.state is not TierState.READY:
            return 0
        chunks = self._copies.chunks_of(program, turn.chain)
        config = self._policy.config
        if config.reload == "never":
            chunks = 0
        elif config.reload == "first_k":
            chunks = min(chunks, config.reload_first_chunks)
        return min(chunks, turn.n_blocks // self._facts.chunk_blocks) * self._facts.chunk_blocks

    def _affordable(
        self, n_here: int, end: int, planned: int, coming: int, payable: float
    ) -> tuple[int, str]:
        """The last block that there is room for, at a chunk's end, and what the limit was.

        Args:
            n_here: Blocks in GPU memory.
            end: Blocks that are wanted.
            planned: Blocks that other prefetches will take.
            coming: Blocks that they have taken, and that are not pinned yet.
            payable: Blocks that its tenant can pay for.
        """
        if end <= n_here:
            return end, ""
        memory = self._spare.memory_blocks() - planned
        budget = self._spare.budget_blocks(planned + coming)
        n_blocks = int(max(0, min(memory, budget, payable)))
        if n_blocks >= end - n_here:
            return end, ""
        per_chunk = self._facts.chunk_blocks
        clipped = max(n_here, (n_here + n_blocks) // per_chunk * per_chunk)
        if payable < min(memory, budget):
            return clipped, "tenant_budget"
        return clipped, "memory" if memory <= budget else "budget"

    def _miss_s(self, n_tokens: int) -> tuple[float, float]:
        """What it costs to compute so many tokens, and to get them where they are staged, seconds."""
        choice, entry = self._policy.decide_return(
            n_tokens + 1, 0, n_tokens, backlog_tokens=0, waiting_requests=0
        )
        costs = entry["costs"]
        compute_s = costs.get("recompute", self._policy.prefill.model().seconds(0, n_tokens))
        return compute_s, min(costs.values(), default=choice.predicted_load_s)

    def _told(self, prefetch: Prefetch, of_blocks: int) -> str:
        tokens = self._facts.block_tokens
        ttl_s = prefetch.deadline_s - prefetch.begun_s
        return f"{prefetch.end_block * tokens} of {of_blocks * tokens} tokens, for {ttl_s:.4g} s"
