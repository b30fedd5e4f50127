"""What a benchmark shows: a table for each direction, a summary, and JSON."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from kvtier.linkbench.matrix import KIB, MIB
from kvtier.linkbench.paths import CEILING, OWN

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from kvtier.linkbench.measure import Measured, Row
    from kvtier.linkbench.model_check import ModelCheck

_NAMES: Final = {
    "d2h": "KV cache to host memory",
    "h2d": "host memory to KV cache",
    "both": "both ways at once",
}


def size_text(n_bytes: int) -> str:
    """A power of two as KiB or MiB."""
    return f"{n_bytes // MIB} MiB" if n_bytes >= MIB else f"{n_bytes // KIB} KiB"


def path_names(rows: Iterable[Row]) -> list[str]:
    """The paths, in the order in which they were measured."""
    return list(dict.fromkeys(row.path for row in rows))


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each direction and load: GB/s and, in brackets, the share of the ceiling."""
    grouped: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row.load, row.direction].append(row)
    shown = []
    for (load, direction), mine in sorted(grouped.items(), key=lambda item: item[0][0] != "idle"):
        beside = "" if load == "idle" else ", beside a decode-like load (in brackets: its slowdown)"
        table = Table(title=f"{_NAMES[direction]}, GB/s{beside}", box=None, title_justify="left")
        table.add_column("block", justify="right", no_wrap=True)
        table.add_column("blocks", justify="right")
        table.add_column("layout")
        names = path_names(mine)
        for name in names:
            table.add_column(name, justify="right")
        cells: dict[tuple[int, int, str], dict[str, Row]] = defaultdict(dict)
        for row in mine:
            cells[row.block_bytes, row.blocks, row.layout][row.path] = row
        for (block_bytes, blocks, layout), paths in cells.items():
            texts = [_text(paths[name]) if name in paths else "-" for name in names]
            table.add_row(size_text(block_bytes), str(blocks), layout, *texts)
        shown.append(table)
    return shown


def _text(row: Row) -> str:
    if row.load_slowdown is not None:
        return f"{row.gbps:.1f} ({row.load_slowdown:.2f}x)"
    if row.path == CEILING:
        return f"{row.gbps:.1f}"
    return f"{row.gbps:.1f} ({row.efficiency:.0%})"


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each path against the ceiling and against kvtier's own, over the idle cells.

    ``kvtier_over_path`` is how many times as fast kvtier's path is; least and median over the cells.
    """
    idle = [row for row in rows if row.load == "idle" and row.path != CEILING]
    own = {_cell(row): row.gbps for row in idle if row.path == OWN}
    found = []
    for name in path_names(idle):
        mine = [row for row in idle if row.path == name]
        ratios = [own[_cell(row)] / row.gbps for row in mine if _cell(row) in own]
        found.append(
            {
                "path": name,
                "cells": len(mine),
                "efficiency_min": min(row.efficiency for row in mine),
                "efficiency_median": statistics.median(row.efficiency for row in mine),
                "kvtier_over_path_min": min(ratios, default=None),
                "kvtier_over_path_median": statistics.median(ratios) if ratios else None,
                "submit_us_per_run_median": statistics.median(r.submit_us_per_run for r in mine),
            }
        )
    return found


def _cell(row: Row) -> tuple[str, int, int, str]:
    return row.direction, row.block_bytes, row.blocks, row.layout


def summary_table(rows: Sequence[Row]) -> Table:
    """`summary` for the terminal."""
    table = Table(title="over all idle cells", box=None, title_justify="left")
    for column in ("path", "of the ceiling, least", "median", "kvtier is faster, least", "median"):
        table.add_column(column, justify="left" if column == "path" else "right")
    for entry in summary(rows):
        ratios = (entry["kvtier_over_path_min"], entry["kvtier_over_path_median"])
        table.add_row(
            entry["path"],
            f"{entry['efficiency_min']:.0%}",
            f"{entry['efficiency_median']:.0%}",
            *("" if entry["path"] == OWN or r is None else f"{r:.2f}x" for r in ratios),
        )
    return table


def model_table(check: ModelCheck) -> Table:
    """Predicted and measured reloads."""
    table = Table(title="the cost model's reloads, ms", box=None, title_justify="left")
    for column in ("block", "blocks", "layout", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for p in check.predictions:
        times = (f"{p.predicted_s * 1e3:.2f}", f"{p.measured_s * 1e3:.2f}", f"{p.error:.0%}")
        table.add_row(size_text(p.block_bytes), str(p.blocks), p.layout, *times)
    return table


def write_json(
    path: Path, config: dict[str, Any], measured: Measured, check: ModelCheck | None
) -> None:
    """Write one object with ``config`` and ``results``, a list of one object a path and cell."""
    report: dict[str, Any] = {
        "config": config,
        "results": [row.as_object() for row in measured.rows],
        "summary": summary(measured.rows),
        "missing": measured.missing,
    }
    if check is not None:
        report["model"] = check.as_object()
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
