"""Figures of a replay: against some worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.replay.machine import GpuSpec, Machine, ModelSpec, Scheduled, step_s
from kvtier.replay.summary import (
    WALL_CLOCK,
    alone_s,
    known_tokens,
    prefill_alone_s,
    summarise,
)
from kvtier.replay.workload import Child, Program, Run, Turn

# A step takes its overhead of a second, whatever it computes.
SECOND_A_STEP = Machine(
    model=ModelSpec("small", 1e9, 1e9, 2, 2, 1, 64, 128),
    gpu=GpuSpec("fast", 1e40, 1e40, 80e9, 50e9, step_overhead_s=1.0),
    n_gpus=1,
    gpu_kv_bytes=50e9,
    dram_bytes=0.0,
    link_bytes_per_s=50e9,
    block_tokens=10,
    batch_tokens=100,
)
# 255 tokens with the answer of the first turn, of which the last one has no KV yet: 25 blocks.
FIRST = Turn((Run(0, 250),), output_tokens=5, gap_s=2.0, tool="bash")
SECOND = Turn((Run(0, 250), Run(1, 5), Run(2, 30)), output_tokens=1, gap_s=99.0)
ADA = Program("ada", 0.0, (FIRST, SECOND))


def turn(program: str, index: int, arrived_s: float, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "chain": program,
        "prompt_tokens": 250,
        "first_token_s": arrived_s + 1.0,
        "ended_s": arrived_s + 2.0,
        "gpu_tokens": 0,
        "cpu_tokens": 0,
    }
    return SimpleNamespace(program=program, index=index, arrived_s=arrived_s, **(values | changes))


def replayed(turns: list[Any], ended_s: dict[str, float], **changes: Any) -> Any:
    first = {t.program: t.arrived_s for t in reversed(turns)}
    values: dict[str, Any] = {
        "steps": 7,
        "preemptions": 1,
        "busy_s": 5.0,
        "virtual_s": 20.0,
        "wall_s": 0.5,
        "link_busy_s": {},
        "link_bytes": {},
        "decision_us": [],
        "counters": {},
        "memory": [],
    }
    return SimpleNamespace(
        policy="p", turns=turns, arrived_s=first, ended_s=ended_s, **(values | changes)
    )


def test_alone_is_steps_and_gaps() -> None:
    # 250 tokens in 3 steps, 4 more tokens, the gap, 35 tokens in 1 step; nothing after the last turn.
    assert alone_s(SECOND_A_STEP, ADA) == 3 + 4 + 2 + 1


def test_alone_waits_for_the_longest_sub_agent() -> None:
    # The parent's 200 first tokens are known to the children: 60 and 150 tokens more.
    short = Child(1.0, (Turn((Run(0, 200), Run(7, 60)), 1, 0.0),))
    long = Child(0.5, (Turn((Run(0, 200), Run(8, 150)), 2, 0.0),))
    first = replace(FIRST, children=(short, long))
    program = Program("bob", 0.0, (first, SECOND))
    assert alone_s(SECOND_A_STEP, program) == 3 + 4 + (0.5 + 2 + 1) + 2 + 1
    # At the end of a program they count too, without the gap.
    assert alone_s(SECOND_A_STEP, Program("bob", 0.0, (first,))) == 3 + 4 + (0.5 + 2 + 1)


def test_decoding_alone_is_the_sum_of_its_steps() -> None:
    gpu = GpuSpec("gpu", 1e15, 1e12, 80e9, 50e9)
    machine = replace(SECOND_A_STEP, gpu=gpu)
    program = Program("ada", 0.0, (Turn((Run(0, 250),), 50, 0.0),))
    one_by_one = sum(step_s(machine, [Scheduled(250 + i, 1)]) for i in range(49))
    assert alone_s(machine, program) == pytest.approx(prefill_alone_s(machine, 0, 250) + one_by_one)


def test_known_tokens_are_whole_blocks_of_the_turn_before() -> None:
    cut = Turn((Run(0, 97), Run(5, 50)), 1, 0.0)
    same = Turn((Run(0, 97), Run(5, 50)), 1, 0.0)
    child = Child(0.0, (Turn((Run(0, 25), Run(6, 5)), 1, 0.0),))
    program = Program("p", 0.0, (FIRST, replace(SECOND, children=(child,)), cut, same))
    assert known_tokens([program], 10) == {
        ("p", 0): 0,
        ("p", 1): 250,
        ("p.1/0", 0): 20,
        ("p", 2): 90,
        # One token at least is computed, so that 147 known ones are 146.
        ("p", 3): 140,
    }


def test_figures() -> None:
    bob = Program("bob", 1.0, (FIRST,))
    turns = [
        turn("ada", 0, 0.0, first_token_s=3.0, ended_s=7.0),
        turn("bob", 0, 1.0, first_token_s=5.0, ended_s=15.0),
        turn("ada", 1, 9.0, first_token_s=15.0, ended_s=20.0, gpu_tokens=100, cpu_tokens=50),
    ]
    made = summarise(
        replayed(
            turns,
            {"bob": 15.0, "ada": 20.0},
            link_busy_s={"store": 0.25, "load": 0.75},
            decision_us=[10.0, 20.0, 30.0],
        ),
        [ADA, bob],
        SECOND_A_STEP,
    )
    # JCT: ada 20, bob 14; alone 10 and 7, so that both take twice as long.
    assert (made.programs, made.completed) == (2, 2)
    assert (made.mean_jct_s, made.p50_jct_s) == (17.0, 17.0)
    assert made.p95_jct_s == pytest.approx(14 + 0.95 * 6)
    assert made.p99_jct_s == pytest.approx(14 + 0.99 * 6)
    assert made.p99_slowdown == pytest.approx(2.0)
    # TTFT: 3, 4, 6.
    assert made.mean_ttft_s == pytest.approx(13 / 3)
    assert made.p99_ttft_s == pytest.approx(4 + 0.98 * 2)
    assert made.max_ttft_s == 6.0
    assert made.p99_first_ttft_s == pytest.approx(3.99)
    assert made.p99_return_ttft_s == 6.0
    # 250 tokens were left behind, 150 of them found.
    assert (made.gpu_hit_tokens, made.cpu_hit_tokens) == (100, 50)
    assert made.recomputed_tokens == 100
    assert (made.steps, made.preemptions) == (7, 1)
    assert (made.virtual_s, made.busy_share, made.wall_s) == (20.0, 0.25, 0.5)
    assert (made.link_store_s, made.link_load_s) == (0.25, 0.75)
    assert made.decision_us_p50 == 20.0
    assert made.decision_us_p99 == pytest.approx(29.8)


def test_more_found_than_expected_is_no_recomputation() -> None:
    # Shared text of other programs may be found by a first turn.
    bob = Program("bob", 0.0, (FIRST,))
    made = summarise(
        replayed([turn("bob", 0, 0.0, gpu_tokens=200)], {"bob": 2.0}), [bob], SECOND_A_STEP
    )
    assert made.recomputed_tokens == 0
    assert made.p99_return_ttft_s is None
    assert made.decision_us_p50 is None
    assert made.decision_us_p99 is None


def test_sub_agents_are_neither_first_nor_returns() -> None:
    child = Child(0.0, (Turn((Run(9, 50),), 1, 0.0),))
    program = Program("bob", 0.0, (replace(FIRST, children=(child,)),))
    turns = [
        turn("bob", 0, 0.0),
        turn("bob", 0, 2.0, chain="bob.0/0", first_token_s=90.0, ended_s=91.0),
    ]
    made = summarise(replayed(turns, {"bob": 91.0}), [program], SECOND_A_STEP)
    assert made.p99_first_ttft_s == 1.0
    assert made.p99_return_ttft_s is None
    assert made.max_ttft_s == 88.0


def test_real_times_can_be_left_out() -> None:
    bob = Program("bob", 0.0, (FIRST,))
    made = summarise(replayed([turn("bob", 0, 0.0)], {"bob": 2.0}), [bob], SECOND_A_STEP)
    assert set(made.as_json()) - set(made.as_json(wall_clock=False)) == set(WALL_CLOCK)
