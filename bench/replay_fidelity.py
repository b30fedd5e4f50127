"""How well replay predicts a real engine: the step clock fitted to one real run, tried on another.

    python bench/replay_fidelity.py [--programs 24] [--rate 0.8] [--limit-s 150] [--json FILE]

Runs two small workloads of other seeds, one after the other, on a real vLLM engine with kvtier in this process, on the
CPU: agents whose turns come in real time. `kvtier.replay.step_clock` is fitted to the steps of the first one. Then
both are replayed in virtual time with that clock, and the mean time to first token and the mean job completion time
are compared: of the first run for reference, of the second, held-out one for the figure that counts.

The engine has no CPU tier here, so that the link plays no part: order, admission, pins and steps do. Measure on a
machine with nothing else to do. Nothing is enforced; the aim of 10 % is printed next to the errors.

A virtual machine may compute a fifth faster or slower some seconds later, and waiting times in a queue answer more than in
proportion. So a fixed piece of work is timed twice a second in both real runs, between steps. The clock is fitted to steps as
they would have been at one pace, and both runs are replayed at the pace that the fixed work had then; and at one pace. Told the
pace of the run, a replay explains more than it forecasts: what is tried is everything else.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Final, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

from kvtier.replay.agents import Agents, Chain
from kvtier.replay.machine import GpuSpec, Machine, ModelSpec, Scheduled
from kvtier.replay.step_clock import StepClock, fit
from kvtier.replay.workload import Program, Run, Turn
from tests.engine.engine_harness import BLOCK_TOKENS, engine_arguments, prepare_process
from tests.engine.tiny_model import HIDDEN, LAYERS, VOCABULARY, write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

AIM: Final = 0.10
N_BLOCKS: Final = 600
BATCH_TOKENS: Final = 512
MAX_RUNNING: Final = 8
MODEL_TOKENS: Final = 8192
TURNS: Final = (3, 8)
FIRST_TOKENS: Final = (400, 1600)
RESULT_TOKENS: Final = (60, 400)
OUTPUT_TOKENS: Final = (20, 80)
MEAN_GAP_S: Final = 0.5
TOLD_EVERY_S: Final = 5.0
PACE_EVERY_S: Final = 0.5
PACE_WINDOW_S: Final = 1.5
_CHANCE = "fidelity"


@dataclass(slots=True)
class Seen:
    """What a run has shown.

    Attributes:
        ttft_s: Of each request.
        jct_s: Of each program.
        steps: What each step computed, and how long it took until the next one could begin.
        began_s: When each of them did.
        paces: When a fixed piece of work was done, and how long it took.
    """

    ttft_s: list[float] = field(default_factory=list)
    jct_s: list[float] = field(default_factory=list)
    steps: list[tuple[list[Scheduled], float]] = field(default_factory=list)
    began_s: list[float] = field(default_factory=list)
    paces: list[tuple[float, float]] = field(default_factory=list)


class FixedWork:
    """Some 4 ms of what an engine's step is made of: products of matrices, and Python."""

    def __init__(self) -> None:
        import torch  # noqa: PLC0415 - with the engine

        chance = torch.Generator().manual_seed(0)
        self._weights = torch.randn(HIDDEN, 4 * HIDDEN, generator=chance)
        self._inputs = torch.randn(MAX_RUNNING, HIDDEN, generator=chance)

    def seconds(self) -> float:
        """Do it once."""
        began_s = time.perf_counter()
        for _ in range(3 * LAYERS):
            (self._inputs @ self._weights) @ self._weights.T
            sorted(range(500), key=lambda i: -i)
        return time.perf_counter() - began_s


