"""The command ``kvtier bench link``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvtier.calibration import CalibrationError
from kvtier.linkbench.demo_reloads import demo_reloads
from kvtier.linkbench.device import device_named
from kvtier.linkbench.machine import machine
from kvtier.linkbench.matrix import CHUNK_BLOCKS, MIB
from kvtier.linkbench.measure import Measured, Plan, run_plan
from kvtier.linkbench.model_check import check_model
from kvtier.linkbench.paths import PathError
from kvtier.linkbench.pen import PlotError
from kvtier.linkbench.plot import write_png
from kvtier.linkbench.report import model_table, size_text, summary_table, tables, write_json

if TYPE_CHECKING:
    from types import TracebackType

    from kvtier.linkbench.matrix import Cell

_WIDE: Final = 200
_TOTAL_MIB: Final = {"cpu": 128, "cuda": 256}
_QUICK_ROUNDS, _ROUNDS = 3, 7
_FILE: Final[dict[str, Any]] = {"metavar": "FILE", "dir_okay": False}


def link(
    *,
    device: Annotated[
        str, typer.Option(help="auto: the first GPU, else the CPU.", metavar="auto|cpu|cuda[:N]")
    ] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Few sizes, large copies, one way at a time.")
    ] = False,
    total_mib: Annotated[
        int | None,
        typer.Option(
            help="MiB of the largest copies. Twice of it is taken on each side.",
            metavar="N",
            min=64,
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds; the fastest counts.", metavar="N", min=1)
    ] = None,
    threads: Annotated[
        int, typer.Option(help="On CPU: of memcpy, torch and LMCache.", metavar="N", min=1)
    ] = 1,
    load: Annotated[
        bool, typer.Option("--load/--no-load", help="Measure beside a decode-like load too.")
    ] = True,
    model: Annotated[
        bool,
        typer.Option("--check-model", help="Compare the cost model's reload times with measured."),
    ] = False,
    demo: Annotated[
        Path | None,
        typer.Option(help="With --check-model: what kvtier demo --json has written.", **_FILE),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.", **_FILE)
    ] = None,
    png_file: Annotated[
        Path | None, typer.Option("--png", help="Draw the results here (needs Pillow).", **_FILE)
    ] = None,
) -> None:
    """Measure copies of KV blocks: kvtier's, the link's limit, LMCache's, vLLM's, torch's.

    Every path is first held against a naive copy, byte for byte. GB/s are 1e9 bytes a second from
    before the submission until all bytes are there.
    """
    console = Console()
    errors = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console = Console(width=_WIDE)
    try:
        where = device_named(device)
        plan = Plan(
            device=where,
            total_bytes=(total_mib or _TOTAL_MIB[where.type]) * MIB,
            rounds=rounds or (_QUICK_ROUNDS if quick else _ROUNDS),
            threads=threads,
            quick=quick,
            beside_load=load,
        )
        reloads = demo_reloads(demo) if demo is not None else None
        with _Shown(console) as shown:
            measured = run_plan(plan, shown.told)
        check = dataclasses.replace(check_model(plan), demo=reloads) if model else None
        config = machine(where, ["kvtier", "bench", "link", *_arguments()]) | {
            "total_bytes": plan.total_bytes,
            "rounds": plan.rounds,
            "threads": plan.threads,
            "quick": plan.quick,
            "chunk_blocks": CHUNK_BLOCKS,
        }
        if json_file is not None:
            write_json(json_file, config, measured, check)
        if png_file is not None:
            write_png(
                png_file, measured.rows, f"{config['gpu'] or config['cpu']}, {config['date']}"
            )
    except (PathError, PlotError, CalibrationError, OSError) as error:
        errors.print(f"kvtier: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    _print(console, measured)
    if check is not None:
        console.print()
        console.print(model_table(check))
        console.print(f"median error of the predictions: {check.median_error:.1%}")
    if check is not None and check.demo is not None:
        console.print(
            f"median error over the demo's {len(check.demo.reloads)} reloads: "
            f"{check.demo.median_error:.1%} (predicted over measured: {check.demo.median_ratio:.2f}; with the "
            f"best single rate, chosen afterwards: {check.demo.scatter:.1%})"
        )


def _arguments() -> list[str]:
    """The command line's options, without what may name a place of this machine."""
    words, hidden = [], False
    for word in sys.argv[1:]:
        words.append("FILE" if hidden else word)
        hidden = word in {"--json", "--png", "--demo"}
    return [word for word in words if word not in {"bench", "link"}]


def _print(console: Console, measured: Measured) -> None:
    for table in tables(measured.rows):
        console.print(table)
        console.print()
    console.print(summary_table(measured.rows))
    for name, why in measured.missing.items():
        console.print(f"{name}: not measured: {why}", markup=False, highlight=False, soft_wrap=True)


class _Shown:
    """A bar; where the output is no terminal, a line for each block size."""

    def __init__(self, console: Console) -> None:
        """Prepare the bar."""
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._bar = self._progress.add_task("checking every path", total=None)
        self._size = 0

    def __enter__(self) -> Self:
        """Show it."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take it away."""
        self._progress.stop()

    def told(self, cell: Cell, index: int, total: int) -> None:
        """A cell is about to be measured."""
        text = f"{size_text(cell.block_bytes)} x {cell.blocks} {cell.layout} {cell.way}"
        self._progress.update(self._bar, description=text, completed=index, total=total)
        if self._progress.disable and cell.block_bytes != self._size:
            self._size = cell.block_bytes
            self._console.print(
                f"measuring blocks of {size_text(cell.block_bytes)}", highlight=False
            )
