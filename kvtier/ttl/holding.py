"""What holding GPU memory costs, and how long holding a paused program's blocks pays.

All costs are seconds of delay, summed over the requests that suffer it; a price is seconds of delay
per block and second of holding.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from kvtier.ttl.gaps import SurvivalCurve

CACHED_REUSE_PER_S = 0.01
"""Reuse rate of a cached free block before one was measured: about one reuse in 100 s, the order of
the mean gap of recorded agent sessions (48 s after a tool call, minutes after a human turn)."""


class HoldReason(StrEnum):
    """Why blocks are pinned for so long, or not at all. A closed set."""

    MEMORY_FREE = "memory_free"
    """The pin takes blocks that nobody misses: the longest TTL."""
    RETURN_EXPECTED = "return_expected"
    """Until this TTL the chance of a return is worth more than the memory."""
    MEMORY_SCARCE = "memory_scarce"
    """At every TTL the memory is worth more than the chance of a return."""
    MISS_IS_FREE = "miss_is_free"
    """A miss would cost nothing, so holding saves nothing."""
    OVERRIDE_FIXED = "override_fixed"
    OVERRIDE_CAP = "override_cap"
    OVERRIDE_FLOOR = "override_floor"
    """An operator's or client's override set, shortened or lengthened the TTL."""
    MAX_TTL = "max_ttl"
    """No pin may last longer: it shortened an override's TTL, or is 0 and forbids pins."""
    TENANT_BUDGET = "tenant_budget"
    """The tenant's block-seconds shortened the TTL, possibly to 0."""
    PIN_BUDGET = "pin_budget"
    """Too few blocks are left in the budget of all pins."""
    NOTHING_REUSABLE = "nothing_reusable"
    """No full block can hit again."""
    CHEAPER_UNPINNED = "cheaper_unpinned"
    """A TTL exists, but all costs counted, not pinning is cheaper."""


@dataclass(frozen=True, slots=True)
class TtlBound:
    """An override that applies to one pause: the TTL in seconds, its maximum or its minimum."""

    mode: Literal["fixed", "cap", "floor"]
    ttl_s: float


@dataclass(frozen=True, slots=True)
class TtlChoice:
    """A TTL and what is expected of it.

    Attributes:
        ttl_s: seconds from now; 0 means not to pin.
        reason: why this long.
        hit_probability: chance that the program returns within ``ttl_s``.
        expected_hold_s: mean of min(return, ``ttl_s``), seconds.
        value_s: expected seconds saved, minus the price of the memory; may be negative under an
            override.
    """

    ttl_s: float
    reason: HoldReason
    hit_probability: float
    expected_hold_s: float
    value_s: float


@dataclass(frozen=True, slots=True)
class MemoryState:
    """Occupancy of the GPU block pool and the demand on it; blocks about to be pinned excluded.

    Attributes:
        free_unhashed_blocks: free blocks that hold nobody's KV.
        free_cached_blocks: free blocks that still hold KV which may hit (evictable).
        total_blocks: blocks of the pool.
        pinned_blocks: blocks that are pinned already.
        waiting_requests: requests waiting for memory or compute.
        waiting_blocks: blocks they need, plus the headroom kept for running requests.
        waiting_tokens: tokens they have to compute.
        throughput_tokens_per_s: measured (:class:`~kvtier.costs.estimators.QueueEstimator`).
        queue_correction: running ratio of actual to predicted waits (same source).
        cached_reuse_per_s: how often a cached free block is hit, per second; measured as hit blocks
            taken from the free queue over (mean cached free blocks * seconds).
        cached_reload_s_per_block: cost of losing one such block when it would have been hit: its
            reload or recompute, whichever is cheaper (link and prefill models).
    """

    free_unhashed_blocks: int
    free_cached_blocks: int
    total_blocks: int
    pinned_blocks: int = 0
    waiting_requests: int = 0
    waiting_blocks: int = 0
    waiting_tokens: int = 0
    throughput_tokens_per_s: float = math.inf
    queue_correction: float = 1.0
    cached_reuse_per_s: float = CACHED_REUSE_PER_S
    cached_reload_s_per_block: float = 0.0

    @property
    def queue_delay_s(self) -> float:
        """Seconds until the waiting tokens are worked off: Little's law times the correction."""
        return self.waiting_tokens / self.throughput_tokens_per_s * self.queue_correction


