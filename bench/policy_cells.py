"""kvtier against every baseline in the cells that its aims are written for, over several seeds.

    python bench/policy_cells.py [--cells C1,C2] [--seeds 0,1,2,3,4] [--policies NAMES] [--jobs 2]
                                 [--traces FOLDER] [--runs FILE] [--again NAMES] [--settings JSON]
                                 [--wrong shuffled,x0.1,x10,adversarial]

Replays each policy in each cell and prints, by cell, what docs/policy-experiments.md aims at: means
over seeds, tails over all seeds' programs together. With `--runs` every replay's figures are kept in a
file of JSON lines as soon as they are there, and replays that it holds are not run anew, but for those
of `--again` (kvtier's, after a change of kvtier). C4 to C6 need recorded sessions: a folder that
`kvtier replay` reads. `--wrong` adds kvtier with predictions of tool times that are wrong on purpose
(`kvtier.replay.wrong_gaps`), held against `offload-pfcfs`. Nothing is enforced: the aims are printed next
to the figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from kvtier.replay.command import POLICY_NAMES
from kvtier.replay.options import Options
from kvtier.replay.sweep import quiet_vllm

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OWN = "kvtier"
ORDER_ALONE = "offload-pfcfs"
"""What predicts nothing: wrong predictions may not cost much more."""
TOLD = "kvtier-ends"
"""Its clients say when a program is over, as `infercept` is told."""
REFERENCES = ("ideal", "oracle")
BASELINES = tuple(name for name in POLICY_NAMES if name not in (OWN, TOLD, *REFERENCES))

_8B: dict[str, Any] = {"model": "llama-3.1-8b", "gpus": 1, "gpu_kv_gb": 54.0}
_70B: dict[str, Any] = {"model": "llama-3.1-70b", "gpus": 4, "gpu_kv_gb": 148.0, "link_gbps": 50.0}
_FAST: dict[str, Any] = {"link_gbps": 50.0, "dram_gb": 200.0}
_RECORDED = "recorded sessions"
_HEADER = (
    "| policy | mean JCT | over ideal | p95 JCT | p99 slowdown | p99 first TTFT | p99 return TTFT"
    " | recomputed | preemptions |"
)

CELLS: dict[str, dict[str, Any]] = {
    "C1": {"workload": "synthetic:swe-bench", "rate": 0.2, **_8B, **_FAST},
    "C2": {
        "workload": "synthetic:swe-bench",
        "rate": 0.2,
        **_8B,
        "link_gbps": 12.0,
        "dram_gb": 40.0,
    },
    "C3": {"workload": "synthetic:swe-bench", "rate": 0.15, **_70B, "dram_gb": 400.0},
    "C4": {"workload": _RECORDED, "programs": 25, "rate": 0.04, **_70B, "dram_gb": 400.0},
    "C5": {"workload": _RECORDED, "programs": 25, "rate": 0.06, **_70B, "dram_gb": 400.0},
    "C6": {"workload": _RECORDED, "programs": 20, "rate": 0.05, **_8B, **_FAST},
    "C7": {"workload": "synthetic:uniform", "rate": 0.2, **_8B, "link_gbps": 50.0, "dram_gb": 40.0},
    "C8": {"workload": "synthetic:swe-bench", "rate": 0.02, **_8B, **_FAST},
}


@dataclass(frozen=True, slots=True)
class Run:
    """One replay's figures: seconds by program and by request."""

    cell: str
    seed: int
    policy: str
    jct_s: list[float]
    slowdown: list[float]
    first_ttft_s: list[float]
    return_ttft_s: list[float]
    recomputed_tokens: int
    preemptions: int
    virtual_s: float
    wall_s: float

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells it from other replays."""
        return self.cell, self.seed, self.policy


def options_of(cell: str, seed: int, traces: Path | None) -> Options:
    """The cell as `kvtier replay` would be asked for it."""
    values = dict(CELLS[cell], seed=seed)
    if values["workload"] == _RECORDED:
        if traces is None:
            message = f"{cell} replays recorded sessions: say where they are with --traces"
            raise SystemExit(message)
        values["workload"] = str(traces)
    return Options(**values)


def run(cell: str, seed: int, policy: str, traces: Path | None, settings: dict[str, Any]) -> Run:
    """Replay one policy in one cell."""
    quiet_vllm(online=False)
    from kvtier.replay.policies import policy as spec_of  # noqa: PLC0415 - brings vLLM
    from kvtier.replay.simulation import Simulation  # noqa: PLC0415
    from kvtier.replay.summary import alone_s  # noqa: PLC0415

    options = options_of(cell, seed, traces)
    machine, programs = options.machine(), options.load([])
    spec = spec_of(policy)
    if policy.startswith(OWN):
        spec = replace(spec, settings={**spec.settings, **settings})
    replayed = Simulation(spec, machine, programs).run()
    turns = replayed.turns
    jct_s = [replayed.ended_s[p.name] - replayed.arrived_s[p.name] for p in programs]
    return Run(
        cell=cell,
        seed=seed,
        policy=policy,
        jct_s=jct_s,
        slowdown=[s / alone_s(machine, p) for s, p in zip(jct_s, programs, strict=True)],
        first_ttft_s=[
            turn.first_token_s - turn.arrived_s
            for turn in turns
            if turn.index == 0 and turn.chain == turn.program
        ],
        return_ttft_s=[turn.first_token_s - turn.arrived_s for turn in turns if turn.index > 0],
        recomputed_tokens=_recomputed(turns, programs, machine.block_tokens),
        preemptions=replayed.preemptions,
        virtual_s=replayed.virtual_s,
        wall_s=replayed.wall_s,
    )


def _recomputed(turns: Iterable[Any], programs: Sequence[Any], block_tokens: int) -> int:
    from kvtier.replay.summary import known_tokens  # noqa: PLC0415

    known = known_tokens(programs, block_tokens)
    return sum(
        max(0, known[turn.chain, turn.index] - turn.gpu_tokens - turn.cpu_tokens) for turn in turns
    )


@dataclass(frozen=True, slots=True)
class Figures:
    """A policy in a cell, over all seeds."""

    mean_jct_s: float
    p95_jct_s: float
    p99_slowdown: float
    p99_first_ttft_s: float
    p99_return_ttft_s: float
    recomputed_tokens: float
    preemptions: float

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Figures:
        """Means over seeds, tails over everything together."""

        def tail(name: str, percent: float) -> float:
            return float(np.percentile([v for run in runs for v in getattr(run, name)], percent))

        return cls(
            mean_jct_s=float(np.mean([np.mean(run.jct_s) for run in runs])),
            p95_jct_s=tail("jct_s", 95),
            p99_slowdown=tail("slowdown", 99),
            p99_first_ttft_s=tail("first_ttft_s", 99),
            p99_return_ttft_s=tail("return_ttft_s", 99),
            recomputed_tokens=float(np.mean([run.recomputed_tokens for run in runs])),
            preemptions=float(np.mean([run.preemptions for run in runs])),
        )


def table(cell: str, runs: Sequence[Run]) -> list[str]:
    """Every policy of a cell as a line of a Markdown table, best mean first."""
    by_policy: dict[str, list[Run]] = {}
    for one in runs:
        by_policy.setdefault(one.policy, []).append(one)
    figures = {policy: Figures.of(some) for policy, some in by_policy.items()}
    ideal = figures.get("ideal")
    lines = [
        f"### {cell} ({max(map(len, by_policy.values()))} seeds)",
        "",
        _HEADER,
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for policy, f in sorted(figures.items(), key=lambda item: item[1].mean_jct_s):
        over = f"{f.mean_jct_s / ideal.mean_jct_s:.3f}" if ideal else ""
        lines.append(
            f"| {policy} | {f.mean_jct_s:.1f} | {over} | {f.p95_jct_s:.1f} | {f.p99_slowdown:.2f}"
            f" | {f.p99_first_ttft_s:.1f} | {f.p99_return_ttft_s:.1f}"
            f" | {f.recomputed_tokens / 1e6:.2f}M | {f.preemptions:.1f} |"
        )
    return [*lines, "", *_aims(cell, figures), ""]


def _aims(cell: str, figures: dict[str, Figures]) -> list[str]:
    """What is aimed at in this cell, and whether it holds."""
    own, ideal, lru = (figures.get(name) for name in (OWN, "ideal", "offload-lru"))
    ordered = figures.get(ORDER_ALONE)
    wrong = [
        _aim(f"mean JCT of {name} over {ORDER_ALONE}", f.mean_jct_s / ordered.mean_jct_s, 1.03)
        for name, f in figures.items()
        if ordered and name.startswith(f"{OWN}:")
    ]
    if own is None:
        return wrong
    over_ideal = {"C1": 1.07, "C3": 1.07, "C2": 1.10, "C4": 1.10, "C5": 1.10, "C6": 1.10}
    below_best = {"C2": 0.95, "C4": 0.95, "C7": 1.01, "C8": 1.01}.get(cell, 1.0)
    baselines = [f for name, f in figures.items() if name in BASELINES]
    aims: list[tuple[str, float, float]] = []
    if ideal and cell in over_ideal:
        aims.append(("mean JCT over ideal", own.mean_jct_s / ideal.mean_jct_s, over_ideal[cell]))
    if baselines:
        best = min(f.mean_jct_s for f in baselines)
        aims.append(("mean JCT over the best baseline", own.mean_jct_s / best, below_best))
        if told := figures.get(TOLD):
            what = "mean JCT over the best baseline, told when programs are over"
            aims.append((what, told.mean_jct_s / best, below_best))
    if cell not in over_ideal:
        return [*(_aim(*aim) for aim in aims), *wrong]
    if lru:
        aims += [
            ("p99 slowdown over offload-lru", own.p99_slowdown / lru.p99_slowdown, 1.0),
            ("p95 JCT over offload-lru", own.p95_jct_s / lru.p95_jct_s, 1.0),
            (
                "p99 return TTFT over offload-lru",
                own.p99_return_ttft_s / lru.p99_return_ttft_s,
                0.25,
            ),
        ]
    if baselines:
        best = min(f.p95_jct_s for f in baselines)
        aims.append(("p95 JCT over the best baseline", own.p95_jct_s / best, 1.05))
    oracle = figures.get("oracle")
    if oracle and lru and lru.mean_jct_s > oracle.mean_jct_s:
        gain = (lru.mean_jct_s - own.mean_jct_s) / (lru.mean_jct_s - oracle.mean_jct_s)
        aims.append(("oracle's gain over kvtier's (1/0.95)", 1 / max(gain, 1e-9), 1 / 0.95))
    return [*(_aim(*aim) for aim in aims), *wrong]


def _aim(what: str, value: float, limit: float) -> str:
    return f"- {what}: {value:.3f}, aim {limit:.3f}: {'holds' if value <= limit else 'MISSED'}"


def read_runs(path: Path | None) -> dict[tuple[str, int, str], Run]:
    """What a file of earlier replays holds; of equal ones the last."""
    if path is None or not path.exists():
        return {}
    read = [Run(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {one.key: one for one in read}


def _names(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main() -> None:
    """Run what is asked for and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=_names, default=list(CELLS))
    parser.add_argument("--seeds", type=_names, default=["0"])
    parser.add_argument("--policies", type=_names, default=[OWN, *REFERENCES, *BASELINES])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--again", type=_names, default=[])
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--wrong", type=_names, default=[], metavar="MODES")
    asked = parser.parse_args()
    if asked.settings and asked.runs:
        parser.error("--runs keeps figures of the default settings only: leave out one of the two")
    extra = [ORDER_ALONE, *(f"{OWN}:{mode}" for mode in asked.wrong)] if asked.wrong else []
    policies = list(dict.fromkeys([*asked.policies, *extra]))
    known = read_runs(asked.runs)
    wanted = [
        (cell, int(seed), policy)
        for cell in asked.cells
        for seed in asked.seeds
        for policy in policies
    ]
    todo = [key for key in wanted if key not in known or key[2] in asked.again]
    context = multiprocessing.get_context("spawn")
    began_s = time.perf_counter()
    with ProcessPoolExecutor(asked.jobs, context) as pool:
        futures = [pool.submit(run, *key, asked.traces, asked.settings) for key in todo]
        for n_done, future in enumerate(as_completed(futures), 1):
            one = future.result()
            known[one.key] = one
            if asked.runs is not None:
                with asked.runs.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(one)) + "\n")
            spent_s = time.perf_counter() - began_s
            text = f"{n_done}/{len(todo)} {' '.join(map(str, one.key))}: {np.mean(one.jct_s):.1f} s"
            print(f"{text} ({spent_s:.0f} s)", file=sys.stderr, flush=True)
    for cell in asked.cells:
        print("\n".join(table(cell, [known[key] for key in wanted if key[0] == cell])))


if __name__ == "__main__":
    main()
