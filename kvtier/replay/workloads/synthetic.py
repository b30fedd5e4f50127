"""Generates programs whose sizes and times have published statistics.

The same name and seed give the same programs on every machine, and program i does not depend on how many
there are. Programs share no content. In each the next prompt is the one before, the model's answer and the
tool's result.

=============  ======================================================================================
swe-bench      Continuum (arXiv 2511.02230) on SWE-Bench: 10.9 +- 2.1 turns, tools 0.925 +- 3.55 s,
               70k +- 20k tokens a program
bfcl           The same of BFCL v4: 6.3 +- 2.3 turns, tools 1.92 +- 2.13 s, 93k +- 69k tokens
claude-code    Recorded Claude Code sessions: first prompts of 30k tokens, 700 new ones a turn (medians),
               tools of 4 to 610 s and user's gaps of minutes
uniform        Programs of one size that come back in uniformly random order: the hardest case for
               every policy that orders by recency
=============  ======================================================================================
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final

from kvtier.replay.workload import Program, Run, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_TURNS: Final = 500
MAX_PROGRAM_TOKENS: Final = 400_000
MAX_TOOL_S: Final = 600.0
OUTPUT_MEDIAN_TOKENS: Final = 216
OUTPUT_MEAN_TOKENS: Final = 434
MAX_OUTPUT_TOKENS: Final = 8_000
"""Outputs are log-normal with the median and mean of recorded Claude Code sessions, cut off here."""

FIRST_TOKENS: Final = 4_000
"""First prompt of swe-bench and bfcl: instructions, tools and the task."""

CLAUDE_MEDIAN_TURNS: Final = 45
CLAUDE_FIRST_MEDIAN_TOKENS: Final = 30_000
CLAUDE_FIRST_RANGE_TOKENS: Final = (8_000, 150_000)
CLAUDE_GROWTH_MEDIAN_TOKENS: Final = 700
CLAUDE_GROWTH_P90_TOKENS: Final = 4_200
CLAUDE_MAX_TOKENS: Final = 250_000
"""A session ends before its prompt would be longer; p90 of the recorded prompts is 234k tokens."""
CLAUDE_USER_SHARE: Final = 0.05
CLAUDE_USER_MEDIAN_S: Final = 210.0
CLAUDE_USER_SIGMA: Final = 2.25
CLAUDE_USER_RANGE_S: Final = (1.0, 14_400.0)
"""Gaps where the user answers: log-normal, with the spread of 321 recorded ones."""
CLAUDE_TOOL_QUANTILES: Final = (
    (0.0, 2.0),
    (0.1, 4.0),
    (0.25, 5.0),
    (0.5, 9.0),
    (0.75, 19.0),
    (0.9, 68.0),
    (0.95, 146.0),
    (0.99, 610.0),
    (1.0, 3600.0),
)
"""Gaps after a tool call in seconds: quantiles of 41,080 recorded ones, but for the ends, which are chosen.
The logarithm is linear in between. The mean is then 47 s; recorded were 48 s."""

UNIFORM_TURNS: Final = 20
UNIFORM_FIRST_TOKENS: Final = 32_000
UNIFORM_OUTPUT_TOKENS: Final = 32
UNIFORM_RESULT_TOKENS: Final = 32
UNIFORM_MEAN_GAP_S: Final = 30.0
"""Gaps are exponential: who comes back next is then independent of who left when."""

_FIRST_SIGMA = 0.6
_P90 = 1.2815515655446004
_GROWTH_SIGMA = math.log(CLAUDE_GROWTH_P90_TOKENS / CLAUDE_GROWTH_MEDIAN_TOKENS) / _P90
_OUTPUT_SIGMA = math.sqrt(2 * math.log(OUTPUT_MEAN_TOKENS / OUTPUT_MEDIAN_TOKENS))
# A prompt grows by the output and more. This correlation of their logarithms lets 92 % of the pairs be so.
_GROWTH_OUTPUT_CORRELATION = 0.8
_MIN_RESULT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class _Step:
    """A turn and what follows it; the tool's result is the rest of the next prompt."""

    output_tokens: int
    result_tokens: int
    gap_s: float
    tool: str | None


@dataclass(frozen=True, slots=True)
class _Published:
    """Mean and standard deviation of turns, tool times in seconds, and tokens a program."""

    turns: tuple[float, float]
    tool_s: tuple[float, float]
    program_tokens: tuple[float, float]
    tool: str


SWE_BENCH: Final = _Published((10.9, 2.1), (0.925, 3.55), (70_000, 20_000), "bash")
BFCL: Final = _Published((6.3, 2.3), (1.92, 2.13), (93_000, 69_000), "function")


def generate(name: str, n_programs: int, seed: int) -> list[Program]:
    """Programs of one of `NAMES`, all of which arrive at 0 s.

    Raises:
        ValueError: There is no such generator.
    """
    if name not in _GENERATORS:
        raise ValueError(f"no synthetic workload {name!r}: expected {', '.join(NAMES)}")
    programs = []
    for i in range(n_programs):
        first_tokens, steps = _GENERATORS[name](Random(f"{name}/{seed}/{i}"))  # noqa: S311 - no secret
        programs.append(_program(f"{name}-{i}", first_tokens, steps))
    return programs


