"""What operators' commands print: JSON for programs, tables and lines for people.

Names come from clients of the engine: whatever would steer a terminal is shown as its escape sequence.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvtier.operator.durations import about

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_WIDE: Final = 240
_KIB: Final = 1024
_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def make_console() -> Console:
    """A console for text from outside: no markup, nothing cut off where the output is no terminal."""
    width = None if sys.stdout.isatty() else _WIDE
    return Console(width=width, markup=False, highlight=False, emoji=False)


def print_json(value: Any, *, lines: bool = False) -> None:
    """Print a record, or what holds records; `lines`: as one line."""
    typer.echo(json.dumps(to_plain(value), indent=None if lines else 2))


def to_plain(value: Any) -> Any:
    """Return records as JSON has them: fields by name, times as ISO 8601 in UTC."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    # A StrEnum's value: json would write the same, a reader of this object would not see it.
    return str(value) if isinstance(value, str) else value


def plain(text: object) -> str:
    """Return a text of one line that steers no terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def make_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Make a table without lines; a column whose name ends in ">" is set to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(
            column.removesuffix(">"), justify="right" if column.endswith(">") else "left"
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else plain(cell) for cell in row))
    return table


def print_pairs(console: Console, pairs: Iterable[tuple[str, object]], indent: int = 2) -> None:
    """Print names and values in two columns; values that are empty are left out."""
    shown = [(name, plain(value)) for name, value in pairs if value not in {None, ""}]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        console.print(f"{'':{indent}}{name:{width}}  {value}", soft_wrap=True)


def show_bytes(n_bytes: float) -> str:
    """Return an amount of memory in the largest unit of which there is one."""
    value = float(n_bytes)
    for unit in _UNITS:
        if abs(value) < _KIB or unit == _UNITS[-1]:
            break
        value /= _KIB
    return f"{value:.0f} {unit}" if unit == _UNITS[0] else f"{value:.1f} {unit}"


def show_rate(bytes_per_s: float) -> str:
    """Return a link's speed, in the decimal units that links are sold by."""
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s else "not measured"


def ago(moment: datetime | None, now: datetime) -> str:
    """Return how long ago something was; empty for None."""
    return "" if moment is None else about(max(0.0, (now - moment).total_seconds()))


def until(moment: datetime | None, now: datetime) -> str:
    """Return in how long something is; "overdue" where it was; empty for None."""
    if moment is None:
        return ""
    left_s = (moment - now).total_seconds()
    return about(left_s) if left_s > 0 else "overdue"
