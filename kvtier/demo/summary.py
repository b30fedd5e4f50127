"""The demo's table on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kvtier.demo.arms import Arm

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, Any]


def _seconds(key: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[key] is None else f"{row[key]:.2f}"


def _count(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:,}"


_LINES: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("job completion, mean (s)", _seconds("mean_jct_s")),
    ("job completion, p50 (s)", _seconds("p50_jct_s")),
    ("job completion, p95 (s)", _seconds("p95_jct_s")),
    ("time to first token, mean (s)", _seconds("mean_ttft_s")),
    ("  after a tool, mean (s)", _seconds("mean_return_ttft_s")),
    ("time to first token, max (s)", _seconds("max_ttft_s")),
    ("prompt tokens from GPU memory", _count("gpu_hit_tokens")),
    ("prompt tokens from CPU memory", _count("cpu_hit_tokens")),
    ("prompt tokens computed again", _count("recomputed_tokens")),
    ("preemptions", _count("preemptions")),
)


def print_summary(report: Mapping[str, Any], console: Console) -> None:
    """Print the arms side by side, then mean job completion as ratios."""
    rows = report["results"]
    table = Table(title="kvtier demo: seconds and counts, lower is better")
    table.add_column("")
    for row in rows:
        table.add_column(Arm(row["arm"]).label, justify="right")
    for name, show in _LINES:
        table.add_row(name, *(show(row) for row in rows))
    for other in rows[:-1]:
        title = Arm(other["arm"]).label
        ratios = (row["mean_jct_s"] / other["mean_jct_s"] for row in rows)
        table.add_row(f"mean job completion / {title}", *(f"{ratio:.2f}x" for ratio in ratios))
    console.print(table)
    if len(rows) > 1:
        console.print(
            "Means are over programs. kvtier serves programs in the order in which they came: the last "
            f"ones wait longest for their first token.{_patience(rows)}"
        )
    if report["same_work"]:
        console.print(f"same work in every arm: SHA-256 {report['work_digest'][:16]}...")


def _patience(rows: list[Row]) -> str:
    aging_s = next((row["aging_s"] for row in rows if row["aging_s"] is not None), None)
    # From then on nobody is let past them.
    return "" if aging_s is None else f" A new program ages after {aging_s:g} s (kvtier.aging_s)."