def memory_price_s_per_block_s(memory: MemoryState, n_blocks: int) -> float:
    """Return the price of holding one of ``n_blocks`` blocks, seconds per block and second.

    Waiting requests take unhashed free blocks first, then cached ones. What they leave covers the
    pin's blocks in the same order; each block costs what it is taken from, and the result is the
    mean over the blocks:

    * free unhashed blocks: 0. Nobody misses them.
    * free cached blocks: ``cached_reuse_per_s * cached_reload_s_per_block``. A block-second of
      cache yields hits at the reuse rate (Little), and each lost hit costs its reload.
    * none left: ``waiting_requests / usable * min(1, queue_delay / 1 s)`` with usable blocks =
      total - pinned. The queue drains in D = correction * tokens / throughput; a throughput
      limited by memory is proportional to the usable blocks, so that a block less for all of D
      makes each waiting request D / usable later, which is 1 / usable per second held. A queue that
      drains within a second is not delayed for a whole one. (Continuum, arXiv 2511.02230, charges
      memory / mean footprint instead: every pin blocks a request, also without a queue.) At least
      the price of a cached block, the other use that the block could have.

    Raises:
        ValueError: ``n_blocks`` is negative.
    """
    if n_blocks < 0:
        msg = f"n_blocks must be >= 0, not {n_blocks}"
        raise ValueError(msg)
    unhashed = max(memory.free_unhashed_blocks - memory.waiting_blocks, 0)
    if n_blocks <= unhashed:
        return 0.0
    free = memory.free_unhashed_blocks + memory.free_cached_blocks
    cached = max(free - memory.waiting_blocks, 0) - unhashed
    from_cached = min(n_blocks - unhashed, cached)
    from_queue = n_blocks - unhashed - from_cached
    cached_price = memory.cached_reuse_per_s * memory.cached_reload_s_per_block
    usable = max(memory.total_blocks - memory.pinned_blocks, 1)
    queue_price = memory.waiting_requests / usable * min(1.0, memory.queue_delay_s)
    queue_price = max(queue_price, cached_price)
    return (from_cached * cached_price + from_queue * queue_price) / n_blocks


def optimal_ttl(
    survival: SurvivalCurve,
    benefit_s: float,
    price_s_per_s: float,
    max_ttl_s: float,
    bound: TtlBound | None = None,
) -> TtlChoice:
    """Return the TTL with the largest expected value.

    ``V(tau) = integral_0^tau [f(t) * B - S(t) * p] dt = B * (1 - S(tau)) - p * integral_0^tau S``:
    a return within tau saves B, and the memory is paid for until the return or the TTL. It is the
    integral of "hold while hazard * B > price". S is a step function, so V jumps up at events and
    falls between them: the candidates are 0, the event times, and in the Pareto tail the one point
    where hazard * B = price, ``alpha * B / p - age``. Of equal values the shortest TTL wins.

    Args:
        survival: time still to wait (a residual curve if some time has passed).
        benefit_s: B, seconds saved by a hit against a miss.
        price_s_per_s: p, price of all the blocks held, seconds per second.
        max_ttl_s: finite upper limit; also the answer when the memory is free. With 0 nothing is held.
        bound: an override; the limit still applies.
    """
    if bound is not None and bound.mode == "fixed":
        ttl_s, reason = bound.ttl_s, HoldReason.OVERRIDE_FIXED
    elif benefit_s <= 0.0:
        ttl_s, reason = 0.0, HoldReason.MISS_IS_FREE
    elif price_s_per_s <= 0.0:
        ttl_s, reason = max_ttl_s, HoldReason.MEMORY_FREE
    else:
        ttl_s = _best_time(survival, benefit_s, price_s_per_s, max_ttl_s)
        reason = HoldReason.RETURN_EXPECTED if ttl_s > 0.0 else HoldReason.MEMORY_SCARCE
    if bound is not None and bound.mode == "cap" and ttl_s > bound.ttl_s:
        ttl_s, reason = bound.ttl_s, HoldReason.OVERRIDE_CAP
    elif bound is not None and bound.mode == "floor" and ttl_s < bound.ttl_s:
        ttl_s, reason = bound.ttl_s, HoldReason.OVERRIDE_FLOOR
    forbidden = max_ttl_s <= 0.0 and reason in {HoldReason.MEMORY_FREE, HoldReason.MEMORY_SCARCE}
    if ttl_s > max_ttl_s or forbidden:
        ttl_s, reason = max_ttl_s, HoldReason.MAX_TTL
    return _describe(survival, ttl_s, reason, benefit_s, price_s_per_s)


def _describe(
    survival: SurvivalCurve,
    ttl_s: float,
    reason: HoldReason,
    benefit_s: float,
    price_s_per_s: float,
) -> TtlChoice:
    """Return the choice of ``ttl_s`` with its expectations; negative TTLs count as 0."""
    if ttl_s <= 0.0:
        return TtlChoice(0.0, reason, 0.0, 0.0, 0.0)
    hit_probability = 1.0 - survival.survival(ttl_s)
    hold_s = survival.mean_restricted(ttl_s)
    value_s = benefit_s * hit_probability - price_s_per_s * hold_s
    return TtlChoice(ttl_s, reason, hit_probability, hold_s, value_s)


def _best_time(survival: SurvivalCurve, benefit_s: float, price: float, max_ttl_s: float) -> float:
    """Return the smallest maximiser of V over [0, max_ttl_s]."""
    best_s, best_value = 0.0, 0.0
    hold_s, left, since_s = 0.0, 1.0, 0.0
    for time, next_left in zip(survival.times, survival.survivals, strict=True):
        if time > max_ttl_s:
            return best_s
        hold_s += left * (time - since_s)
        left, since_s = next_left, time
        value = benefit_s * (1.0 - left) - price * hold_s
        if value > best_value:
            best_s, best_value = time, value
    tail_s = min(survival.tail_alpha * benefit_s / price - survival.age_s, max_ttl_s)
    if tail_s > since_s:
        hold_s += survival.tail_integral(tail_s)
        if benefit_s * (1.0 - survival.survival(tail_s)) - price * hold_s > best_value:
            return tail_s
    return best_s
