"""The demo's results: figures per arm, the JSON file and the HTML page."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from kvtier.demo.arms import Arm

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from kvtier.demo.driver import ArmRun, TurnRecord

_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm's run, the decisions it logged, and how long its servers took to start.

    Attributes:
        aging_s: kvtier's setting of that name, which depends on the arm before.
    """

    arm: Arm
    run: ArmRun
    start_s: float
    decisions: tuple[Mapping[str, Any], ...] = field(default=())
    aging_s: float | None = None


def read_decisions(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Decisions of a decision log (JSON lines); empty when there is no such file.

    A line that a dying engine cut short is left out, any other bad line is an error.
    """
    if not path.is_file():
        return ()
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if text and not text.endswith("\n"):
        lines.pop()
    return tuple(json.loads(line) for line in lines)


def job_completion_s(turns: Iterable[TurnRecord]) -> dict[str, float]:
    """Seconds from the arrival of a program's first turn to the last token of its last."""
    by_program: defaultdict[str, list[TurnRecord]] = defaultdict(list)
    for turn in turns:
        by_program[turn.program].append(turn)
    return {
        program: max(turn.end_s for turn in own) - min(turn.arrival_s for turn in own)
        for program, own in by_program.items()
    }


def summarise(result: ArmResult, programs: int) -> dict[str, Any]:
    """The arm's object in the JSON file's ``results`` (without timeline and decisions).

    Token counts: ``prompt_tokens`` = ``gpu_hit_tokens`` + ``cpu_hit_tokens`` +
    ``computed_tokens``; ``recomputed_tokens`` is the part of ``computed_tokens`` that an
    earlier turn of the same program had computed before.

    Args:
        result: The arm's run.
        programs: Number of programs of the workload.
    """
    turns = result.run.turns
    jct_s = list(job_completion_s(turns).values())
    ttft_s = [turn.ttft_s for turn in turns]
    return_ttft_s = [turn.ttft_s for turn in turns if turn.turn > 0]
    counters = result.run.counters
    decision_us = [entry["decision_us"] for entry in result.decisions if "decision_us" in entry]
    recomputed = sum(turn.recomputed_tokens for turn in turns)
    return {
        "policy": result.arm.policy,
        "arm": result.arm.value,
        "programs": programs,
        "completed": len(jct_s),
        "mean_jct_s": _mean(jct_s),
        **{f"p{rank}_jct_s": _percentile(jct_s, rank) for rank in _PERCENTILES},
        "max_jct_s": max(jct_s),
        "mean_ttft_s": _mean(ttft_s),
        "p50_ttft_s": _percentile(ttft_s, 50),
        "p99_ttft_s": _percentile(ttft_s, 99),
        "max_ttft_s": max(ttft_s),
        "mean_return_ttft_s": _mean(return_ttft_s) if return_ttft_s else None,
        "preemptions": counters.preemptions,
        "prompt_tokens": counters.prompt_tokens,
        "gpu_hit_tokens": counters.gpu_hit_tokens,
        "cpu_hit_tokens": counters.external_hit_tokens,
        "computed_tokens": counters.computed_tokens,
        "recomputed_tokens": recomputed,
        "output_tokens": sum(turn.output_tokens for turn in turns),
        "steps": counters.steps,
        "wall_s": result.run.wall_s,
        "server_start_s": result.start_s,
        "aging_s": result.aging_s,
        "decision_us_p50": _percentile(decision_us, 50) if decision_us else None,
        "decision_us_p99": _percentile(decision_us, 99) if decision_us else None,
        "work_digest": result.run.work_digest,
    }


def build_report(
    config: Mapping[str, Any],
    planned_digest: str,
    programs: int,
    results: Sequence[ArmResult],
) -> dict[str, Any]:
    """The content of the JSON file.

    Args:
        config: What was run; JSON types only.
        planned_digest: Digest of the workload's recorded tokens.
        programs: Number of programs of the workload.
        results: The arms, in the order they ran.
    """
    rows = [summarise(result, programs) for result in results]
    return {
        "config": dict(config),
        "results": [
            row
            | {
                "turns": [_turn_object(turn) for turn in result.run.turns],
                "decisions": _decisions_of(result),
            }
            for row, result in zip(rows, results, strict=True)
        ],
        "work_digest": planned_digest,
        "same_work": all(row["work_digest"] == planned_digest for row in rows),
        "ratios": _ratios(rows),
    }


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as indented JSON."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def render_html(report: Mapping[str, Any]) -> str:
    """One self-contained page: no file, font or script from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvtier.demo", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cost_text"] = _cost_text
    titles = {arm.value: arm.label for arm in Arm}
    return environment.get_template("template.html").render(report=report, titles=titles)


def _ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean JCT of every arm over every other arm's, by ``"POLICY/POLICY"``."""
    return {
        f"{row['policy']}/{other['policy']}": row["mean_jct_s"] / other["mean_jct_s"]
        for row in rows
        for other in rows
        if row is not other
    }


def _turn_object(turn: TurnRecord) -> dict[str, Any]:
    return asdict(turn) | {
        "ttft_s": turn.ttft_s,
        "computed_tokens": turn.computed_tokens,
        "recomputed_tokens": turn.recomputed_tokens,
    }


def _decisions_of(result: ArmResult) -> list[dict[str, Any]]:
    """Decisions about the programs, under their names, with ``ts_s`` since the run's start.

    The log names programs by a hash; a decision belongs to the turn whose request id its own
    begins with. What belongs to none is the warm-up.
    """
    programs = {turn.request_id: turn.program for turn in result.run.turns}
    found: list[dict[str, Any]] = []
    for entry in result.decisions:
        # vLLM appends "-N-XXXXXXXX" to the id that the client sees.
        request_id = str(entry["request_id"]).rsplit("-", 2)[0]
        if request_id in programs:
            ts_s = entry["ts_s"] - result.run.started_unix_s
            found.append({**entry, "ts_s": ts_s, "program": programs[request_id]})
    return found


def _cost_text(costs: Mapping[str, Any]) -> str:
    """Costs of the options, the cheapest first; what is no number is left out."""
    numbers = {name: cost for name, cost in costs.items() if isinstance(cost, int | float)}
    return ", ".join(
        f"{name} {numbers[name]:.3g}" for name in sorted(numbers, key=numbers.__getitem__)
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _percentile(values: Sequence[float], rank: int) -> float:
    return float(np.percentile(values, rank))