class Paces:
    """How much longer than usual work took at a time.

    Args:
        paces: When the fixed piece of work was done, and how long it took.
        usual_s: How long it takes at the pace that counts as 1.
    """

    def __init__(self, paces: Sequence[tuple[float, float]], usual_s: float) -> None:
        self._at_s = [at_s for at_s, _ in paces]
        self._factors = [seconds / usual_s for _, seconds in paces]

    def at(self, now_s: float) -> float:
        """The median of the seconds around."""
        first = bisect_left(self._at_s, now_s - PACE_WINDOW_S)
        last = bisect_right(self._at_s, now_s + PACE_WINDOW_S)
        around = self._factors[first:last] or self._factors[max(0, first - 1) : first + 1]
        return median(around)


class PacedClock:
    """A `StepClock` on a machine whose pace changes."""

    def __init__(self, clock: StepClock, paces: Paces) -> None:
        self._clock = clock
        self._paces = paces
        self.now_s: Callable[[], float] = lambda: 0.0

    def step_s(self, parts: Iterable[Scheduled]) -> float:
        """Seconds of a step that begins now."""
        return self._clock.step_s(parts) * self._paces.at(self.now_s())


def workload(seed: int, n_programs: int, rate: float) -> list[Program]:
    """Agents that come at random and go on from what they have said."""
    chance = Random(f"{_CHANCE}/{seed}")  # noqa: S311 - no secret
    programs = []
    arrival_s = 0.0
    for i in range(n_programs):
        text = [Run(0, chance.randint(*FIRST_TOKENS))]
        turns = []
        n_turns = chance.randint(*TURNS)
        for number in range(n_turns):
            output = chance.randint(*OUTPUT_TOKENS)
            last = number + 1 == n_turns
            gap_s = 0.0 if last else chance.expovariate(1 / MEAN_GAP_S)
            turns.append(Turn(tuple(text), output, gap_s, None if last else "tool"))
            text.append(Run(len(text), output))
            text.append(Run(len(text), chance.randint(*RESULT_TOKENS)))
        programs.append(Program(f"{_CHANCE}-{seed}-{i}", arrival_s, tuple(turns)))
        arrival_s += chance.expovariate(rate)
    return programs