def _program(name: str, first_tokens: int, steps: Sequence[_Step]) -> Program:
    text = [Run(0, first_tokens)]
    turns: list[Turn] = []
    for step in steps:
        # A program ends with an answer, not with a tool. Milliseconds, so that the last bit of a machine's
        # logarithm makes no difference.
        last = len(turns) + 1 == len(steps)
        gap_s, tool = (0.0, None) if last else (round(step.gap_s, 3), step.tool)
        turns.append(Turn(tuple(text), step.output_tokens, gap_s, tool))
        for n_tokens in (step.output_tokens, step.result_tokens):
            text.append(Run(len(text), n_tokens))
    return Program(name, 0.0, tuple(turns))


def _published(rng: Random, shape: _Published) -> tuple[int, list[_Step]]:
    """Turns normal, times and sizes log-normal; the program's tokens are its last prompt and output."""
    n_turns = round(_clipped(rng.gauss(*shape.turns), 1, MAX_TURNS))
    total = round(_clipped(_lognormal(rng, *shape.program_tokens), 8_000, MAX_PROGRAM_TOKENS))
    outputs = [_output_tokens(rng.gauss(0.0, 1.0)) for _ in range(n_turns)]
    if n_turns == 1:
        outputs = [min(outputs[0], total - FIRST_TOKENS)]
        return total - outputs[0], [_Step(outputs[0], 1, 0.0, shape.tool)]
    # What outputs leave is results, of random shares; long outputs are cut where they would leave nothing.
    fair = (total - FIRST_TOKENS) // n_turns
    outputs = [min(output, fair - 1) for output in outputs]
    left = total - FIRST_TOKENS - sum(outputs) - (n_turns - 1)
    marks = sorted(rng.randint(0, left) for _ in range(n_turns - 2))
    results = [1 + end - begin for begin, end in zip([0, *marks], [*marks, left], strict=True)]
    return FIRST_TOKENS, [
        _Step(output, result, min(_lognormal(rng, *shape.tool_s), MAX_TOOL_S), shape.tool)
        for output, result in zip(outputs, [*results, 1], strict=True)
    ]


def _swe_bench(rng: Random) -> tuple[int, list[_Step]]:
    return _published(rng, SWE_BENCH)


def _bfcl(rng: Random) -> tuple[int, list[_Step]]:
    return _published(rng, BFCL)


def _claude_code(rng: Random) -> tuple[int, list[_Step]]:
    first = CLAUDE_FIRST_MEDIAN_TOKENS * math.exp(rng.gauss(0.0, _FIRST_SIGMA))
    first_tokens = round(_clipped(first, *CLAUDE_FIRST_RANGE_TOKENS))
    # Geometric: every turn may be the last. 1 - random() is never 0.
    n_turns = 1 + int(math.log2(1.0 / (1.0 - rng.random())) * CLAUDE_MEDIAN_TURNS)
    n_tokens = first_tokens
    steps: list[_Step] = []
    while len(steps) < min(n_turns, MAX_TURNS) and n_tokens <= CLAUDE_MAX_TOKENS:
        grown, said = rng.gauss(0.0, 1.0), rng.gauss(0.0, 1.0)
        said = _GROWTH_OUTPUT_CORRELATION * grown + said * math.sqrt(
            1 - _GROWTH_OUTPUT_CORRELATION**2
        )
        growth = round(CLAUDE_GROWTH_MEDIAN_TOKENS * math.exp(_GROWTH_SIGMA * grown))
        output = _output_tokens(said)
        result = max(_MIN_RESULT_TOKENS, growth - output)
        asks_user = rng.random() < CLAUDE_USER_SHARE
        gap_s = _user_gap_s(rng) if asks_user else _tool_gap_s(rng)
        steps.append(_Step(output, result, gap_s, None if asks_user else "tool"))
        n_tokens += output + result
    return first_tokens, steps


def _uniform(rng: Random) -> tuple[int, list[_Step]]:
    return UNIFORM_FIRST_TOKENS, [
        _Step(
            UNIFORM_OUTPUT_TOKENS,
            UNIFORM_RESULT_TOKENS,
            rng.expovariate(1 / UNIFORM_MEAN_GAP_S),
            "tool",
        )
        for _ in range(UNIFORM_TURNS)
    ]


def _user_gap_s(rng: Random) -> float:
    gap_s = CLAUDE_USER_MEDIAN_S * math.exp(rng.gauss(0.0, CLAUDE_USER_SIGMA))
    return _clipped(gap_s, *CLAUDE_USER_RANGE_S)


def _tool_gap_s(rng: Random) -> float:
    u = rng.random()
    after = bisect_right(CLAUDE_TOOL_QUANTILES, u, key=lambda quantile: quantile[0])
    (u_low, low_s), (u_high, high_s) = CLAUDE_TOOL_QUANTILES[after - 1 : after + 1]
    return low_s * math.exp((u - u_low) / (u_high - u_low) * math.log(high_s / low_s))


def _output_tokens(normal: float) -> int:
    """Output tokens at a value of the standard normal distribution."""
    n_tokens = OUTPUT_MEDIAN_TOKENS * math.exp(_OUTPUT_SIGMA * normal)
    return round(_clipped(n_tokens, 1, MAX_OUTPUT_TOKENS))


def _lognormal(rng: Random, mean: float, sd: float) -> float:
    """A log-normal value of this mean and standard deviation."""
    variance = math.log1p((sd / mean) ** 2)
    return mean * math.exp(math.sqrt(variance) * rng.gauss(0.0, 1.0) - variance / 2)


def _clipped(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


_GENERATORS: Final[dict[str, Callable[[Random], tuple[int, list[_Step]]]]] = {
    "swe-bench": _swe_bench,
    "bfcl": _bfcl,
    "claude-code": _claude_code,
    "uniform": _uniform,
}
NAMES: Final = tuple(_GENERATORS)
