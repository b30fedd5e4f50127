"""Durations as people write them: 90, 90s, 5m, 1h30m, 2d, 250ms."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Final

import typer

ACCEPTED: Final = "accepted is a number of seconds, or with units as in 90s, 5m, 1h30m, 2d or 250ms"

_UNITS: Final = {
    "d": Decimal(86_400),
    "h": Decimal(3_600),
    "m": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("0.001"),
}
_NUMBER: Final = r"\d{1,15}(?:\.\d{1,9})?"
_WITH_UNITS: Final = re.compile("".join(f"(?:({_NUMBER}){unit})?" for unit in _UNITS), re.ASCII)
_MS_PER_S: Final = 1_000
_MS_PER_DAY: Final = 86_400_000


def parse_duration(text: str) -> float:
    """Return seconds.

    Raises:
        typer.BadParameter: the text is none of what is accepted.
    """
    if re.fullmatch(_NUMBER, text, re.ASCII):
        return float(text)
    match = _WITH_UNITS.fullmatch(text)
    if match is None or not text:
        raise typer.BadParameter(f"{text!r}: {ACCEPTED}")
    # Decimal: a sum of floats would not be the float of the sum.
    numbers = zip(match.groups("0"), _UNITS.values(), strict=True)
    return float(sum((Decimal(number) * unit for number, unit in numbers), Decimal(0)))


def format_duration(seconds: float) -> str:
    """Return what `parse_duration` reads as these seconds, to the millisecond."""
    if seconds < 0:
        return f"-{format_duration(-seconds)}"
    days, ms = divmod(round(seconds * _MS_PER_S), _MS_PER_DAY)
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{n}{unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "m")) if n]
    if 0 < ms < _MS_PER_S and not parts:
        return f"{ms}ms"
    if ms or not parts:
        parts.append(f"{ms / _MS_PER_S:.3f}".rstrip("0").rstrip(".") + "s")
    return "".join(parts)


def about(seconds: float | None) -> str:
    """Return a duration for a table: two units at most; empty for None."""
    if seconds is None:
        return ""
    size = abs(seconds)
    for limit_s, step_s in ((1, 0.001), (60, 0.1), (3_600, 1), (86_400, 60)):
        if size < limit_s:
            return format_duration(round(seconds / step_s) * step_s)
    return format_duration(round(seconds / 3_600) * 3_600)


def _parse_option(value: str | float) -> float:
    # typer hands the default to the parser, too.
    return parse_duration(value) if isinstance(value, str) else value


DURATION: Final[dict[str, Any]] = {"parser": _parse_option, "metavar": "DURATION"}
"""For typer's options."""
