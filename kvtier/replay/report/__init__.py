"""The results of a replay as one JSON object, and as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import jinja2
import numpy as np

from kvtier import __version__
from kvtier.replay.report.drawings import draw
from kvtier.replay.summary import alone_s
from kvtier.replay.table import figure, ratio, shown_lines
from kvtier.stats import SEPARATOR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from kvtier.replay.machine import Machine
    from kvtier.replay.options import Options
    from kvtier.replay.sweep import Outcome, Sweep
    from kvtier.replay.workload import Program

_DECISIONS: Final = "decisions"


@dataclass(frozen=True, slots=True)
class Replays:
    """What was asked for, and what came of it.

    Attributes:
        asked: The options; with a sweep, of each value.
        sweep: The option that was swept, if one was.
        policies: Their names, in the order of the columns.
        settings: Those of kvtier that are not the default.
        skipped: Why records were left out.
        outcomes: Value by value, and of each, policy by policy.
    """

    asked: Sequence[Options]
    sweep: Sweep | None
    policies: Sequence[str]
    settings: Mapping[str, Any]
    skipped: Sequence[str]
    outcomes: Sequence[Outcome]


def build_report(replays: Replays, *, wall_clock: bool) -> dict[str, Any]:
    """The content of the JSON file.

    `results` has an object for each policy; with a sweep, for each value and policy, and `sweep` has their mean
    job completion times. `failed` is there when a replay failed.

    Args:
        replays: What is reported.
        wall_clock: With real times. Without, equal seeds give equal objects.
    """
    config: dict[str, Any] = asdict(replays.asked[0])
    first = replays.outcomes[0].cell
    if replays.sweep is None:
        config["machine"] = _machine_object(first.machine)
        config["replayed"] = _workload_object(first.programs, first.machine)
    else:
        config[replays.sweep.option] = list(replays.sweep.values)
    config |= {
        "policies": list(replays.policies),
        "settings": dict(replays.settings),
        "skipped_records": len(replays.skipped),
        "kvtier": __version__,
        "vllm": metadata.version("vllm"),
        "python": platform.python_version(),
    }
    report: dict[str, Any] = {"config": config}
    if replays.sweep is not None:
        report["sweep"] = _sweep_object(replays, replays.sweep)
    swept = replays.sweep.option if replays.sweep else None
    report["results"] = [
        _result(o, swept, wall_clock=wall_clock) for o in replays.outcomes if o.result
    ]
    failed = [
        {"policy": o.cell.policy, "error": o.error} | ({swept: o.cell.value} if swept else {})
        for o in replays.outcomes
        if o.error
    ]
    return report | {"failed": failed} if failed else report


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as indented JSON."""
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def render_html(report: Mapping[str, Any], replays: Replays) -> str:
    """One self-contained page: no file, font or script from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvtier.replay", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = report["results"]
    done = [outcome for outcome in replays.outcomes if outcome.replayed is not None]
    return environment.get_template("template.html").render(
        report=report,
        title=_title(report["config"]),
        lines=[
            (label, [(figure(row[key], kind), ratio(row, rows[0], key, kind)) for row in rows])
            for label, key, kind in ([] if replays.sweep else shown_lines(rows))
        ],
        drawn=draw(done, replays.sweep, report.get("sweep")),
        decisions=_counted(rows, decisions=True),
        counters=_counted(rows, decisions=False),
        config=_flat(report["config"]),
    )


def _result(outcome: Outcome, swept: str | None, *, wall_clock: bool) -> dict[str, Any]:
    result, replayed = outcome.result, outcome.replayed
    assert result is not None
    assert replayed is not None
    fields = result.as_json(wall_clock=wall_clock)
    if swept is not None:
        return {swept: outcome.cell.value, **fields}
    jct_s = {name: end_s - replayed.arrived_s[name] for name, end_s in replayed.ended_s.items()}
    return fields | {
        "link_bytes": dict(replayed.link_bytes),
        "counters": dict(sorted(replayed.counters.items())),
        "jct_s": dict(sorted(jct_s.items())),
    }


def _sweep_object(replays: Replays, sweep: Sweep) -> dict[str, Any]:
    means: dict[str, list[float | None]] = {name: [] for name in replays.policies}
    for outcome in replays.outcomes:
        mean = outcome.result.mean_jct_s if outcome.result else None
        means[outcome.cell.policy].append(mean)
    return {"option": sweep.option, "values": list(sweep.values), "mean_jct_s": means}


def _machine_object(machine: Machine) -> dict[str, Any]:
    return {
        "gpu_kv_bytes": machine.gpu_kv_bytes,
        "gpu_kv_tokens": machine.gpu_blocks * machine.block_tokens,
        "kv_bytes_per_token": machine.model.kv_bytes_per_token,
        "dram_bytes": machine.dram_bytes,
        "link_bytes_per_s": machine.link_bytes_per_s,
        "block_tokens": machine.block_tokens,
        "batch_tokens": machine.batch_tokens,
        "max_running": machine.max_running,
        "model": asdict(machine.model),
        "gpu": asdict(machine.gpu),
    }


def _workload_object(programs: Sequence[Program], machine: Machine) -> dict[str, Any]:
    turns = [turn for program in programs for turn in program.all_turns()]
    return {
        "programs": len(programs),
        "turns": len(turns),
        "prompt_tokens": sum(turn.prompt_tokens for turn in turns),
        "output_tokens": sum(turn.output_tokens for turn in turns),
        "longest_prompt_tokens": max(turn.prompt_tokens for turn in turns),
        "mean_alone_jct_s": float(np.mean([alone_s(machine, program) for program in programs])),
    }


def _title(config: Mapping[str, Any]) -> str:
    return f"{config['workload']} on {config['gpus']} x {config['hardware']}, {config['model']}"


def _counted(rows: Sequence[Mapping[str, Any]], *, decisions: bool) -> dict[str, Any]:
    """Counts by name and policy: kvtier's decisions, the most frequent first, or all else by name."""
    found: dict[str, list[float]] = {}
    for number, row in enumerate(rows):
        for key, count in row.get("counters", {}).items():
            name, _, labels = key.partition(SEPARATOR)
            if (name == _DECISIONS) is decisions:
                shown = (labels if decisions else key).replace(SEPARATOR, ", ")
                found.setdefault(shown, [0] * len(rows))[number] += count
    with_any = [i for i in range(len(rows)) if any(counts[i] for counts in found.values())]
    ordered = sorted(found.items(), key=lambda item: (-sum(item[1]) * decisions, item[0]))
    return {
        "policies": [rows[i]["policy"] for i in with_any],
        "lines": [(label, [counts[i] for i in with_any]) for label, counts in ordered],
        "most": max((max(counts) for counts in found.values()), default=0),
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The configuration as lines."""
    lines: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, dict) and value:
            lines += _flat(value, f"{prefix}{name}.")
        else:
            lines.append((f"{prefix}{name}", "-" if value in (None, {}) else str(value)))
    return lines
