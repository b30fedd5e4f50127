"""Generated programs: reproducible, well formed, and with the statistics that they are named after."""

from __future__ import annotations

import statistics
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING

import pytest

from kvtier.replay.text import shared_tokens
from kvtier.replay.workloads import synthetic
from kvtier.replay.workloads.synthetic import NAMES, generate

if TYPE_CHECKING:
    from kvtier.replay.workload import Program

N = 1500


@pytest.fixture(scope="module")
def swe_bench() -> list[Program]:
    return generate("swe-bench", N, 1)


@pytest.fixture(scope="module")
def bfcl() -> list[Program]:
    return generate("bfcl", N, 1)


@pytest.fixture(scope="module")
def claude_code() -> list[Program]:
    return generate("claude-code", N, 1)


def turns(programs: list[Program]) -> list[int]:
    return [len(program.turns) for program in programs]


def gaps_s(programs: list[Program]) -> list[float]:
    return [turn.gap_s for program in programs for turn in program.turns[:-1]]


def outputs(programs: list[Program]) -> list[int]:
    return [turn.output_tokens for program in programs for turn in program.turns]


def final_tokens(programs: list[Program]) -> list[int]:
    ends = [program.turns[-1] for program in programs]
    return [end.prompt_tokens + end.output_tokens for end in ends]


