"""The command ``kvtier replay``."""

from __future__ import annotations

import sys
from concurrent.futures.process import BrokenProcessPool
from importlib import util
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from kvtier.replay.machines import presets
from kvtier.replay.options import ARRIVALS, OptionError, Options, check_writable, read_settings
from kvtier.replay.report import Replays, build_report, render_html, write_json
from kvtier.replay.sweep import Sweep, make_cells, quiet_vllm, run_cells
from kvtier.replay.table import ReplayProgress, results_table, sweep_table
from kvtier.replay.workloads.synthetic import NAMES

if TYPE_CHECKING:
    from kvtier.replay.sweep import Cell


POLICY_NAMES: Final = (
    "vllm-lru",
    "offload-lru",
    "offload-pfcfs",
    "infercept",
    "continuum",
    "continuum-2s",
    "ttl-const",
    "autellix",
    "thunderagent",
    "kvtier",
    "kvtier-ends",
    "ideal",
    "oracle",
)
"""All that `kvtier.replay.policies` may know, which brings vLLM: a wrong name is to be told at once."""
_SHOWN_RECORDS: Final = 5
_TEXT: Final = {"metavar": "NAME"}
_KNOWN: Final = {kind: ", ".join(known) for kind, known in presets.names().items()}
_WIDE: Final = 240


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: accepted is a number") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: accepted is a whole number") from None


_FLOAT: Final[dict[str, Any]] = {"metavar": "NUMBER", "parser": _number}
_INT: Final[dict[str, Any]] = {"metavar": "N", "parser": _whole}


