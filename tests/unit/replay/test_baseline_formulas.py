"""The rules of the baselines, without an engine: against brute force and figures worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.replay.baselines.cpu_tier import CpuTier
from kvtier.replay.baselines.eq2 import (
    ENOUGH_GAPS,
    QUEUEING_WINDOW,
    Gaps,
    Memoryfulness,
    Queueing,
    best_ttl_s,
    cold_ttl_s,
)
from kvtier.replay.baselines.facts import facts_by_request
from kvtier.replay.baselines.hooks import Surroundings
from kvtier.replay.baselines.min_waste import Recompute, preserve_waste
from kvtier.replay.baselines.offline_profile import prefill_s, reload_s, restore_s
from kvtier.replay.baselines.plas import BOUNDS_S, Call, ProgramService
from kvtier.replay.baselines.retention import RetentionPolicy
from kvtier.replay.baselines.utilisation import (
    BUFFER_TOKENS,
    ProgramState,
    left_tokens,
    may_begin,
    to_pause,
    to_resume,
)
from kvtier.replay.machine import GpuSpec, Machine, ModelSpec, Scheduled, step_s
from kvtier.replay.workload import Child, Program, Run, Turn

MODEL = ModelSpec("m", 8e9, 8e9, 32, 32, 8, 128, 4096)
GPU = GpuSpec("g", 1000e12, 3.2e12, 80e9, 50e9)
MACHINE = Machine(MODEL, GPU, 1, 50e9, 100e9, 50e9)

gaps_s = st.lists(st.floats(0, 1000), min_size=1, max_size=40)


# -- Continuum -------------------------------------------------------------------------------------


def brute_force(gaps: list[float], benefit_s: float) -> float:
    """Equation 2's best value over every gap and 0."""
    return max(
        sum(gap <= tau for gap in gaps) / len(gaps) * benefit_s - tau for tau in {0.0, *gaps}
    )


@given(gaps_s, st.floats(-100, 1000))
def test_equation_2_finds_the_best_time(gaps: list[float], benefit_s: float) -> None:
    tau = best_ttl_s(sorted(gaps), benefit_s)
    value = sum(gap <= tau for gap in gaps) / len(gaps) * benefit_s - tau
    assert value == pytest.approx(brute_force(gaps, benefit_s), abs=1e-9)


def test_equation_2_by_hand() -> None:
    gaps = [1.0] * 8 + [9.0, 100.0]
    # 0.8 * 10 - 1 = 7 at 1 s; 0.9 * 10 - 9 = 0 at 9 s.
    assert best_ttl_s(gaps, 10.0) == 1.0
    # 0.9 * 90 - 9 = 72 at 9 s; 0.8 * 90 - 1 = 71 at 1 s.
    assert best_ttl_s(gaps, 90.0) == 9.0
    # Holding a second costs more than it is worth.
    assert best_ttl_s(gaps, 1.2) == 0.0
    assert best_ttl_s(gaps, -5.0) == 0.0


def test_of_equal_times_the_shortest() -> None:
    # 0.5 * 2 - 1 = 0 at 1 s, 1 * 2 - 2 = 0 at 2 s, and 0 without a pin.
    assert best_ttl_s([1.0, 2.0], 2.0) == 0.0


@given(st.floats(0, 1e6))
def test_cold_start_is_the_optimum_for_exponential_gaps(benefit_s: float) -> None:
    tau = cold_ttl_s(benefit_s)

    def value(at: float) -> float:
        return (1 - math.exp(-at)) * benefit_s - at

    assert tau >= 0
    assert all(value(tau) >= value(max(0, tau + d)) - 1e-9 for d in (-1, -0.01, 0.01, 1))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_eta_is_a_correlation(lengths: list[int]) -> None:
    memory = Memoryfulness()
    pairs = []
    for n_turns in lengths:
        memory.add(n_turns)
        pairs += [(k, n_turns - k) for k in range(1, n_turns + 1)]
    served, left = zip(*pairs, strict=True)
    if len(set(served)) > 1 and len(set(left)) > 1:
        expected = -np.corrcoef(served, left)[0, 1]
        assert memory.eta == pytest.approx(expected, abs=1e-9)
    else:
        assert memory.eta == 1.0


