"""Memory price, holding time, and the decisions at a pause and at a return."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.cost_model import (
    HoldReason,
    MemoryState,
    PauseState,
    ReturnReason,
    ReturnState,
    StageReason,
    TtlBound,
    decide_pause,
    decide_return,
    memory_price_s_per_block_s,
    miss_cost_s,
    optimal_ttl,
    pause_terms,
    return_cost_s,
)
from kvtier.costs.estimators import PrefillModel
from kvtier.costs.link_model import LinkModel
from kvtier.ttl.gaps import TOOL_PRIOR, SurvivalCurve, kaplan_meier

LINK = LinkModel(1e-3, ((65536, 25e9),))
PREFILL = PrefillModel.from_flops(8e9, 32, 4096, 4e14)
BUSY = MemoryState(
    free_unhashed_blocks=0,
    free_cached_blocks=0,
    total_blocks=10_000,
    waiting_requests=20,
    waiting_blocks=5_000,
    waiting_tokens=400_000,
    throughput_tokens_per_s=20_000.0,
    cached_reload_s_per_block=1e-4,
)
IDLE = MemoryState(free_unhashed_blocks=9_000, free_cached_blocks=500, total_blocks=10_000)
FAST_TOOL = kaplan_meier([0.1 + 0.01 * i for i in range(50)], [True] * 50)
PAUSE = PauseState(
    now_s=0.0,
    context_tokens=64_007,
    reusable_tokens=64_000,
    kv_bytes=64_000 * 131_072,
    n_blocks=4_000,
    block_tokens=16,
    chunk_tokens=256,
    tool="bash",
    is_tool_call=True,
    staged_tokens=0,
    tier_available=True,
    tier_free_bytes=10**12,
    store_link=LINK,
    load_link=LINK,
    load_backlog_bytes=0,
    run_bytes=65536,
    prefill=PREFILL,
    memory=BUSY,
    running_requests=8,
    pin_budget_blocks_left=5_000,
)
RETURN = ReturnState(
    prompt_tokens=65_000,
    gpu_hit_tokens=0,
    tier_hit_tokens=64_000,
    chunk_tokens=256,
    kv_bytes_per_token=131_072,
    link=LINK,
    run_bytes=65536,
    prefill=PREFILL,
    delayed_requests=10,
)

curves = st.lists(st.floats(0.001, 500.0), max_size=20).map(
    lambda times: kaplan_meier(times, [True] * len(times), prior=TOOL_PRIOR)
)
memories = st.builds(
    MemoryState,
    free_unhashed_blocks=st.integers(0, 2000),
    free_cached_blocks=st.integers(0, 2000),
    total_blocks=st.integers(1, 10_000),
    pinned_blocks=st.integers(0, 12_000),
    waiting_requests=st.integers(0, 100),
    waiting_blocks=st.integers(0, 5000),
    waiting_tokens=st.integers(0, 10**6),
    throughput_tokens_per_s=st.floats(1.0, 1e6),
    cached_reload_s_per_block=st.floats(0.0, 0.1),
)


class TestMemoryPrice:
    def test_free_unhashed_blocks_cost_nothing(self) -> None:
        assert memory_price_s_per_block_s(IDLE, 9_000) == 0.0
        assert memory_price_s_per_block_s(replace(BUSY, free_unhashed_blocks=9_000), 4_000) == 0.0
        assert memory_price_s_per_block_s(BUSY, 0) == 0.0

    def test_cached_blocks_cost_their_expected_reload(self) -> None:
        memory = MemoryState(
            free_unhashed_blocks=100,
            free_cached_blocks=300,
            total_blocks=1000,
            cached_reuse_per_s=0.02,
            cached_reload_s_per_block=0.5,
        )
        assert memory_price_s_per_block_s(memory, 200) == pytest.approx(0.01 / 2)

    def test_beyond_that_the_marginal_queue_delay(self) -> None:
        memory = MemoryState(
            free_unhashed_blocks=100,
            free_cached_blocks=100,
            total_blocks=1200,
            pinned_blocks=200,
            waiting_requests=10,
            waiting_blocks=100,
            waiting_tokens=5000,
            throughput_tokens_per_s=10_000.0,
            cached_reload_s_per_block=0.1,
        )
        # 100 blocks from the cache at 0.001; 100 at 10 / 1000 * 0.5 s.
        expected = (100 * 0.001 + 100 * 0.005) / 200
        assert memory_price_s_per_block_s(memory, 200) == pytest.approx(expected)
        slower = replace(memory, queue_correction=2.0)
        assert memory_price_s_per_block_s(slower, 200) == pytest.approx((0.1 + 1.0) / 200)

    @given(memories, st.integers(1, 5000), st.integers(0, 5000))
    def test_grows_with_size_and_demand(self, memory: MemoryState, blocks: int, more: int) -> None:
        price = memory_price_s_per_block_s(memory, blocks)
        assert price >= 0.0
        assert memory_price_s_per_block_s(memory, blocks + more) >= price * (1 - 1e-9)
        demand = replace(memory, waiting_blocks=memory.waiting_blocks + more)
        assert memory_price_s_per_block_s(demand, blocks) >= price * (1 - 1e-9)
        queue = replace(memory, waiting_requests=memory.waiting_requests + more)
        assert memory_price_s_per_block_s(queue, blocks) >= price * (1 - 1e-9)

    def test_rejects_negative_sizes(self) -> None:
        with pytest.raises(ValueError, match="n_blocks"):
            memory_price_s_per_block_s(IDLE, -1)


class TestOptimalTtl:
    def test_hand_computed(self) -> None:
        curve = SurvivalCurve((1.0, 10.0), (0.4, 0.1), tail_alpha=0.0)
        # V(1) = 0.6 B - p; V(10) = 0.9 B - p (1 + 0.4 * 9).
        assert optimal_ttl(curve, 1.0, 0.7, 100.0).ttl_s == 0.0
        short = optimal_ttl(curve, 1.0, 0.1, 100.0)
        assert (short.ttl_s, short.reason) == (1.0, HoldReason.RETURN_EXPECTED)
        assert short.value_s == pytest.approx(0.5)
        assert short.hit_probability == pytest.approx(0.6)
        long = optimal_ttl(curve, 1.0, 0.05, 100.0)
        assert long.ttl_s == 10.0
        assert long.expected_hold_s == pytest.approx(4.6)
        assert optimal_ttl(curve, 1.0, 0.05, 9.0).ttl_s == 1.0

    def test_tail_is_held_until_its_hazard_no_longer_pays(self) -> None:
        curve = SurvivalCurve((1.0,), (0.5,), tail_alpha=1.0)
        assert optimal_ttl(curve, 10.0, 0.5, 300.0).ttl_s == pytest.approx(20.0)
        assert optimal_ttl(curve, 10.0, 0.5, 7.0).ttl_s == 7.0
        aged = curve.residual(5.0)
        assert optimal_ttl(aged, 10.0, 0.5, 300.0).ttl_s == pytest.approx(15.0)
        assert optimal_ttl(curve.residual(30.0), 10.0, 0.5, 300.0).ttl_s == 0.0

    def test_free_memory_and_free_misses(self) -> None:
        free = optimal_ttl(FAST_TOOL, 1.0, 0.0, 300.0)
        assert (free.ttl_s, free.reason) == (300.0, HoldReason.MEMORY_FREE)
        nothing = optimal_ttl(FAST_TOOL, 0.0, 0.0, 300.0)
        assert (nothing.ttl_s, nothing.reason) == (0.0, HoldReason.MISS_IS_FREE)
        scarce = optimal_ttl(FAST_TOOL, 1.0, 1e6, 300.0)
        assert (scarce.ttl_s, scarce.reason) == (0.0, HoldReason.MEMORY_SCARCE)

    def test_where_nothing_may_be_held_that_is_the_reason_unless_nothing_would_be(self) -> None:
        for price in (0.0, 1e-6, 1e6):
            never = optimal_ttl(FAST_TOOL, 1.0, price, 0.0)
            assert (never.ttl_s, never.reason) == (0.0, HoldReason.MAX_TTL)
            floor = optimal_ttl(FAST_TOOL, 1.0, price, 0.0, TtlBound("floor", 5.0))
            assert (floor.ttl_s, floor.reason) == (0.0, HoldReason.MAX_TTL)
        assert optimal_ttl(FAST_TOOL, 0.0, 0.0, 0.0).reason is HoldReason.MISS_IS_FREE
        fixed = optimal_ttl(FAST_TOOL, 1.0, 0.0, 0.0, TtlBound("fixed", 0.0))
        assert fixed.reason is HoldReason.OVERRIDE_FIXED

    def test_never_returning_is_never_held_for(self) -> None:
        never = kaplan_meier([math.inf], [True])
        assert optimal_ttl(never, 100.0, 1e-6, 300.0).ttl_s == 0.0

    def test_bounds(self) -> None:
        args = (FAST_TOOL, 1.0, 1.0, 300.0)
        free = optimal_ttl(*args).ttl_s
        assert 0.0 < free < 1.0
        fixed = optimal_ttl(*args, TtlBound("fixed", 42.0))
        assert (fixed.ttl_s, fixed.reason) == (42.0, HoldReason.OVERRIDE_FIXED)
        cap = optimal_ttl(*args, TtlBound("cap", 0.2))
        assert (cap.ttl_s, cap.reason) == (0.2, HoldReason.OVERRIDE_CAP)
        floor = optimal_ttl(*args, TtlBound("floor", 1000.0))
        assert (floor.ttl_s, floor.reason) == (300.0, HoldReason.MAX_TTL)
        floor = optimal_ttl(*args, TtlBound("floor", 300.0))
        assert (floor.ttl_s, floor.reason) == (300.0, HoldReason.OVERRIDE_FLOOR)
        fixed = optimal_ttl(*args, TtlBound("fixed", 301.0))
        assert (fixed.ttl_s, fixed.reason) == (300.0, HoldReason.MAX_TTL)
        assert optimal_ttl(*args, TtlBound("cap", 50.0)).ttl_s == free
        assert optimal_ttl(*args, TtlBound("floor", 0.01)).ttl_s == free

    @given(curves, st.floats(0.01, 100.0), st.floats(1e-4, 100.0), st.floats(1.01, 100.0))
    def test_a_larger_price_never_lengthens_it(
        self, curve: SurvivalCurve, benefit_s: float, price: float, factor: float
    ) -> None:
        cheap = optimal_ttl(curve, benefit_s, price, 300.0).ttl_s
        dear = optimal_ttl(curve, benefit_s, price * factor, 300.0).ttl_s
        assert dear <= cheap * (1 + 1e-9)

    @given(curves, st.floats(0.01, 100.0), st.floats(1e-4, 100.0), st.floats(0.0, 300.0))
    def test_no_other_ttl_is_worth_more(
        self, curve: SurvivalCurve, benefit_s: float, price: float, other_s: float
    ) -> None:
        best = optimal_ttl(curve, benefit_s, price, 300.0)
        for ttl_s in (other_s, *(t for t in curve.times if t <= 300.0)):
            value = benefit_s * (1 - curve.survival(ttl_s)) - price * curve.mean_restricted(ttl_s)
            assert value <= best.value_s + 1e-9 * (benefit_s + price * 300.0)


class TestDecideReturn:
    def test_sources(self) -> None:
        whole = decide_return(RETURN)
        assert (whole.source, whole.reload_tokens) == ("reload", 64_000)
        assert whole.reason is ReturnReason.RELOAD_CHEAPER
        gpu = decide_return(replace(RETURN, gpu_hit_tokens=64_000))
        assert (gpu.source, gpu.reload_tokens, gpu.reason) == ("gpu", 0, ReturnReason.GPU_HIT)
        none = decide_return(replace(RETURN, tier_hit_tokens=0))
        assert (none.source, none.reason) == ("recompute", ReturnReason.NO_HIT)
        short = decide_return(replace(RETURN, tier_hit_tokens=255))
        assert (short.source, short.reason) == ("recompute", ReturnReason.NO_HIT)
        empty = decide_return(replace(RETURN, prompt_tokens=0))
        assert (empty.source, empty.reason, empty.cost_s) == (
            "recompute",
            ReturnReason.EMPTY_PROMPT,
            0.0,
        )

    def test_a_slow_link_recomputes_and_says_why(self) -> None:
        slow = replace(RETURN, link=LinkModel(1e-3, ((65536, 1e7),)))
        decision = decide_return(slow)
        assert (decision.source, decision.reason) == ("recompute", ReturnReason.RECOMPUTE_CHEAPER)
        busy = decide_return(replace(RETURN, backlog_bytes=10**13))
        assert (busy.source, busy.reason) == ("recompute", ReturnReason.LINK_BUSY)
        assert dict(busy.costs)["recompute"] == busy.cost_s < dict(busy.costs)["reload"]

    def test_recompute_is_charged_for_those_it_delays(self) -> None:
        slow = replace(RETURN, link=LinkModel(1e-3, ((65536, 1e9),)), delayed_requests=0)
        alone, crowded = decide_return(slow), decide_return(replace(slow, delayed_requests=100))
        assert (alone.source, crowded.source) == ("recompute", "reload")

    def test_a_whole_stored_prompt_still_computes_a_token(self) -> None:
        state = replace(RETURN, prompt_tokens=64_000)
        decision = decide_return(state)
        assert decision.reload_tokens == 64_000
        assert decision.cost_s > state.link.seconds(64_000 * 131_072, 65536)
        held = decide_return(replace(state, gpu_hit_tokens=63_999))
        assert held.source == "gpu"

    def test_partial_gpu_hit_loads_only_the_rest(self) -> None:
        half = replace(RETURN, gpu_hit_tokens=32_000)
        decision = decide_return(half)
        assert decision.reload_tokens == 64_000
        saved_s = 32_000 * 131_072 / 25e9
        assert decide_return(RETURN).cost_s - decision.cost_s == pytest.approx(saved_s)

    def test_rejects_a_chunk_of_nothing(self) -> None:
        with pytest.raises(ValueError, match="chunk_tokens"):
            decide_return(replace(RETURN, chunk_tokens=0))

    returns = st.builds(
        ReturnState,
        prompt_tokens=st.integers(1, 4000),
        gpu_hit_tokens=st.integers(0, 4000),
        tier_hit_tokens=st.integers(0, 4000),
        chunk_tokens=st.integers(1, 300),
        kv_bytes_per_token=st.sampled_from([1000.0, 131_072.0]),
        link=st.builds(
            LinkModel,
            st.floats(0.0, 0.1),
            st.floats(1e5, 1e11).map(lambda rate: ((65536, rate),)),
        ),
        run_bytes=st.just(65536),
        prefill=st.builds(
            PrefillModel,
            st.floats(0.0, 0.1),
            st.floats(0.0, 1e-2),
            st.floats(0.0, 1e-5),
        ),
        backlog_bytes=st.integers(0, 10**9),
        delayed_requests=st.integers(0, 50),
        load_interference=st.floats(0.0, 0.5),
    )

    @given(returns)
    def test_equals_brute_force(self, state: ReturnState) -> None:
        decision = decide_return(state)
        reachable = min(state.tier_hit_tokens, state.prompt_tokens) // state.chunk_tokens
        best = min(return_cost_s(state, k * state.chunk_tokens) for k in range(reachable + 1))
        assert decision.cost_s == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert decision.reload_tokens % state.chunk_tokens == 0
        assert decision.reload_tokens <= min(state.tier_hit_tokens, state.prompt_tokens)
        assert decision.cost_s == return_cost_s(state, decision.reload_tokens)

    @given(returns, st.integers(1, 10**12))
    def test_more_backlog_never_leads_to_a_reload(self, state: ReturnState, more: int) -> None:
        busier = replace(state, backlog_bytes=state.backlog_bytes + more)
        if decide_return(state).source == "recompute":
            assert decide_return(busier).source == "recompute"

    def test_miss_cost_is_reload_aware(self) -> None:
        held = replace(RETURN, gpu_hit_tokens=64_000)
        staged = miss_cost_s(held)
        unstaged = miss_cost_s(replace(held, tier_hit_tokens=0))
        assert staged == pytest.approx(LINK.seconds(64_000 * 131_072, 65536))
        assert unstaged == pytest.approx(11 * PREFILL.seconds(0, 64_000))
        assert miss_cost_s(held, requeue_delay_s=2.0) == pytest.approx(staged + 2.0)
        assert miss_cost_s(replace(held, gpu_hit_tokens=0)) == 0.0


class TestDecidePause:
    def test_free_memory_pins_and_stages(self) -> None:
        decision = decide_pause(replace(PAUSE, memory=IDLE), FAST_TOOL)
        assert (decision.action, decision.stage) == ("pin", True)
        assert (decision.ttl_s, decision.reason) == (300.0, HoldReason.MEMORY_FREE)
        assert decision.stage_reason is StageReason.STAGED_AT_PAUSE
        assert decision.stage_tokens == 64_000
        assert set(dict(decision.costs)) == {"drop", "pin", "offload", "pin_and_stage"}

    def test_scarce_memory_offloads(self) -> None:
        memory = replace(BUSY, waiting_requests=500)
        decision = decide_pause(replace(PAUSE, memory=memory), TOOL_PRIOR)
        assert (decision.action, decision.stage, decision.ttl_s) == ("offload", True, 0.0)
        assert decision.reason is HoldReason.MEMORY_SCARCE

    def test_without_a_tier_the_pin_is_longer_and_nothing_is_staged(self) -> None:
        memory = replace(BUSY, waiting_requests=3)
        with_tier = decide_pause(replace(PAUSE, memory=memory), TOOL_PRIOR)
        state = replace(PAUSE, memory=memory, tier_available=False, staged_tokens=64_000)
        without = decide_pause(state, TOOL_PRIOR)
        assert without.action == "pin"
        assert without.ttl_s > with_tier.ttl_s
        assert (without.stage, without.stage_tokens) == (False, 0)
        assert without.stage_reason is StageReason.TIER_UNAVAILABLE
        hopeless = replace(state, pin_budget_blocks_left=0)
        assert decide_pause(hopeless, TOOL_PRIOR).action == "drop"

    def test_pin_budget(self) -> None:
        state = replace(PAUSE, memory=IDLE, pin_budget_blocks_left=3_999)
        decision = decide_pause(state, FAST_TOOL)
        assert (decision.action, decision.reason) == ("offload", HoldReason.PIN_BUDGET)
        assert decide_pause(replace(state, pin_budget_blocks_left=4_000), FAST_TOOL).action == "pin"

    def test_nothing_reusable_is_dropped(self) -> None:
        for state in (
            replace(PAUSE, reusable_tokens=0, kv_bytes=0, n_blocks=0, context_tokens=0),
            replace(PAUSE, output_tokens=64_000, output_reuse=0.0),
        ):
            decision = decide_pause(state, FAST_TOOL)
            assert (decision.action, decision.stage) == ("drop", False)
            assert decision.reason is HoldReason.NOTHING_REUSABLE

    def test_stage_reasons(self) -> None:
        def reason(**changes: int) -> StageReason:
            return decide_pause(replace(PAUSE, **changes), FAST_TOOL).stage_reason  # type: ignore[arg-type]

        assert reason(staged_tokens=64_000) is StageReason.ALREADY_STAGED
        assert reason(tier_free_bytes=64_000 * 131_072 - 1) is StageReason.TIER_FULL
        assert reason(tier_free_bytes=64_000 * 131_072) is StageReason.STAGED_AT_PAUSE
        # Only what is missing needs room.
        assert reason(tier_free_bytes=131_072 * 256, staged_tokens=63_744) is (
            StageReason.STAGED_AT_PAUSE
        )
        assert reason(chunk_tokens=100_000) is StageReason.SHORTER_THAN_CHUNK

    def test_staging_that_never_pays_is_not_done(self) -> None:
        slow = LinkModel(1.0, ((65536, 1e6),))
        state = replace(PAUSE, load_link=slow, store_link=slow)
        decision = decide_pause(state, FAST_TOOL)
        assert (decision.stage, decision.stage_reason) == (False, StageReason.NOT_WORTH_IT)

    def test_a_staged_program_is_offloaded_without_another_copy(self) -> None:
        memory = replace(BUSY, waiting_requests=500)
        decision = decide_pause(replace(PAUSE, memory=memory, staged_tokens=64_000), TOOL_PRIOR)
        assert (decision.action, decision.stage, decision.stage_tokens) == (
            "offload",
            False,
            64_000,
        )

    def test_output_that_never_hits_is_left_out(self) -> None:
        state = replace(PAUSE, output_tokens=1_000, memory=IDLE)
        kept = decide_pause(replace(state, output_reuse=0.9), FAST_TOOL)
        left = decide_pause(replace(state, output_reuse=0.05), FAST_TOOL)
        assert kept.keep_tokens == 64_000
        assert left.keep_tokens == 63_000 - 63_000 % 16
        assert left.stage_tokens == left.keep_tokens - left.keep_tokens % 256
        assert left.terms is not None
        assert left.terms.keep_blocks == left.keep_tokens // 16
        half = pause_terms(replace(state, output_reuse=0.5))
        full = pause_terms(replace(state, output_reuse=1.0))
        assert half.miss_unstaged_s < full.miss_unstaged_s

    def test_overrides_force_or_forbid_the_pin(self) -> None:
        scarce = replace(PAUSE, memory=replace(BUSY, waiting_requests=500))
        fixed = decide_pause(replace(scarce, ttl_bound=TtlBound("fixed", 60.0)), TOOL_PRIOR)
        assert (fixed.action, fixed.ttl_s) == ("pin", 60.0)
        assert fixed.reason is HoldReason.OVERRIDE_FIXED
        clipped = replace(scarce, ttl_bound=TtlBound("floor", 1e6), max_ttl_s=100.0)
        pinned = decide_pause(clipped, TOOL_PRIOR)
        assert (pinned.action, pinned.ttl_s) == ("pin", 100.0)
        assert pinned.reason is HoldReason.MAX_TTL
        none = decide_pause(replace(PAUSE, memory=IDLE, max_ttl_s=0.0), TOOL_PRIOR)
        assert (none.action, none.reason) == ("offload", HoldReason.MAX_TTL)
        idle = replace(PAUSE, memory=IDLE)
        for mode in ("fixed", "cap"):
            bound = TtlBound(mode, 0.0)
            never = decide_pause(replace(idle, ttl_bound=bound), FAST_TOOL)
            assert never.action == "offload"
        nothing = replace(scarce, ttl_bound=TtlBound("floor", 0.0))
        assert decide_pause(nothing, TOOL_PRIOR).action == "offload"
        over = replace(scarce, ttl_bound=TtlBound("fixed", 60.0), pin_budget_blocks_left=10)
        assert decide_pause(over, TOOL_PRIOR).reason is HoldReason.PIN_BUDGET

    def test_requeue_delay_counts_only_what_does_not_fit(self) -> None:
        state = replace(PAUSE, tier_available=False, running_requests=0)
        queue_s = BUSY.queue_delay_s
        half = replace(BUSY, waiting_blocks=0, free_cached_blocks=2_000)
        fits = replace(BUSY, waiting_blocks=0, free_cached_blocks=4_000)
        full = pause_terms(state).miss_unstaged_s
        assert full - pause_terms(replace(state, memory=half)).miss_unstaged_s == pytest.approx(
            queue_s / 2
        )
        assert full - pause_terms(replace(state, memory=fits)).miss_unstaged_s == pytest.approx(
            queue_s
        )

    @given(
        memory=memories,
        curve=curves,
        staged=st.integers(0, 64_000),
        budget=st.integers(0, 6_000),
        tier=st.booleans(),
    )
    def test_invariants(
        self, *, memory: MemoryState, curve: SurvivalCurve, staged: int, budget: int, tier: bool
    ) -> None:
        state = replace(
            PAUSE,
            memory=memory,
            staged_tokens=staged,
            pin_budget_blocks_left=budget,
            tier_available=tier,
        )
        decision = decide_pause(state, curve)
        costs = dict(decision.costs)
        assert all(math.isfinite(cost) and cost >= 0.0 for cost in costs.values())
        chosen = {
            ("pin", True): "pin_and_stage",
            ("pin", False): "pin",
            ("offload", True): "offload",
        }.get((decision.action, decision.stage), "drop")
        assert costs[chosen] == min(costs.values())
        assert (decision.ttl_s > 0.0) == (decision.action == "pin")
        assert 0.0 <= decision.ttl_s <= state.max_ttl_s
        if decision.action == "pin":
            assert budget >= 4_000
        if not tier:
            assert not decision.stage
            assert decision.action != "offload"
        if decision.action == "offload":
            assert decision.stage_tokens > 0

    @given(memories, curves, st.integers(1, 100))
    def test_a_longer_queue_never_lengthens_the_ttl_at_equal_misses(
        self, memory: MemoryState, curve: SurvivalCurve, more: int
    ) -> None:
        terms = pause_terms(replace(PAUSE, memory=memory))
        queue = replace(memory, waiting_requests=memory.waiting_requests + more)
        dearer = pause_terms(replace(PAUSE, memory=queue))
        assert dearer.price_s_per_s >= terms.price_s_per_s * (1 - 1e-9)
        before = optimal_ttl(curve, terms.miss_staged_s, terms.price_s_per_s, 300.0)
        after = optimal_ttl(curve, terms.miss_staged_s, dearer.price_s_per_s * 1.01, 300.0)
        assert after.ttl_s <= before.ttl_s * (1 + 1e-9)