def replay(
    workload: Annotated[
        str,
        typer.Argument(
            help=f"A file or folder of recorded sessions, or synthetic:NAME ({', '.join(NAMES)}).",
            metavar="WORKLOAD",
        ),
    ],
    *,
    policy: Annotated[
        str, typer.Option(help="Policies, with commas; ratios are to the first.", metavar="NAMES")
    ] = "vllm-lru,offload-lru,kvtier,ideal",
    model: Annotated[
        str, typer.Option(help=f"One of {_KNOWN['models']}, or a .toml file.", **_TEXT)
    ] = "llama-3.1-8b",
    hardware: Annotated[
        str,
        typer.Option(
            help=f"One of {_KNOWN['gpus']}, a .toml file, or a .json profile of kvtier calibrate.",
            **_TEXT,
        ),
    ] = "h100",
    gpus: Annotated[int, typer.Option(help="GPUs (tensor parallel).", **_INT)] = 1,
    gpu_kv_gb: Annotated[
        float | None,
        typer.Option(help="GPU memory for KV, all GPUs. Default: what weights leave.", **_FLOAT),
    ] = None,
    link_gbps: Annotated[
        float | None,
        typer.Option(
            help="Link to CPU memory each way, all GPUs, gigabytes/s. Default: the GPU's.", **_FLOAT
        ),
    ] = None,
    dram_gb: Annotated[
        float, typer.Option(help="CPU memory for KV; 0: no CPU tier.", **_FLOAT)
    ] = 200.0,
    programs: Annotated[int, typer.Option(help="Programs to replay, at most.", **_INT)] = 60,
    arrivals: Annotated[
        str,
        typer.Option(
            help="poisson: at --rate. recorded: as in the recording. fixed: --concurrency at a time.",
            metavar="|".join(ARRIVALS),
        ),
    ] = "poisson",
    rate: Annotated[float, typer.Option(help="Programs that arrive a second.", **_FLOAT)] = 0.2,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Programs at a time, with --arrivals fixed.", **_INT),
    ] = None,
    max_turns: Annotated[int, typer.Option(help="Cut programs after so many turns.", **_INT)] = 16,
    max_input_tokens: Annotated[
        int, typer.Option(help="Cut programs before the first longer prompt.", **_INT)
    ] = 120_000,
    max_gap_s: Annotated[float, typer.Option(help="Shorten longer gaps.", **_FLOAT)] = 120.0,
    time_scale: Annotated[float, typer.Option(help="Multiply gaps by this.", **_FLOAT)] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same replay.", **_INT)] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face tokenizer for recorded text: name or file. Default: 4 characters a token.",
            **_TEXT,
        ),
    ] = None,
    skip_bad_records: Annotated[
        bool, typer.Option("--skip-bad-records", help="Leave out what cannot be replayed.")
    ] = False,
    settings: Annotated[
        str,
        typer.Option(
            help="kvtier's settings as JSON, e.g. '{\"kvtier.max_ttl_s\": 60}'.", metavar="JSON"
        ),
    ] = "{}",
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Replay at several values of a numeric option, e.g. rate=0.05,0.1,0.2.",
            metavar="NAME=VALUE,VALUE",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Replays at a time.", **_INT)] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures to this file.")
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a self-contained page to this file."),
    ] = None,
    no_wall_clock: Annotated[
        bool,
        typer.Option(
            "--no-wall-clock", help="Leave out real times: equal seeds then write equal JSON."
        ),
    ] = False,
) -> None:
    """Replay agents under several policies in virtual time, and compare.

    vLLM's real scheduler decides every step, and kvtier's real code runs inside it; only the GPU is
    replaced by a model of its speed. No GPU is needed, and minutes take seconds. All policies see the
    same programs, arrivals and tool times. A GB is 1e9 bytes.

    \b
    Baselines:   vllm-lru, offload-lru, offload-pfcfs, infercept, continuum, continuum-2s, ttl-const,
                 autellix, thunderagent
    This one:    kvtier, kvtier-ends (told by the clients when a program is over)
    References:  ideal (GPU memory for everything), oracle (kvtier told the true gaps)

    \b
    Examples:
      kvtier replay synthetic:swe-bench
      kvtier replay sessions/ --arrivals recorded --policy vllm-lru,kvtier --html out.html
      kvtier replay synthetic:bfcl --sweep rate=0.05,0.1,0.2 --jobs 2 --json out.json
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    given = {
        name: value for name, value in locals().items() if name in Options.__dataclass_fields__
    }
    # A table in a file or pipe is not to be cut to some terminal's width.
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    errors = Console(stderr=True)
    try:
        names = _policies(policy)
        extra, effective = read_settings(settings, names)
        swept = None if sweep is None else Sweep.parse(sweep)
        asked = [Options(**given)] if swept is None else swept.apply(given)
        if jobs < 1:
            raise OptionError("--jobs", f"{jobs}: accepted is a whole number from 1")  # noqa: TRY301
        for option, path in (("--json", json_file), ("--html", html_file)):
            check_writable(option, path)
        cells, skipped = make_cells(asked, swept, names, extra)
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from None
    _require_vllm()
    quiet_vllm(online=tokenizer is not None)
    for line in skipped[:_SHOWN_RECORDS]:
        errors.print(f"left out: {line}", highlight=False, markup=False, soft_wrap=True)
    if len(skipped) > _SHOWN_RECORDS:
        errors.print(f"left out: {len(skipped) - _SHOWN_RECORDS} more records")
    labels = [_label(cell, swept) for cell in cells]
    try:
        with ReplayProgress(errors, labels, [len(cell.programs) for cell in cells]) as progress:
            outcomes = run_cells(cells, jobs, progress.told)
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from None
    except KeyboardInterrupt:
        errors.print("stopped")
        raise typer.Exit(130) from None
    except BrokenProcessPool:
        errors.print(
            "kvtier replay: a process ended on its own, out of memory perhaps: lower --jobs"
        )
        raise typer.Exit(1) from None
    for label, outcome in zip(labels, outcomes, strict=True):
        if outcome.error:
            text = f"kvtier replay: {label}: {outcome.error}"
            errors.print(text, style="red", markup=False, soft_wrap=True)
    replays = Replays(asked, swept, names, effective, skipped, outcomes)
    if any(outcome.result for outcome in outcomes):
        _publish(console, replays, json_file, html_file, wall_clock=not no_wall_clock)
    raise typer.Exit(int(any(outcome.error for outcome in outcomes)))


def _publish(
    console: Console,
    replays: Replays,
    json_file: Path | None,
    html_file: Path | None,
    *,
    wall_clock: bool,
) -> None:
    report = build_report(replays, wall_clock=wall_clock)
    table = sweep_table(report["sweep"]) if replays.sweep else results_table(report["results"])
    console.print(table)
    if json_file is not None:
        write_json(report, json_file)
        console.print(f"figures: {json_file}", highlight=False, markup=False, soft_wrap=True)
    if html_file is not None:
        html_file.write_text(render_html(report, replays), encoding="utf-8")
        console.print(f"page: {html_file}", highlight=False, markup=False, soft_wrap=True)


def _policies(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in POLICY_NAMES]
    if unknown or not names or len(set(names)) < len(names):
        wrong = f"unknown {', '.join(map(repr, unknown))}" if unknown else repr(text)
        accepted = ", ".join(POLICY_NAMES)
        raise OptionError("--policy", f"{wrong}: accepted are, each at most once, {accepted}")
    return names


def _require_vllm() -> None:
    if util.find_spec("vllm") is None:
        Console(stderr=True).print(
            "kvtier replay: runs vLLM's scheduler, and vLLM is not installed: install kvtier with the "
            "extra cpu or gpu",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _label(cell: Cell, sweep: Sweep | None) -> str:
    return cell.policy if sweep is None else f"{cell.policy} {sweep.option}={cell.value:g}"
