"""Where a pausing program's KV should wait: pinned in GPU memory, in the CPU tier, or nowhere.

Every term is in seconds of delay, summed over the requests that suffer it:

=====================  ==========================================================  ================
term                   meaning                                                     source
=====================  ==========================================================  ================
miss cost B            cheapest way back without the GPU copy, minus a GPU hit     link and prefill
                       (:func:`~kvtier.costs.return_decision.miss_cost_s`)               estimators
requeue delay          the share of the blocks that would have to be waited for,   queue estimator,
                       times the queue delay; part of B                            block pool
memory price           per block and second                                        block pool, queue
                       (:func:`~kvtier.ttl.holding.memory_price_s_per_block_s`)        estimator
survival S(t)          chance that the program is still away after t seconds       gap book
staging cost           seconds on the store link times what a second of copying    link estimator,
                       costs each running request                                  calibration
=====================  ==========================================================  ================

The GPU hit is the zero point: an option's cost is what it adds to a return that hits. With r the
time that the tier keeps a copy, tau the TTL, p the price of all blocks, and B with and without a
copy in the tier:

* drop: ``B_without``
* offload: ``staging + (1 - S(r)) * B_with + S(r) * B_without``
* pin: ``p * integral_0^tau S + miss(tau) * B_without``
* pin and stage: ``p * integral_0^tau S + staging + (miss(tau) - S(r))+ * B_with
  + min(miss(tau), S(r)) * B_without``

``miss(tau) = S(tau) + (1 - S(tau)) * q``: the program is away longer than the TTL, or the pin was
broken under pressure before (probability q): a pin is no promise, which is why it is staged too.

The decision on a return is in :mod:`kvtier.costs.return_decision`; both modules are reached from here.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from kvtier.costs.estimators import PrefillModel
from kvtier.costs.link_model import LinkModel
from kvtier.costs.return_decision import (
    ReturnDecision,
    ReturnReason,
    ReturnState,
    decide_return,
    miss_cost_s,
    return_cost_s,
)
from kvtier.ttl.gaps import SurvivalCurve
from kvtier.ttl.holding import (
    HoldReason,
    MemoryState,
    TtlBound,
    TtlChoice,
    memory_price_s_per_block_s,
    optimal_ttl,
)

__all__ = [
    "Decision",
    "HoldReason",
    "MemoryState",
    "PauseState",
    "PauseTerms",
    "ReturnDecision",
    "ReturnReason",
    "ReturnState",
    "StageReason",
    "TtlBound",
    "TtlChoice",
    "decide_pause",
    "decide_return",
    "memory_price_s_per_block_s",
    "miss_cost_s",
    "optimal_ttl",
    "pause_terms",
    "return_cost_s",
]

KEPT_BEYOND_LEASE = 0.1
"""Chance that the tier still has a copy whose lease has ended: it goes only where others need the room."""
MIN_OUTPUT_REUSE = 0.1
"""Below this learned probability the output part of a turn is neither pinned nor staged."""


class StageReason(StrEnum):
    """Why a copy to the CPU tier starts at the pause, or does not. A closed set."""

    STAGED_AT_PAUSE = "staged_at_pause"
    """The link is used now, so that giving up the GPU copy later is free."""
    ALREADY_STAGED = "already_staged"
    TIER_UNAVAILABLE = "tier_unavailable"
    TIER_FULL = "tier_full"
    """Less room in the tier, evictable part included, than the copy needs."""
    SHORTER_THAN_CHUNK = "shorter_than_chunk"
    """What is reusable does not fill one chunk of the tier."""
    NOT_WORTH_IT = "not_worth_it"
    """Recomputing is expected to be no more expensive than staging and reloading."""


@dataclass(frozen=True, slots=True)
class PauseState:
    """Everything that the decision at the end of a turn depends on.

    Attributes:
        now_s: the engine's clock; recorded with the decision, not used in it.
        context_tokens: prompt and output of the turn.
        reusable_tokens: prefix that can hit again, a multiple of ``block_tokens``:
            ``floor((prompt + output - 1) / block) * block``.
        kv_bytes: KV bytes of the reusable tokens.
        n_blocks: GPU blocks of the reusable tokens.
        block_tokens: tokens of a GPU block.
        chunk_tokens: tokens of a chunk of the CPU tier.
        tool: name of the tool called, None without a call; the survival curve belongs to it.
        is_tool_call: whether the turn ended in a tool call; recorded, the curve carries the effect.
        staged_tokens: prefix that the tier holds already under a lease.
        tier_available: whether the CPU tier can be used at all.
        tier_free_bytes: room in the tier: free, or evictable at less value than this program's.
        store_link: model GPU -> CPU.
        load_link: model CPU -> GPU.
        load_backlog_bytes: bytes queued on the load link.
        run_bytes: contiguous run of these copies.
        prefill: model of prefill time.
        memory: block pool and queue.
        running_requests: requests that a step serves now.
        pin_budget_blocks_left: blocks that may still be pinned.
        output_tokens: how many of the reusable tokens belong to this turn's output.
        output_reuse: learned probability that they are hit
            (:class:`~kvtier.ttl_controller.OutputReuse`).
        ttl_bound: an override that applies to this pause.
        max_ttl_s: longest TTL.
        pin_break_probability: share of pins that pressure releases before the return.
        tier_retention_s: time for which the tier is expected to keep a copy.
        store_interference: seconds that a second of storing takes from each running request.
        load_interference: the same for loading.
    """

    now_s: float
    context_tokens: int
    reusable_tokens: int
    kv_bytes: int
    n_blocks: int
    block_tokens: int
    chunk_tokens: int
    tool: str | None
    is_tool_call: bool
    staged_tokens: int
    tier_available: bool
    tier_free_bytes: int
    store_link: LinkModel
    load_link: LinkModel
    load_backlog_bytes: int
    run_bytes: int
    prefill: PrefillModel
    memory: MemoryState
    running_requests: int
    pin_budget_blocks_left: int
    output_tokens: int = 0
    output_reuse: float = 1.0
    ttl_bound: TtlBound | None = None
    max_ttl_s: float = 300.0
    pin_break_probability: float = 0.1
    tier_retention_s: float = 1800.0
    store_interference: float = 0.01
    load_interference: float = 0.0


@dataclass(frozen=True, slots=True)
class PauseTerms:
    """The terms of a pause before any TTL is chosen; see the module's docstring.

    Attributes:
        keep_tokens: reusable tokens worth keeping, a multiple of the block.
        keep_blocks: GPU blocks of these.
        stage_tokens: prefix that the tier would hold after staging, a multiple of the chunk.
        stage_reason: ``STAGED_AT_PAUSE`` if staging is possible, else why it is not.
        staging_s: cost of staging, seconds.
        miss_staged_s: B with the copy that the tier holds after staging.
        miss_unstaged_s: B with what the tier holds now.
        price_s_per_s: price of all kept blocks, seconds per second.
    """

    keep_tokens: int
    keep_blocks: int
    stage_tokens: int
    stage_reason: StageReason
    staging_s: float
    miss_staged_s: float
    miss_unstaged_s: float
    price_s_per_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a paused program's KV.

    Attributes:
        action: ``pin``: hold the GPU blocks for ``ttl_s``; ``offload``: give them up, the tier's
            copy (started now or there already) stays; ``drop``: give them up without a copy.
        ttl_s: seconds to hold; 0 unless pinned.
        stage: whether to start copying to the tier now. Also with a pin, for a free eviction later.
        keep_tokens: prefix to pin, a multiple of the block; without the output part if that is
            never hit.
        stage_tokens: prefix that the tier should hold, a multiple of the chunk; 0 without one.
        reason: why pinned so long or not.
        stage_reason: why staged or not.
        costs: (option, expected seconds) of every option that was open, for explanations.
        terms: what the costs were computed from; None if nothing is reusable.
    """

    action: Literal["pin", "offload", "drop"]
    ttl_s: float
    stage: bool
    keep_tokens: int
    stage_tokens: int
    reason: HoldReason
    stage_reason: StageReason
    costs: tuple[tuple[str, float], ...]
    terms: PauseTerms | None