def test_eta_of_equally_long_programs_is_1() -> None:
    memory = Memoryfulness()
    assert memory.eta == 1.0
    for _ in range(5):
        memory.add(10)
    assert memory.eta == pytest.approx(1.0)


def test_eta_of_programs_that_may_end_at_any_turn_is_near_0() -> None:
    memory = Memoryfulness()
    for n_turns in np.random.default_rng(0).geometric(0.1, 5000):
        memory.add(int(n_turns))
    assert abs(memory.eta) < 0.05


def test_queueing_is_the_mean_of_the_last_samples() -> None:
    queueing = Queueing()
    assert queueing.mean_s == 0.0
    for delay_s in range(QUEUEING_WINDOW + 50):
        queueing.add(float(delay_s))
    assert queueing.mean_s == pytest.approx(50 + (QUEUEING_WINDOW - 1) / 2)


def test_a_tool_has_its_own_distribution_once_it_has_enough_gaps() -> None:
    gaps = Gaps()
    for i in range(ENOUGH_GAPS):
        gaps.add("slow", float(i))
    assert gaps.known("slow") is None
    gaps.add("quick", 0.5)
    known = gaps.known("slow")
    assert known is not None
    assert len(known) == ENOUGH_GAPS + 1
    gaps.add("slow", 3.0)
    assert list(gaps.known("slow") or ()) == sorted([*map(float, range(ENOUGH_GAPS)), 3.0])
    assert len(gaps.known("quick") or ()) == ENOUGH_GAPS + 2


# -- costs, InferCept ------------------------------------------------------------------------------


def test_prefill_is_the_sum_of_its_chunks() -> None:
    expected = step_s(MACHINE, [Scheduled(0, 8192)]) + step_s(MACHINE, [Scheduled(8192, 1808)])
    assert prefill_s(MACHINE, 10_000) == pytest.approx(expected)
    assert prefill_s(MACHINE, 0) == 0.0


def test_a_context_comes_from_the_tier_where_there_is_one() -> None:
    assert reload_s(MACHINE, 1000) == pytest.approx(0.001 + 1000 * 131072 / 50e9)
    assert restore_s(MACHINE, 1000) == reload_s(MACHINE, 1000)
    without = Machine(MODEL, GPU, 1, 50e9, 0.0, 50e9)
    assert restore_s(without, 1000) == prefill_s(without, 1000)


def test_wastes_by_hand() -> None:
    assert preserve_waste(3.0, 1000) == 3000.0
    # 4 s for 1000 tokens in 2 chunks of 2 s, next to 500 tokens.
    assert Recompute(1000, 4.0, 2, 2.0).waste(500) == 4.0 * 1000 / 2 + 2 * 2.0 * 500


@given(st.integers(1, 100_000), st.integers(0, 100_000))
def test_discard_wastes_more_of_more(context: int, other: int) -> None:
    recompute = Recompute.of(MACHINE, context)
    assert recompute.n_chunks == math.ceil(context / MACHINE.batch_tokens)
    assert recompute.n_chunks * recompute.chunk_s == pytest.approx(recompute.whole_s)
    assert recompute.waste(other + 1) > recompute.waste(other)
    assert Recompute.of(MACHINE, context + 1).waste(other) > recompute.waste(other)


# -- Autellix --------------------------------------------------------------------------------------


def test_a_call_sinks_as_it_is_served() -> None:
    call = Call(ProgramService(), inherited_s=0.0, since_s=0.0)
    assert call.level(BOUNDS_S) == 0
    call.served_s = 1.0
    assert call.level(BOUNDS_S) == 1
    call.served_s = 1e9
    assert call.level(BOUNDS_S) == len(BOUNDS_S)


