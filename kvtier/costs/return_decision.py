"""What to do when a program returns: use the GPU copy, reload a prefix, or recompute.

Costs are seconds of delay over all requests. A load is asynchronous: while it runs, others compute.
A recompute is not: every running request's step grows by it and every waiting request waits for it,
so each second of prefill is charged once for the request and once for every request it delays.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from kvtier.costs.estimators import PrefillModel
from kvtier.costs.link_model import LinkModel


class ReturnReason(StrEnum):
    """Why a returning request takes its KV from there. A closed set."""

    EMPTY_PROMPT = "empty_prompt"
    """There is nothing to compute."""
    NO_HIT = "no_hit"
    """Neither the GPU nor the tier holds a part of the prompt."""
    GPU_HIT = "gpu_hit"
    """The tier holds nothing beyond what the GPU holds."""
    RELOAD_CHEAPER = "reload_cheaper"
    """Everything that the tier holds is loaded."""
    PARTIAL_RELOAD_CHEAPER = "partial_reload_cheaper"
    """A shorter prefix than the tier holds is loaded."""
    RECOMPUTE_CHEAPER = "recompute_cheaper"
    """Computing is cheaper than loading even on an idle link."""
    LINK_BUSY = "link_busy"
    """Computing is cheaper because of the transfers queued on the link."""


@dataclass(frozen=True, slots=True)
class ReturnState:
    """What is known when a request arrives whose program may have KV somewhere.

    Attributes:
        prompt_tokens: length of the prompt.
        gpu_hit_tokens: prefix found in GPU memory.
        tier_hit_tokens: prefix found in the CPU tier, counted from token 0 too.
        chunk_tokens: the tier's unit; loads end at multiples of it.
        kv_bytes_per_token: bytes of KV per token that cross the link.
        link: model of the load direction.
        run_bytes: contiguous run of such a load.
        prefill: model of prefill time.
        backlog_bytes: bytes queued on the link before this load.
        delayed_requests: running and waiting requests that a prefill of this one delays.
        queue_delay_s: wait for compute, the same for all options; part of the costs, not of the
            choice.
        load_interference: seconds that a second of loading takes from each delayed request; 0 for
            copies by DMA, above where copies and compute share cores.
    """

    prompt_tokens: int
    gpu_hit_tokens: int
    tier_hit_tokens: int
    chunk_tokens: int
    kv_bytes_per_token: float
    link: LinkModel
    run_bytes: int
    prefill: PrefillModel
    backlog_bytes: int = 0
    delayed_requests: int = 0
    queue_delay_s: float = 0.0
    load_interference: float = 0.0


@dataclass(frozen=True, slots=True)
class ReturnDecision:
    """Where the prompt's KV comes from.

    Attributes:
        source: ``gpu``: the GPU's hit and nothing else was available; ``reload``: load up to
            ``reload_tokens``; ``recompute``: nothing is loaded (a GPU hit is still used).
        reload_tokens: a multiple of the chunk, counted from token 0; the part below the GPU hit is
            not loaded again. 0 without a load. Equals the prompt's length if all of it is stored:
            the engine then still computes the last token.
        cost_s: cost of the choice.
        costs: (option, seconds) of every available option: ``gpu`` or ``recompute``, ``reload``
            (the best prefix) and ``reload_all``.
    """

    source: Literal["gpu", "reload", "recompute"]
    reload_tokens: int
    reason: ReturnReason
    cost_s: float
    costs: tuple[tuple[str, float], ...]


def return_cost_s(state: ReturnState, reload_tokens: int) -> float:
    """Return the cost in seconds of loading up to ``reload_tokens`` and computing the rest.

    ``queue + load * (1 + interference * others) + prefill * (1 + others)``; load = latency +
    (backlog + bytes beyond the GPU hit) / rate. At least one token is computed, as engines do.
    """
    if state.prompt_tokens <= 0:
        return 0.0
    cached = min(max(state.gpu_hit_tokens, reload_tokens), state.prompt_tokens - 1)
    compute_s = state.prefill.seconds(cached, state.prompt_tokens - cached)
    cost_s = state.queue_delay_s + compute_s * (1 + state.delayed_requests)
    if reload_tokens > state.gpu_hit_tokens:
        n_bytes = int((reload_tokens - state.gpu_hit_tokens) * state.kv_bytes_per_token)
        own_s = wait_s = state.link.seconds(n_bytes, state.run_bytes)
        if state.backlog_bytes > 0:
            wait_s = state.link.seconds(n_bytes, state.run_bytes, state.backlog_bytes)
        cost_s += wait_s + own_s * state.load_interference * state.delayed_requests
    return cost_s


def decide_return(state: ReturnState) -> ReturnDecision:
    """Choose how much to reload.

    The cost of loading k chunks is concave in k between the first chunk beyond the GPU hit and the last but one, as
    the first tokens of a prompt are the cheapest to compute: an end is best. The last chunk is apart, because one
    token is computed in any case. So four options are costed, however long the prompt.

    Raises:
        ValueError: ``chunk_tokens`` is not positive.
    """
    if state.chunk_tokens <= 0:
        msg = f"chunk_tokens must be > 0, not {state.chunk_tokens}"
        raise ValueError(msg)
    if state.prompt_tokens <= 0:
        return ReturnDecision("recompute", 0, ReturnReason.EMPTY_PROMPT, 0.0, ())
    chunk = state.chunk_tokens
    stay_s = return_cost_s(state, 0)
    last = min(state.tier_hit_tokens, state.prompt_tokens) // chunk
    first = max(state.gpu_hit_tokens, 0) // chunk + 1
    if last < first or state.gpu_hit_tokens >= state.prompt_tokens - 1:
        if state.gpu_hit_tokens > 0:
            return ReturnDecision("gpu", 0, ReturnReason.GPU_HIT, stay_s, (("gpu", stay_s),))
        return ReturnDecision("recompute", 0, ReturnReason.NO_HIT, stay_s, (("recompute", stay_s),))
    ends = (first, max(last - 1, first), last)
    options = {k * chunk: return_cost_s(state, k * chunk) for k in ends}
    reload_tokens = min(options, key=options.__getitem__)
    reload_s, all_s = options[reload_tokens], options[last * chunk]
    costs = (("recompute", stay_s), ("reload", reload_s), ("reload_all", all_s))
    if reload_s < stay_s:
        whole = reload_tokens == last * chunk
        reason = ReturnReason.RELOAD_CHEAPER if whole else ReturnReason.PARTIAL_RELOAD_CHEAPER
        return ReturnDecision("reload", reload_tokens, reason, reload_s, costs)
    idle_s = reload_s
    if state.backlog_bytes > 0:
        idle_s = return_cost_s(replace(state, backlog_bytes=0), reload_tokens)
    reason = ReturnReason.LINK_BUSY if idle_s < stay_s else ReturnReason.RECOMPUTE_CHEAPER
    return ReturnDecision("recompute", 0, reason, stay_s, costs)


def miss_cost_s(state: ReturnState, requeue_delay_s: float = 0.0) -> float:
    """Return B: what it costs more to return without the GPU copy than with it, seconds, >= 0.

    Args:
        state: the expected return, ``gpu_hit_tokens`` being what the pin would keep.
        requeue_delay_s: wait for memory that only a miss causes (Continuum's out-of-order cost).
    """
    hit_s = return_cost_s(state, 0)
    miss = decide_return(replace(state, gpu_hit_tokens=0))
    return max(miss.cost_s - hit_s, 0.0) + requeue_delay_s