def pause_terms(state: PauseState) -> PauseTerms:
    """Return the terms of a pause; also used to value a pin that exists already."""
    prompt_tokens = max(state.reusable_tokens - state.output_tokens, 0)
    prompt_tokens -= prompt_tokens % state.block_tokens
    keep_output = state.output_reuse >= MIN_OUTPUT_REUSE
    keep_tokens = state.reusable_tokens if keep_output else prompt_tokens
    # Expected tokens that hit: the output part only counts with its probability.
    useful_tokens = prompt_tokens
    if keep_output:
        useful_tokens += int(state.output_reuse * (state.reusable_tokens - prompt_tokens))
    keep_blocks = -(-keep_tokens * state.n_blocks // state.reusable_tokens) if keep_tokens else 0
    bytes_per_token = state.kv_bytes / state.reusable_tokens if state.reusable_tokens else 0.0
    held_tokens = state.staged_tokens if state.tier_available else 0
    stage_tokens = keep_tokens - keep_tokens % state.chunk_tokens
    new_bytes = int(max(stage_tokens - held_tokens, 0) * bytes_per_token)
    stage_reason = _stage_reason(state, stage_tokens, new_bytes)
    staging_s = 0.0
    if stage_reason is StageReason.STAGED_AT_PAUSE:
        copy_s = state.store_link.seconds(new_bytes, state.run_bytes)
        staging_s = copy_s * state.store_interference * state.running_requests
    else:
        stage_tokens = min(held_tokens, stage_tokens)
    memory = state.memory
    free_blocks = memory.free_unhashed_blocks + memory.free_cached_blocks - memory.waiting_blocks
    short_blocks = min(max(keep_blocks - max(free_blocks, 0), 0), keep_blocks)
    requeue_s = memory.queue_delay_s * short_blocks / keep_blocks if keep_blocks else 0.0

    def miss_s(tier_tokens: int) -> float:
        expected = ReturnState(
            # One new token: the rest of the next prompt is computed after a hit, too.
            prompt_tokens=useful_tokens + 1,
            gpu_hit_tokens=useful_tokens,
            tier_hit_tokens=min(tier_tokens, useful_tokens),
            chunk_tokens=state.chunk_tokens,
            kv_bytes_per_token=bytes_per_token,
            link=state.load_link,
            run_bytes=state.run_bytes,
            prefill=state.prefill,
            backlog_bytes=state.load_backlog_bytes,
            delayed_requests=state.running_requests + memory.waiting_requests,
            load_interference=state.load_interference,
        )
        return miss_cost_s(expected, requeue_s) if useful_tokens else 0.0

    unstaged_s = miss_s(held_tokens)
    return PauseTerms(
        keep_tokens=keep_tokens,
        keep_blocks=keep_blocks,
        stage_tokens=stage_tokens,
        stage_reason=stage_reason,
        staging_s=staging_s,
        miss_staged_s=miss_s(stage_tokens) if stage_tokens > held_tokens else unstaged_s,
        miss_unstaged_s=unstaged_s,
        price_s_per_s=memory_price_s_per_block_s(memory, keep_blocks) * keep_blocks,
    )


def decide_pause(state: PauseState, survival: SurvivalCurve) -> Decision:
    """Decide at the end of a turn where the program's KV waits.

    Args:
        state: the pause.
        survival: gaps after such a turn (:meth:`~kvtier.ttl.gaps.GapBook.curve`).

    Returns:
        The cheapest of pin, pin and stage, offload and drop; of equal costs the one that does
        least. A ``fixed`` or ``floor`` override above 0 restricts the choice to pins, within the
        pin budget and ``max_ttl_s``.
    """
    terms = pause_terms(state)
    if terms.keep_tokens <= 0:
        return Decision(
            action="drop",
            ttl_s=0.0,
            stage=False,
            keep_tokens=0,
            stage_tokens=0,
            reason=HoldReason.NOTHING_REUSABLE,
            stage_reason=terms.stage_reason,
            costs=(),
            terms=None,
        )
    can_stage = terms.stage_reason is StageReason.STAGED_AT_PAUSE
    retention_s = state.tier_retention_s
    lost = (1.0 - KEPT_BEYOND_LEASE) * survival.survival(retention_s)
    costs = {"drop": terms.miss_unstaged_s}
    plain = _choose(state, terms, survival, terms.miss_unstaged_s)
    fits = terms.keep_blocks <= state.pin_budget_blocks_left
    if fits and plain.ttl_s > 0.0:
        held_s = terms.price_s_per_s * plain.expected_hold_s
        costs["pin"] = held_s + _miss_probability(state, plain) * terms.miss_unstaged_s
    staged = plain
    if can_stage:
        costs["offload"] = (
            terms.staging_s + (1.0 - lost) * terms.miss_staged_s + lost * terms.miss_unstaged_s
        )
        staged = _choose(state, terms, survival, terms.miss_staged_s)
        if fits and staged.ttl_s > 0.0:
            missed = _miss_probability(state, staged)
            gone = min(lost, missed)
            costs["pin_and_stage"] = (
                terms.price_s_per_s * staged.expected_hold_s
                + terms.staging_s
                + (missed - gone) * terms.miss_staged_s
                + gone * terms.miss_unstaged_s
            )
    option = _cheapest(state, costs)
    stage = option in {"offload", "pin_and_stage"}
    pinned = option in {"pin", "pin_and_stage"}
    choice = staged if stage else plain
    reason = choice.reason
    if not pinned and choice.ttl_s > 0.0:
        reason = HoldReason.CHEAPER_UNPINNED if fits else HoldReason.PIN_BUDGET
    stage_reason = terms.stage_reason
    if can_stage and not stage:
        stage_reason = StageReason.NOT_WORTH_IT
    held_tokens = min(state.staged_tokens, terms.keep_tokens) if state.tier_available else 0
    stage_tokens = terms.stage_tokens if stage else held_tokens
    unpinned: Literal["offload", "drop"] = "offload" if stage_tokens else "drop"
    return Decision(
        action="pin" if pinned else unpinned,
        ttl_s=choice.ttl_s if pinned else 0.0,
        stage=stage,
        keep_tokens=terms.keep_tokens,
        stage_tokens=stage_tokens,
        reason=reason,
        stage_reason=stage_reason,
        costs=tuple(costs.items()),
        terms=terms,
    )


def _choose(
    state: PauseState, terms: PauseTerms, survival: SurvivalCurve, benefit_s: float
) -> TtlChoice:
    return optimal_ttl(survival, benefit_s, terms.price_s_per_s, state.max_ttl_s, state.ttl_bound)


def _miss_probability(state: PauseState, choice: TtlChoice) -> float:
    return 1.0 - choice.hit_probability * (1.0 - state.pin_break_probability)


def _cheapest(state: PauseState, costs: dict[str, float]) -> str:
    """Return the cheapest option; ``costs`` lists the ones that do less first."""
    open_options = list(costs)
    bound = state.ttl_bound
    if bound is not None and bound.mode != "cap" and bound.ttl_s > 0.0:
        pins = [option for option in open_options if option.startswith("pin")]
        open_options = pins or open_options
    return min(open_options, key=costs.__getitem__)


def _stage_reason(state: PauseState, stage_tokens: int, new_bytes: int) -> StageReason:
    """Return whether staging is possible (``STAGED_AT_PAUSE``), else what prevents it."""
    if not state.tier_available:
        return StageReason.TIER_UNAVAILABLE
    if stage_tokens <= 0:
        return StageReason.SHORTER_THAN_CHUNK
    if state.staged_tokens >= stage_tokens:
        return StageReason.ALREADY_STAGED
    if new_bytes > state.tier_free_bytes:
        return StageReason.TIER_FULL
    return StageReason.STAGED_AT_PAUSE