def test_calls_inherit_what_their_program_has_attained() -> None:
    program = ProgramService()
    for attained_s in (0.0, 3.0, 6.0):
        call = Call(program, program.attained_s, since_s=0.0)
        assert call.inherited_s == attained_s
        call.served_s = 3.0
        call.end(now_s=5.0)
    assert (program.attained_s, program.served_s, program.waited_s) == (9.0, 9.0, 6.0)


def test_parallel_calls_count_by_the_longest() -> None:
    program = ProgramService(attained_s=10.0)
    calls = [Call(program, 10.0, since_s=0.0, served_s=served_s) for served_s in (5.0, 7.0, 2.0)]
    for call in calls:
        call.end(now_s=10.0)
    assert program.attained_s == 17.0


def test_who_waits_much_longer_than_served_is_promoted_and_sinks_again() -> None:
    program = ProgramService(attained_s=100.0, waited_s=10.0, served_s=10.0)
    call = Call(program, 100.0, since_s=0.0)
    assert not call.starves(29.0, beta=4.0)
    assert call.starves(30.0, beta=4.0)
    call.served_s = 5.0
    call.promote(40.0)
    assert call.level(BOUNDS_S) == 0
    assert call.waited_s(40.0) == 0.0
    call.served_s = 2.5
    assert call.level(BOUNDS_S) == 2
    call.end(42.5)
    assert program.attained_s == 107.5
    # Only what came after the promotion counts for the next one.
    assert (program.waited_s, program.served_s) == (10.0, 12.5)


# -- ThunderAgent ----------------------------------------------------------------------------------


def state(name: str, tokens: int, **fields: Any) -> ProgramState:
    return ProgramState(name, tokens, **fields)


def test_programs_resume_by_kind_and_size() -> None:
    programs = [
        state("tool", 100, n_turns=2, is_paused=True),
        state("new", 200, n_requests=1, n_turns=1, is_paused=True),
        state("big", 500, n_requests=1, n_turns=3, is_paused=True),
        state("small", 300, n_requests=1, n_turns=3, is_paused=True),
        state("active", 1000, n_turns=2),
    ]
    everything = 1000 + 100 + 200 + 500 + 300 + 5 * BUFFER_TOKENS
    assert left_tokens(everything, programs) == everything - 1000 - BUFFER_TOKENS
    names = [one.name for one in to_resume(everything, programs)]
    assert names == ["small", "big", "new", "tool"]
    # With 300 less, the last that fits is the smallest.
    assert [one.name for one in to_resume(everything - 300, programs)] == ["small", "big", "tool"]
    assert to_resume(1000 + 2 * BUFFER_TOKENS, programs) == []


def test_programs_that_use_tools_are_paused_first() -> None:
    programs = [
        state("works", 100, n_requests=1, n_turns=1),
        state("big tool", 500, n_turns=2),
        state("small tool", 300, n_turns=2),
    ]
    assert to_pause(900 + 3 * BUFFER_TOKENS, programs) == []
    assert [one.name for one in to_pause(900 + 2 * BUFFER_TOKENS, programs)] == ["small tool"]
    assert [one.name for one in to_pause(100, programs)] == ["small tool", "big tool", "works"]


def test_what_is_marked_counts_as_gone() -> None:
    programs = [
        state("marked", 500, n_requests=1, n_turns=2, is_marked=True),
        state("works", 400, n_requests=1, n_turns=2),
    ]
    assert to_pause(400 + BUFFER_TOKENS, programs) == []


def test_a_new_program_waits_behind_others() -> None:
    new = state("new", 100, n_requests=1, n_turns=1)
    assert may_begin(100 + BUFFER_TOKENS, new, [])
    assert not may_begin(99 + BUFFER_TOKENS, new, [])
    assert not may_begin(10_000, new, [state("paused", 5, is_paused=True)])