class RealRun:
    """Agents on a real engine, in real time.

    Args:
        llm: vLLM, its engine in this process.
        programs: The agents.
        name: For what is told meanwhile.
    """

    def __init__(self, llm: Any, programs: Sequence[Program], name: str) -> None:
        self._core = llm.llm_engine
        self._scheduler = self._core.engine_core.engine_core.scheduler
        self._agents = Agents(programs, BLOCK_TOKENS)
        self._programs = programs
        self._name = name
        self._texts: dict[str, list[int]] = {}
        self._open: dict[str, tuple[Chain, float]] = {}
        self._first_s: dict[str, float] = {}
        self._parts: list[Scheduled] = []
        self._chance = Random(name)  # noqa: S311 - no secret
        self._fixed_work = FixedWork()
        self._fixed_work.seconds()
        self.seen = Seen()

    def run(self, limit_s: float) -> Seen:
        """Serve all agents.

        Raises:
            TimeoutError: They have not ended within the limit.
        """
        schedule = self._scheduler.schedule
        self._scheduler.schedule = lambda *asked: self._noted(schedule(*asked))
        began_s = told_s = paced_s = time.perf_counter()
        step_began_s: float | None = None
        try:
            while not self._agents.done:
                now_s = time.perf_counter() - began_s
                if now_s > limit_s:
                    raise TimeoutError(f"{self._name}: agents have not ended in {limit_s:g} s")
                if now_s + began_s - told_s >= TOLD_EVERY_S:
                    told_s = now_s + began_s
                    self._tell(now_s)
                if now_s + began_s - paced_s >= PACE_EVERY_S:
                    paced_s = now_s + began_s
                    self.seen.paces.append((now_s, self._fixed_work.seconds()))
                for at_s, chain in self._agents.due(now_s):
                    self._send(chain, at_s)
                if not self._core.has_unfinished_requests():
                    time.sleep(max(0.0, self._agents.next_s - now_s))
                    continue
                step_began_s = time.perf_counter()
                self._parts = []
                outputs = self._core.step()
                now_s = time.perf_counter() - began_s
                for output in outputs:
                    self._note(output, now_s)
                if self._parts:
                    # Until the next one could begin: what lies between is part of every step.
                    self.seen.steps.append((self._parts, time.perf_counter() - step_began_s))
                    self.seen.began_s.append(step_began_s - began_s)
        finally:
            self._scheduler.schedule = schedule
        ended, arrived = self._agents.ended_s, self._agents.arrived_s
        self.seen.jct_s = [ended[p.name] - arrived[p.name] for p in self._programs]
        self._tell(time.perf_counter() - began_s)
        return self.seen

    def _tell(self, now_s: float) -> None:
        ended, n_steps = len(self._agents.ended_s), len(self.seen.steps)
        text = f"{self._name}: {now_s:.0f} s, {ended} of {len(self._programs)} programs, {n_steps} steps"
        print(text, file=sys.stderr, flush=True)

    def _send(self, chain: Chain, at_s: float) -> None:
        from vllm import SamplingParams  # noqa: PLC0415 - brings vLLM

        turn = chain.turn
        text = self._texts.setdefault(chain.name, [])
        n_more = turn.prompt_tokens - len(text)
        text += [self._chance.randrange(3, VOCABULARY) for _ in range(n_more)]
        hints = {"program": chain.program.name, "tool": turn.tool}
        parameters = SamplingParams(
            temperature=0,
            max_tokens=turn.output_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": {"kvtier": hints}},
        )
        self._open[chain.request_id] = chain, at_s
        self._core.add_request(chain.request_id, {"prompt_token_ids": list(text)}, parameters)

    def _note(self, output: Any, now_s: float) -> None:
        chain, at_s = self._open[output.request_id]
        if output.outputs and output.outputs[0].token_ids:
            self._first_s.setdefault(output.request_id, now_s)
        if output.finished:
            del self._open[output.request_id]
            self.seen.ttft_s.append(self._first_s.pop(output.request_id) - at_s)
            self._texts[chain.name] += output.outputs[0].token_ids
            self._agents.turn_ended(chain, now_s)

    def _noted(self, scheduled: Any) -> Any:
        cached = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        known = scheduled.scheduled_cached_reqs
        cached.update(zip(known.req_ids, known.num_computed_tokens, strict=True))
        self._parts = [
            Scheduled(cached[request_id], n_tokens)
            for request_id, n_tokens in scheduled.num_scheduled_tokens.items()
        ]
        return scheduled


