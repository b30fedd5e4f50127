"""A program's return: what of its KV is in GPU memory, what to load, what to compute (steps 2-4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtier.block_ids import as_block_ids, common_prefix
from kvtier.chunk_keys import ChunkChain
from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.gpu_pin import PinTable, ReleaseCause

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvtier.backend import Activity
    from kvtier.block_ids import BlockIds
    from kvtier.policy import Policy
    from kvtier.stats import Stats
    from kvtier.turns.decision_log import DecisionLog
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.reading import TierReader
    from kvtier.turns.staging import Stager
    from kvtier.turns.turn import Turn

LOOKUP_DEADLINE_S = 1.0
"""A healthy tier answers within milliseconds; one that is silent is given up only after seconds."""


class Returns:
    """Chooses between GPU copy, reload and recompute for requests that are about to start."""

    def __init__(
        self,
        facts: EngineFacts,
        reader: TierReader,
        stager: Stager,
        pins: PinTable,
        policy: Policy,
        stats: Stats,
        log: DecisionLog,
        note: Callable[..., None],
    ) -> None:
        self._facts = facts
        self._reader = reader
        self._stager = stager
        self._pins = pins
        self._policy = policy
        self._stats = stats
        self._log = log
        self._note = note
        self._chains: dict[str, ChunkChain] = {}
        # By copy in the tier: what the turns do that go on from it, by request.
        self._active: dict[str, dict[str, Activity]] = {}

    def readable_tokens(self, turn: Turn) -> int:
        """Prompt tokens that a load could bring; 0 where the turn must do without the tier.

        Whole chunks, and never the last token, which is computed for its logits.
        """
        if not turn.tierable or turn.bypass_tier or turn.request.skip_reading_prefix_cache:
            return 0
        chunk = self._facts.chunk_tokens
        return (int(turn.request.num_tokens) - 1) // chunk * chunk

    def preempted(self, turns: Iterable[Turn]) -> None:
        """Running turns have lost their KV in GPU memory, and need what the tier holds of it again."""
        for turn in turns:
            self.mark(turn, "waiting")

    def mark(self, turn: Turn, activity: Activity) -> None:
        """Tell the tier that a turn needs what it holds of the program, or has it in GPU memory now."""
        told = self._active.get(turn.copy or "", {}).get(turn.request_id)
        if told == activity:
            return
        readable = self.readable_tokens(turn)
        found = None
        if readable:
            found = self._stager.copies.find(turn.program, lambda: self.chain_of(turn, readable))
        if found != turn.copy:
            self.mark_paused(turn)
        turn.copy = found
        if found is not None:
            self._active.setdefault(found, {})[turn.request_id] = activity
            self._tell(found)

    def mark_paused(self, turn: Turn) -> None:
        """Tell the tier that the turn is over: what it holds is worth keeping as of any paused program."""
        if turn.copy is not None:
            self._active.get(turn.copy, {}).pop(turn.request_id, None)
            self._tell(turn.copy)
            turn.copy = None

    def _tell(self, copy: str) -> None:
        """Tell the tier what the turns that share a copy do: one that still needs it comes first."""
        activities = self._active.get(copy, {}).values()
        if not activities:
            self._active.pop(copy, None)
            self._stager.copies.mark(copy, "paused")
        else:
            self._stager.copies.mark(copy, "waiting" if "waiting" in activities else "running")

    def hit_tokens(
        self, turn: Turn, readable: int, now_s: float, wait: Callable[[], None]
    ) -> int | None:
        """Tokens from the prompt's start that the tier holds and has locked; None while it is asked.

        A request whose answer does not come in `LOOKUP_DEADLINE_S` goes on without the tier.

        Args:
            turn: The request.
            readable: See `readable_tokens`.
            now_s: Monotonic time.
            wait: Takes in what the tier has answered, and waits a moment for it. Called after asking,
                and once more before the answer counts as late: a step may have taken longer.
        """
        asked_before = self._reader.asked(turn.request_id)
        if not asked_before:
            chain = self.chain_of(turn, readable)
            if not len(chain):
                return 0
            strand = self._stager.copies.strands.find(turn.program, chain)
            self._reader.ask(turn.request_id, strand, chain)
            turn.asked_s = now_s
            wait()
        hit = self._reader.hit_chunks(turn.request_id)
        late = now_s - turn.asked_s >= LOOKUP_DEADLINE_S
        if hit is None and late and asked_before:
            wait()
            hit = self._reader.hit_chunks(turn.request_id)
        if hit is None:
            if not late:
                return None
            self._stats.count("failures", 1, "lookup_late")
            self._reader.release(turn.request_id)
            turn.bypass_tier = True
            return 0
        if turn.chain is not None:
            self._stager.copies.correct(turn.program, turn.chain, hit)
        return min(hit * self._facts.chunk_tokens, readable)

    def reload_tokens(self, turn: Turn, tier_tokens: int, waiting_requests: int = 0) -> int:
        """How much to load, counted from the prompt's start; 0 for nothing."""
        if tier_tokens <= turn.local_tokens:
            return 0
        choice, entry = self._policy.decide_return(
            turn.request.num_tokens,
            turn.local_tokens,
            tier_tokens,
            backlog_tokens=self._reader.backlog_tokens,
            waiting_requests=waiting_requests,
        )
        turn.predicted_load_s = choice.predicted_load_s
        decided = (choice.source, choice.reload_tokens, choice.reason)
        if decided != turn.return_choice:
            # A request that waits is asked in every step: record what changed, not every question.
            turn.return_choice = decided
            self._policy.observe_return(choice.reason)
            self._stats.count("decisions", 1, "return", choice.source, choice.reason)
            self._log.write("return", turn.program, turn.request_id, entry)
        return choice.reload_tokens

    def hand_over(self, turn: Turn, block_ids: Callable[[], Sequence[int]]) -> int:
        """End the pins that this request continues; returns how many prompt tokens came from them."""
        taken = 0
        pins = self._pins.of_program(turn.program)
        mine = block_ids() if pins else ()
        for pin in pins:
            data = pin.data
            if not isinstance(data, PinnedTurn) or not _continues(data, pin.block_ids, mine):
                continue
            n_common = _shared(pin.block_ids, mine)
            n_output = len(pin.block_ids) - data.prompt_blocks
            if n_output > 0:
                reused = max(0, n_common - data.prompt_blocks)
                tokens = self._facts.block_tokens
                self._policy.ttl.observe_output_reuse(reused * tokens, n_output * tokens)
            taken = max(taken, min(n_common * self._facts.block_tokens, turn.local_tokens))
            self._note(self._pins.unpin(pin.key, ReleaseCause.HANDOFF))
        return taken

    def count_sources(self, turn: Turn, pinned_tokens: int, external_tokens: int) -> None:
        """Where the prompt's tokens came from; the four add up to the prompt.

        What is loaded counts when the load has ended: a failed one is recomputed.
        """
        local, total = turn.local_tokens, int(turn.request.num_tokens)
        count = self._stats.count
        count("prompt_tokens", pinned_tokens, "gpu_pin")
        count("prompt_tokens", local - pinned_tokens, "gpu_cache")
        count("prompt_tokens", total - local - external_tokens, "recomputed")
        turn.uncounted_load_tokens = external_tokens

    def count_loaded(self, turn: Turn, *, ok: bool) -> None:
        """The load of a request has ended; only its first one is for the prompt's sake."""
        self._stats.count(
            "prompt_tokens", turn.uncounted_load_tokens, "cpu" if ok else "recomputed"
        )
        turn.uncounted_load_tokens = 0

    def chain_of(self, turn: Turn, n_tokens: int) -> ChunkChain:
        """Chunk keys of the request's first `n_tokens` tokens, hashing only what is new."""
        known = turn.chain or self._chains.get(turn.program)
        if known is None or known.seed != turn.seed:
            known = ChunkChain(turn.seed, self._facts.chunk_tokens)
        request: Any = turn.request
        turn.chain = known.extended(
            request.all_token_ids, n_tokens, request.block_hashes, self._facts.block_tokens
        )
        self._chains[turn.program] = turn.chain
        return turn.chain

    def forget(self, program: str) -> None:
        """The program is over."""
        self._chains.pop(program, None)


def _shared(pin_blocks: BlockIds, blocks: Sequence[int]) -> int:
    """How many of a pin's blocks the request that continues it uses: all, where it uses the last one.

    A text's blocks are found one behind the other. Others may keep the same text's beginning, too, and vLLM may then
    have found theirs; which of them is used there matters to nobody.
    """
    n_blocks = len(pin_blocks)
    if n_blocks <= len(blocks) and pin_blocks[-1] == blocks[n_blocks - 1]:
        return n_blocks
    return common_prefix(pin_blocks, as_block_ids(blocks[:n_blocks]))


def _continues(pinned: PinnedTurn, pin_blocks: BlockIds, blocks: Sequence[int]) -> bool:
    """Whether a request holds the pinned turn's whole prompt.

    A sub-agent that shares no more than a system prompt does not.
    """
    last = max(1, pinned.prompt_blocks) - 1
    return last < len(blocks) and bool(blocks[last] == pin_blocks[last])