def test_one_goes_on_where_none_fits() -> None:
    programs = [state("a", 900, n_requests=1, n_turns=2, is_paused=True)]
    assert to_resume(500, programs) == programs


# -- the CPU tier ----------------------------------------------------------------------------------


def hashes(*numbers: int) -> list[bytes]:
    return [number.to_bytes(4, "big") for number in numbers]


def test_a_block_is_readable_when_it_has_been_written() -> None:
    tier = CpuTier(4)
    assert tier.begin_write(hashes(1, 2)) == hashes(1, 2)
    assert tier.n_leading(hashes(1, 2), 0, 2) == 0
    assert tier.begin_write(hashes(1, 2, 3)) == hashes(3)
    tier.end_write(hashes(1, 2))
    assert tier.n_leading(hashes(1, 2, 3), 0, 3) == 2
    assert tier.n_leading(hashes(0, 1, 2, 3), 1, 4) == 2


def test_what_was_used_longest_ago_goes_and_the_end_of_a_text_before_its_beginning() -> None:
    tier = CpuTier(4)
    tier.end_write(tier.begin_write(hashes(1, 2, 3, 4)))
    tier.touch(hashes(1, 2))
    tier.begin_write(hashes(5, 6, 7))
    assert [tier.has(one) for one in hashes(1, 2, 3, 4)] == [True, False, False, False]
    assert tier.evicted_blocks == 3


def test_no_room_is_made_of_blocks_in_use() -> None:
    tier = CpuTier(3)
    tier.end_write(tier.begin_write(hashes(1, 2)))
    tier.begin_read(hashes(1, 2))
    tier.begin_read(hashes(1))
    assert tier.begin_write(hashes(3, 4)) == hashes(3)
    tier.end_read(hashes(1, 2))
    assert tier.begin_write(hashes(4)) == hashes(4)
    assert not tier.has(hashes(2)[0])
    assert tier.has(hashes(1)[0])
    assert tier.refused_blocks == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 15))), max_size=60))
def test_the_tier_never_holds_more_than_fits_nor_drops_what_is_used(
    steps: list[tuple[int, set[int]]],
) -> None:
    tier = CpuTier(6)
    written: list[bytes] = []
    read: list[bytes] = []
    for kind, numbers in steps:
        chosen = hashes(*sorted(numbers))
        if kind == 0:
            written += tier.begin_write(chosen)
        elif kind == 1:
            tier.end_write(written)
            written = []
        elif kind == 2:
            chosen = [one for one in chosen if tier.has(one)]
            tier.begin_read(chosen)
            read += chosen
        else:
            tier.end_read(read)
            read = []
        assert len(tier) <= 6
        assert all(tier.has(one) for one in read)
        assert not any(tier.has(one) for one in written)


def test_there_may_be_no_tier() -> None:
    assert CpuTier(0).begin_write(hashes(1)) == []


# -- facts and pins --------------------------------------------------------------------------------


def turn(tool: str | None = "t", children: tuple[Child, ...] = ()) -> Turn:
    return Turn((Run(0, 100),), 10, 1.0, tool, children)


def test_facts_follow_the_ids_of_requests() -> None:
    child = Child(0.0, (turn("inner"), turn(None)))
    program = Program("p", 0.0, (turn("task", (child, child)), turn(None)))
    facts = facts_by_request([program])
    assert set(facts) == {"p.0", "p.1", "p.0/0.0", "p.0/0.1", "p.0/1.0", "p.0/1.1"}
    assert (facts["p.0"].tool, facts["p.0"].ends_chain) == ("task", False)
    assert (facts["p.1"].index, facts["p.1"].ends_program) == (1, True)
    inner = facts["p.0/1.1"]
    assert (inner.program, inner.chain) == ("p", "p.0/1")
    assert (inner.ends_chain, inner.ends_program) == (True, False)


