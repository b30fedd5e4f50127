"""What a replay shows on the terminal: progress while it runs, then a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from rich.console import Console

    Row = Mapping[str, Any]

_MILLION: Final = 1_000_000
LINES: Final = (
    ("job completion, mean (s)", "mean_jct_s", "time"),
    ("  median", "p50_jct_s", "time"),
    ("  p95", "p95_jct_s", "time"),
    ("  p99", "p99_jct_s", "time"),
    ("  over alone, p99", "p99_slowdown", "factor"),
    ("time to first token, mean (s)", "mean_ttft_s", "time"),
    ("  p99", "p99_ttft_s", "time"),
    ("  max", "max_ttft_s", "time"),
    ("  of first requests, p99", "p99_first_ttft_s", "time"),
    ("  after a gap, p99", "p99_return_ttft_s", "time"),
    ("prompt tokens from GPU memory", "gpu_hit_tokens", "count"),
    ("  from the CPU tier", "cpu_hit_tokens", "count"),
    ("  computed again", "recomputed_tokens", "count"),
    ("preemptions", "preemptions", "count"),
    ("engine steps", "steps", "count"),
    ("last program ended (s)", "virtual_s", "plain"),
    ("GPU busy", "busy_share", "share"),
    ("link to CPU memory busy (s)", "link_store_s", "plain"),
    ("  and back (s)", "link_load_s", "plain"),
    ("replayed in (s, real)", "wall_s", "plain"),
    ("one decision, median (µs, real)", "decision_us_p50", "plain"),
    ("  p99", "decision_us_p99", "plain"),
)
"""Label, field, kind of figure. A "time" is also shown as a ratio to the first policy's."""


def figure(value: float | None, kind: str) -> str:
    """A figure as text."""
    if value is None:
        return "-"
    if kind == "count":
        return f"{value:,}" if value < _MILLION else f"{value / _MILLION:,.2f} M"
    if kind == "share":
        return f"{value:.0%}"
    if kind == "factor":
        return f"{value:.2f}x"
    return f"{value:,.2f}" if value < 100 else f"{value:,.1f}"  # noqa: PLR2004 - four digits


def ratio(row: Row, base: Row, key: str, kind: str) -> str:
    """A time as a multiple of another policy's; empty where that says nothing."""
    if kind != "time" or row is base or row[key] is None or not base[key]:
        return ""
    return f"{row[key] / base[key]:.2f}x"


def shown_lines(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """The lines of which at least one policy has a figure."""
    return [line for line in LINES if any(row.get(line[1]) is not None for row in rows)]


def results_table(rows: Sequence[Row]) -> Table:
    """All figures, a column for each policy, and in brackets the ratio to the first one."""
    table = Table(title="replay in virtual time; times: lower is better")
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["policy"], justify="right", overflow="fold")
    for label, key, kind in shown_lines(rows):
        cells = []
        for row in rows:
            compared = ratio(row, rows[0], key, kind)
            text = figure(row[key], kind)
            cells.append(f"{text} ({compared})" if compared else text)
        table.add_row(label, *cells)
    return table


def sweep_table(sweep: Mapping[str, Any]) -> Table:
    """Mean job completion by value and policy, and in brackets the ratio to the first policy."""
    means: Mapping[str, Sequence[float | None]] = sweep["mean_jct_s"]
    table = Table(title="mean job completion (s) in virtual time; lower is better")
    table.add_column(sweep["option"], justify="right", overflow="fold")
    for policy in means:
        table.add_column(policy, justify="right", overflow="fold")
    columns = list(means.values())
    for i, value in enumerate(sweep["values"]):
        base = columns[0][i]
        cells = []
        for column in columns:
            mean = column[i]
            compared = (
                f" ({mean / base:.2f}x)" if base and mean and column is not columns[0] else ""
            )
            cells.append(figure(mean, "time") + compared)
        table.add_row(f"{value:g}", *cells)
    return table


class ReplayProgress:
    """A bar for each replay; where the output is no terminal, a line when one begins and when it ends."""

    def __init__(self, console: Console, labels: Sequence[str], totals: Sequence[int]) -> None:
        """Prepare a bar for each label, with so many programs each."""
        self._console = console
        self._labels = labels
        self._totals = totals
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("programs"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: list[TaskID] = [
            self._progress.add_task(label, total=total, start=False)
            for label, total in zip(labels, totals, strict=True)
        ]

    def __enter__(self) -> Self:
        """Show the bars."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bars as they are."""
        self._progress.stop()

    def told(self, index: int, n_ended: int) -> None:
        """So many programs of a replay have ended; 0 when it begins."""
        bar, label, total = self._bars[index], self._labels[index], self._totals[index]
        if not n_ended:
            self._progress.start_task(bar)
            self._line(f"{label}: replaying {total} programs")
        self._progress.update(bar, completed=n_ended)
        if n_ended == total:
            self._progress.stop_task(bar)
            self._line(f"{label}: {total} programs have ended")

    def _line(self, text: str) -> None:
        if self._progress.disable:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
