"""The figures of a replay: one flat record per policy, and what a program would take alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvtier.replay.machine import Scheduled, step_s
from kvtier.replay.text import shared_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvtier.replay.machine import Machine
    from kvtier.replay.simulation import Replayed
    from kvtier.replay.workload import Program, Turn

WALL_CLOCK: Final = ("wall_s", "decision_us_p50", "decision_us_p99")
"""Fields that two runs of one seed do not share."""


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy's figures. Seconds are virtual, but for `WALL_CLOCK`.

    Quantiles interpolate linearly between the two nearest values (numpy's default method). Token counts are over all
    prompts: found in GPU memory, loaded from the CPU tier, and computed again, which is what an earlier turn of the
    chain had computed, in whole blocks, and which came from neither.

    Attributes:
        policy: Its name.
        programs: Programs of the workload.
        completed: Those that ended.
        mean_jct_s: Job completion: from the arrival of a program's first request to the last token of its last,
            tool time included.
        p50_jct_s: Its median.
        p95_jct_s: Its 95th percentile.
        p99_jct_s: Its 99th percentile.
        mean_ttft_s: Time from a request's arrival to its first token.
        p99_ttft_s: Its 99th percentile.
        max_ttft_s: The longest.
        p99_first_ttft_s: The same of programs' first requests.
        p99_return_ttft_s: The same of requests after a gap; None where there are none.
        p99_slowdown: Of a program's job completion over what it would take alone (`alone_s`).
        preemptions: Requests that lost their KV while they ran.
        gpu_hit_tokens: Prompt tokens found in GPU memory.
        cpu_hit_tokens: Prompt tokens loaded from the CPU tier.
        recomputed_tokens: Prompt tokens computed again.
        steps: Engine steps.
        virtual_s: When the last program ended.
        busy_share: Share of that time in which the GPU computed.
        link_store_s: Time in which the link carried KV to CPU memory.
        link_load_s: Time in which it carried KV back.
        wall_s: How long the replay took, real time.
        decision_us_p50: Real time of one decision of kvtier; None for others.
        decision_us_p99: Its 99th percentile.
    """

    policy: str
    programs: int
    completed: int
    mean_jct_s: float
    p50_jct_s: float
    p95_jct_s: float
    p99_jct_s: float
    mean_ttft_s: float
    p99_ttft_s: float
    max_ttft_s: float
    p99_first_ttft_s: float
    p99_return_ttft_s: float | None
    p99_slowdown: float
    preemptions: int
    gpu_hit_tokens: int
    cpu_hit_tokens: int
    recomputed_tokens: int
    steps: int
    virtual_s: float
    busy_share: float
    link_store_s: float
    link_load_s: float
    wall_s: float
    decision_us_p50: float | None
    decision_us_p99: float | None

    def as_json(self, *, wall_clock: bool = True) -> dict[str, Any]:
        """Its fields in JSON types; without those of `WALL_CLOCK`, equal for equal seeds."""
        fields = asdict(self)
        return {k: v for k, v in fields.items() if wall_clock or k not in WALL_CLOCK}


def summarise(replayed: Replayed, programs: Sequence[Program], machine: Machine) -> PolicyResult:
    """The figures of one replay.

    Args:
        replayed: What it has seen; at least one program has ended.
        programs: The workload that was replayed.
        machine: What it was replayed on.
    """
    jct_s = {name: end_s - replayed.arrived_s[name] for name, end_s in replayed.ended_s.items()}
    slowdown = [
        jct_s[program.name] / alone_s(machine, program)
        for program in programs
        if program.name in jct_s
    ]
    turns = replayed.turns
    ttft_s = [turn.first_token_s - turn.arrived_s for turn in turns]
    own = zip(turns, ttft_s, strict=True)
    first_s = [s for turn, s in own if turn.index == 0 and turn.chain == turn.program]
    own = zip(turns, ttft_s, strict=True)
    return_s = [s for turn, s in own if turn.index > 0]
    known = known_tokens(programs, machine.block_tokens)
    jct = list(jct_s.values())
    return PolicyResult(
        policy=replayed.policy,
        programs=len(programs),
        completed=len(jct),
        mean_jct_s=_mean(jct),
        p50_jct_s=_quantile(jct, 50),
        p95_jct_s=_quantile(jct, 95),
        p99_jct_s=_quantile(jct, 99),
        mean_ttft_s=_mean(ttft_s),
        p99_ttft_s=_quantile(ttft_s, 99),
        max_ttft_s=max(ttft_s),
        p99_first_ttft_s=_quantile(first_s, 99),
        p99_return_ttft_s=_quantile(return_s, 99) if return_s else None,
        p99_slowdown=_quantile(slowdown, 99),
        preemptions=replayed.preemptions,
        gpu_hit_tokens=sum(turn.gpu_tokens for turn in turns),
        cpu_hit_tokens=sum(turn.cpu_tokens for turn in turns),
        recomputed_tokens=sum(
            max(0, known[turn.chain, turn.index] - turn.gpu_tokens - turn.cpu_tokens)
            for turn in turns
        ),
        steps=replayed.steps,
        virtual_s=replayed.virtual_s,
        busy_share=replayed.busy_s / replayed.virtual_s,
        link_store_s=replayed.link_busy_s.get("store", 0.0),
        link_load_s=replayed.link_busy_s.get("load", 0.0),
        wall_s=replayed.wall_s,
        decision_us_p50=_quantile(replayed.decision_us, 50) if replayed.decision_us else None,
        decision_us_p99=_quantile(replayed.decision_us, 99) if replayed.decision_us else None,
    )