def growths(programs: list[Program]) -> list[int]:
    return [
        b.prompt_tokens - a.prompt_tokens
        for program in programs
        for a, b in pairwise(program.turns)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_fixes_each_program(name: str) -> None:
    programs = generate(name, 20, 3)
    assert generate(name, 20, 3) == programs
    assert generate(name, 5, 3) == programs[:5]
    assert len({program.turns for program in programs}) == 20
    assert {program.turns for program in generate(name, 20, 4)}.isdisjoint(
        {program.turns for program in programs}
    )


@pytest.mark.parametrize(
    ("name", "first_turns"),
    [
        ("swe-bench", [(4000, 520, 1.257), (8415, 315, 0.513), (18583, 99, 0.01)]),
        ("claude-code", [(17112, 121, 45.833), (17249, 107, 19.86), (17372, 1149, 9.813)]),
    ],
)
def test_programs_are_the_same_on_every_machine(
    name: str, first_turns: list[tuple[int, int, float]]
) -> None:
    program = generate(name, 3, 7)[2]
    told = [(turn.prompt_tokens, turn.output_tokens, turn.gap_s) for turn in program.turns[:3]]
    assert told == first_turns


@pytest.mark.parametrize("name", NAMES)
def test_prompts_extend_prompt_and_answer(name: str) -> None:
    programs = generate(name, 30, 0)
    assert len({program.name for program in programs}) == 30
    for program in programs:
        assert program.arrival_s == 0.0
        assert program.scope == ""
        for a, b in pairwise(program.turns):
            assert b.prompt[: len(a.prompt)] == a.prompt
            answer, result = b.prompt[len(a.prompt) :]
            assert answer.n_tokens == a.output_tokens
            assert answer.content != result.content
            assert shared_tokens(a.prompt, b.prompt) == a.prompt_tokens
        contents = [run.content for run in program.turns[-1].prompt]
        assert len(set(contents)) == len(contents)
        assert program.turns[-1].tool is None


def test_swe_bench_is_as_published(swe_bench: list[Program]) -> None:
    assert statistics.mean(turns(swe_bench)) == pytest.approx(10.9, rel=0.02)
    assert statistics.stdev(turns(swe_bench)) == pytest.approx(2.1, rel=0.05)
    assert statistics.mean(gaps_s(swe_bench)) == pytest.approx(0.925, rel=0.1)
    assert statistics.stdev(gaps_s(swe_bench)) == pytest.approx(3.55, rel=0.3)
    assert statistics.mean(final_tokens(swe_bench)) == pytest.approx(70_000, rel=0.03)
    assert statistics.stdev(final_tokens(swe_bench)) == pytest.approx(20_000, rel=0.1)
    assert {program.turns[0].prompt_tokens for program in swe_bench} == {synthetic.FIRST_TOKENS}


def test_bfcl_is_as_published(bfcl: list[Program]) -> None:
    assert statistics.mean(turns(bfcl)) == pytest.approx(6.3, rel=0.03)
    assert statistics.stdev(turns(bfcl)) == pytest.approx(2.3, rel=0.05)
    assert statistics.mean(gaps_s(bfcl)) == pytest.approx(1.92, rel=0.05)
    assert statistics.stdev(gaps_s(bfcl)) == pytest.approx(2.13, rel=0.1)
    assert statistics.mean(final_tokens(bfcl)) == pytest.approx(93_000, rel=0.05)
    # Cut at 400k tokens.
    assert statistics.stdev(final_tokens(bfcl)) == pytest.approx(69_000, rel=0.15)


def test_long_outputs_fit_into_a_small_program() -> None:
    shape = synthetic._Published((20.0, 0.0), (1.0, 1.0), (8_000, 1.0), "tool")
    for seed in range(20):
        first_tokens, steps = synthetic._published(Random(seed), shape)
        assert len(steps) == 20
        assert all(step.output_tokens >= 1 and step.result_tokens >= 1 for step in steps)
        results = sum(step.result_tokens for step in steps[:-1])
        total = first_tokens + sum(step.output_tokens for step in steps) + results
        assert total == pytest.approx(8_000, abs=4)


def test_claude_code_sizes_are_as_recorded(claude_code: list[Program]) -> None:
    assert statistics.median(turns(claude_code)) == pytest.approx(45, rel=0.1)
    first = [program.turns[0].prompt_tokens for program in claude_code]
    assert statistics.median(first) == pytest.approx(30_000, rel=0.05)
    assert statistics.median(growths(claude_code)) == pytest.approx(700, rel=0.05)
    assert statistics.quantiles(growths(claude_code), n=10)[8] == pytest.approx(4200, rel=0.05)
    assert statistics.median(outputs(claude_code)) == pytest.approx(216, rel=0.03)
    assert statistics.mean(outputs(claude_code)) == pytest.approx(434, rel=0.03)
    longest = max(t.prompt_tokens for program in claude_code for t in program.turns)
    assert 200_000 < longest <= synthetic.CLAUDE_MAX_TOKENS


def test_claude_code_gaps_are_as_recorded(claude_code: list[Program]) -> None:
    pauses = [turn for program in claude_code for turn in program.turns[:-1]]
    tools = [turn.gap_s for turn in pauses if turn.tool is not None]
    users = [turn.gap_s for turn in pauses if turn.tool is None]
    assert len(users) / len(pauses) == pytest.approx(0.05, rel=0.05)
    assert statistics.median(users) == pytest.approx(210, rel=0.15)
    percentiles = statistics.quantiles(tools, n=100)
    for percent, recorded_s in ((10, 4), (50, 9), (75, 19), (90, 68), (99, 610)):
        assert percentiles[percent - 1] == pytest.approx(recorded_s, rel=0.08), percent
    assert statistics.mean(tools) == pytest.approx(48, rel=0.08)


def test_uniform_programs_differ_in_their_gaps_only() -> None:
    programs = generate("uniform", 300, 0)
    shapes = {
        tuple((turn.prompt, turn.output_tokens) for turn in program.turns) for program in programs
    }
    assert len(shapes) == 1
    gaps = gaps_s(programs)
    mean_s = synthetic.UNIFORM_MEAN_GAP_S
    assert statistics.mean(gaps) == pytest.approx(mean_s, rel=0.05)
    # Exponential: as much spread as mean, and no memory.
    assert statistics.stdev(gaps) == pytest.approx(mean_s, rel=0.07)
    late = [gap - mean_s for gap in gaps if gap > mean_s]
    assert statistics.mean(late) == pytest.approx(mean_s, rel=0.07)


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'nope': expected swe-bench, bfcl, claude-code, uniform"):
        generate("nope", 1, 0)