class FakePool:
    """Counts references, as vLLM's pool does."""

    def __init__(self, n_blocks: int) -> None:
        self.references = dict.fromkeys(range(n_blocks), 0)

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            self.references[block] += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            self.references[block] -= 1
            assert self.references[block] >= 0

    def get_num_free_blocks(self) -> int:
        return sum(not count for count in self.references.values())


class ForEver(RetentionPolicy):
    def ttl_s(self, facts: Any, n_tokens: int) -> float:
        return self.ttl

    ttl = 1e9


class Bench:
    """A retention policy with made-up requests: 10 blocks each, in a pool of 30."""

    def __init__(self, n_programs: int = 3) -> None:
        programs = [Program(f"p{i}", 0.0, (turn(), turn(), turn())) for i in range(n_programs)]
        self.now_s = 0.0
        self.pool = FakePool(30)
        scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=self.pool))
        facts = facts_by_request(programs)
        self.policy = ForEver(Surroundings(lambda: self.now_s, MACHINE, facts, scheduler, None))

    def request(self, request_id: str) -> Any:
        return SimpleNamespace(request_id=request_id, num_tokens=640)

    def run(self, request_id: str, first_block: int) -> None:
        """A turn that arrives, gets its blocks, and ends, at once."""
        request, blocks = self.request(request_id), list(range(first_block, first_block + 10))
        self.policy.arrived(request)
        self.policy.allocated(request)
        self.pool.touch(blocks)
        self.policy.finished(request, blocks)
        self.pool.free_blocks(blocks)


def test_a_pin_lasts_until_the_next_turn_has_its_blocks() -> None:
    bench = Bench()
    bench.run("p0.0", 0)
    assert bench.pool.get_num_free_blocks() == 20
    bench.policy.arrived(bench.request("p0.1"))
    assert bench.pool.get_num_free_blocks() == 20
    bench.policy.allocated(bench.request("p0.1"))
    assert bench.pool.get_num_free_blocks() == 30


def test_a_pin_expires_unless_the_next_turn_waits() -> None:
    bench = Bench()
    bench.policy.ttl = 5.0
    bench.run("p0.0", 0)
    bench.run("p1.0", 10)
    bench.policy.arrived(bench.request("p0.1"))
    bench.now_s = 5.0
    bench.policy.before_step()
    assert len(bench.policy.pins) == 2
    bench.now_s = 5.1
    bench.policy.before_step()
    assert "p0" in bench.policy.pins
    assert "p1" not in bench.policy.pins


def test_the_last_turn_pins_nothing() -> None:
    bench = Bench()
    bench.run("p0.0", 0)
    bench.run("p0.2", 10)
    assert bench.pool.get_num_free_blocks() == 30


def test_pins_yield_the_latest_program_first_and_its_own_last() -> None:
    bench = Bench(4)
    for i in range(3):
        bench.now_s = float(i)
        bench.run(f"p{i}.0", 10 * i)
    wanted = bench.request("p2.1")
    bench.policy.arrived(wanted)
    fits_with = 15

    def retry() -> Any:
        return "blocks" if bench.pool.get_num_free_blocks() >= fits_with else None

    assert bench.policy.make_room(wanted, retry, lambda: 0) == "blocks"
    assert "p2" in bench.policy.pins
    assert len(bench.policy.pins) == 1
    assert bench.policy.make_room(wanted, lambda: None, lambda: 0) is None
    assert bench.pool.get_num_free_blocks() == 30


def test_queueing_counts_for_those_that_return_without_a_pin() -> None:
    bench = Bench()
    seen: list[float] = []
    bench.policy.saw_queueing = seen.append  # type: ignore[method-assign]
    bench.run("p0.0", 0)
    bench.run("p1.0", 10)
    for name in ("p0.1", "p1.1", "p2.0"):
        bench.policy.arrived(bench.request(name))
    bench.policy.pins.release("p1")
    bench.now_s = 3.0
    for name in ("p0.1", "p1.1", "p2.0", "p1.1"):
        bench.policy.allocated(bench.request(name))
    assert seen == [3.0]