# -- alone on the machine --------------------------------------------------------------------------


def alone_s(machine: Machine, program: Program) -> float:
    """Job completion of a program that has the machine for itself and finds all its earlier KV.

    Sub-agents of a turn run side by side and do not slow each other here, as the rest of a batch hardly does.
    """
    return _chain_alone_s(machine, program.turns, None)


def prefill_alone_s(machine: Machine, cached_tokens: int, prompt_tokens: int) -> float:
    """Time to compute a prompt of which so much is cached, in steps of `batch_tokens`."""
    seconds = 0.0
    while cached_tokens < prompt_tokens:
        new = min(machine.batch_tokens, prompt_tokens - cached_tokens)
        seconds += step_s(machine, [Scheduled(cached_tokens, new)])
        cached_tokens += new
    return seconds


def _chain_alone_s(machine: Machine, turns: Sequence[Turn], before: Turn | None) -> float:
    seconds = 0.0
    for number, turn in enumerate(turns):
        known = _known(before, turn, machine.block_tokens, follows=number > 0)
        seconds += prefill_alone_s(machine, known, turn.prompt_tokens)
        seconds += _decode_alone_s(machine, turn)
        seconds += max(
            (c.delay_s + _chain_alone_s(machine, c.turns, turn) for c in turn.children), default=0.0
        )
        if number + 1 < len(turns):
            seconds += turn.gap_s
        before = turn
    return seconds


def _decode_alone_s(machine: Machine, turn: Turn) -> float:
    """A step for each token after the first, which prefill gives. Steps grow evenly with the context."""
    n_steps = turn.output_tokens - 1
    if not n_steps:
        return 0.0
    first_s = step_s(machine, [Scheduled(turn.prompt_tokens, 1)])
    last_s = step_s(machine, [Scheduled(turn.prompt_tokens + n_steps - 1, 1)])
    return n_steps * (first_s + last_s) / 2


def known_tokens(programs: Sequence[Program], block_tokens: int) -> dict[tuple[str, int], int]:
    """Prompt tokens of each turn, by chain and index, that the turn before it has left behind.

    A chain's first turn finds those of the turn that started the chain; a program's first finds none, even
    where other programs of its scope begin alike.
    """
    return {
        key: known
        for program in programs
        for key, known in _known_of_chain(program.name, program.turns, None, block_tokens)
    }


def _known_of_chain(
    name: str, turns: Sequence[Turn], before: Turn | None, block_tokens: int
) -> Iterator[tuple[tuple[str, int], int]]:
    for index, turn in enumerate(turns):
        yield (name, index), _known(before, turn, block_tokens, follows=index > 0)
        for number, child in enumerate(turn.children):
            chain = f"{name}.{index}/{number}"
            yield from _known_of_chain(chain, child.turns, turn, block_tokens)
        before = turn


def _known(before: Turn | None, turn: Turn, block_tokens: int, *, follows: bool) -> int:
    if before is None:
        return 0
    shared = shared_tokens(before.prompt, turn.prompt)
    if follows and shared == before.prompt_tokens:
        # What was generated comes next; nobody has computed the KV of its last token.
        shared += before.output_tokens - 1
    # An engine computes at least one token, and keeps whole blocks.
    return min(shared, turn.prompt_tokens - 1) // block_tokens * block_tokens


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _quantile(values: Sequence[float], percent: int) -> float:
    return float(np.percentile(values, percent))