def engine(model: Path) -> Any:
    """A real engine with kvtier and without a CPU tier, warmed up."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - brings vLLM

    arguments = engine_arguments({"tier": "off"}, n_blocks=N_BLOCKS) | {
        "max_model_len": MODEL_TOKENS,
        "max_num_batched_tokens": BATCH_TOKENS,
        "max_num_seqs": MAX_RUNNING,
        "scheduler_cls": "kvtier.scheduler.ProgramScheduler",
        "scheduling_policy": "priority",
        "async_scheduling": False,
    }
    llm = LLM(str(model), **arguments)
    warm = [{"prompt_token_ids": [3 + i] * 700} for i in range(MAX_RUNNING)]
    llm.generate(warm, SamplingParams(max_tokens=16, ignore_eos=True, detokenize=False))
    return llm


def machine(clock: StepClock) -> Machine:
    """The engine as replay sees it."""
    kv_heads, head_dim = 2, 64
    spec = ModelSpec("tiny", 0.0, 0.0, LAYERS, 4, kv_heads, head_dim, HIDDEN, 4.0, 2.0)
    block_bytes = int(BLOCK_TOKENS * spec.kv_bytes_per_token)
    return Machine(
        model=spec,
        gpu=GpuSpec("cpu", 0.0, 0.0, 0.0, 1e9),
        n_gpus=1,
        gpu_kv_bytes=N_BLOCKS * block_bytes,
        dram_bytes=0.0,
        link_bytes_per_s=1e9,
        block_tokens=BLOCK_TOKENS,
        batch_tokens=BATCH_TOKENS,
        max_running=MAX_RUNNING,
        clock=clock,
    )


def replayed(programs: Sequence[Program], clock: StepClock | PacedClock) -> Seen:
    """The same agents in virtual time."""
    from kvtier.replay.policies import policy  # noqa: PLC0415 - brings vLLM
    from kvtier.replay.simulation import Simulation  # noqa: PLC0415

    simulation = Simulation(policy("kvtier"), machine(cast("StepClock", clock)), programs)
    if isinstance(clock, PacedClock):
        clock.now_s = lambda: simulation.clock.now_s
    result = simulation.run()
    return Seen(
        [turn.first_token_s - turn.arrived_s for turn in result.turns],
        [result.ended_s[p.name] - result.arrived_s[p.name] for p in programs],
    )


def compared(name: str, real: Seen, virtual: Seen) -> dict[str, float]:
    """Print and return the means of a run and of its replay, and the errors."""
    figures: dict[str, float] = {}
    for what, ours, theirs in (
        ("ttft_s", real.ttft_s, virtual.ttft_s),
        ("jct_s", real.jct_s, virtual.jct_s),
    ):
        measured, predicted = fmean(ours), fmean(theirs)
        error = predicted / measured - 1
        figures |= {f"{what}": measured, f"{what}_replayed": predicted, f"{what}_error": error}
        holds = "holds" if abs(error) <= AIM else "MISSED"
        print(
            f"{name}: mean {what} {measured:.4f}, replayed {predicted:.4f}: {error:+.1%}"
            f" (aim {AIM:.0%}: {holds})",
            flush=True,
        )
    return figures


def main() -> None:
    """Run what is asked for and print the errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=24)
    parser.add_argument("--rate", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, nargs=2, default=(1, 2), metavar=("FIT", "HELD_OUT"))
    parser.add_argument("--limit-s", type=float, default=150.0, help="of each real run")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    prepare_process()
    workloads = [workload(seed, asked.programs, asked.rate) for seed in asked.seeds]
    with tempfile.TemporaryDirectory() as folder:
        print("starting vLLM", file=sys.stderr, flush=True)
        write_model(Path(folder))
        llm = engine(Path(folder))
        runs = [
            RealRun(llm, programs, name).run(asked.limit_s)
            for name, programs in zip(("fitted", "held out"), workloads, strict=True)
        ]
        llm.llm_engine.engine_core.shutdown()
    usual_s = fmean(seconds for _, seconds in runs[0].paces)
    paces = [Paces(seen.paces, usual_s) for seen in runs]
    clock = fit(runs[0].steps)
    even = fit(
        [
            (parts, seconds / paces[0].at(at_s))
            for (parts, seconds), at_s in zip(runs[0].steps, runs[0].began_s, strict=True)
        ]
    )
    figures: dict[str, Any] = {"clock": repr(clock), "clock_at_one_pace": repr(even)}
    for name, seen, programs, pace in zip(
        ("fitted", "held out"), runs, workloads, paces, strict=True
    ):
        spent_s = sum(seconds for _, seconds in seen.steps)
        modelled_s = sum(clock.step_s(parts) for parts, _ in seen.steps)
        took = fmean(seconds for _, seconds in seen.paces) / usual_s
        print(
            f"{name}: {len(seen.steps)} steps in {spent_s:.1f} s, by the clock {modelled_s:.1f} s;"
            f" the fixed work took {took:.2f} of what it took in the first run"
        )
        figures[name] = {
            "pace": took,
            "at_one_pace": compared(f"{name}, at one pace", seen, replayed(programs, clock)),
            "at_its_pace": compared(
                f"{name}, at its pace", seen, replayed(programs, PacedClock(even, pace))
            ),
        }
    if asked.json is not None:
        asked.json.write_text(json.dumps(figures, indent=1), "utf-8")


if __name__ == "__main__":
    main()
