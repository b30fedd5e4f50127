"""Tenants' budgets as people write them: acme=8GiB*60s/10m, 8 GiB pinned for a minute of every ten."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Final

import typer

from kvtier.operator.durations import format_duration, parse_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtier.client import TenantBudget

BUDGETS_ACCEPTED: Final = (
    "TENANT=BYTES*DURATION/PERIOD with commas between, as in acme=8GiB*60s/10m, or none; tenants that are "
    "not named have no limit"
)

_UNITS: Final = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_BUDGET: Final = re.compile(
    rf"(?P<bytes>\d{{1,18}}(\.\d{{1,9}})?)(?P<unit>{'|'.join(_UNITS)})"
    r"\*(?P<held>[^*/]+)/(?P<period>[^*/]+)",
    re.ASCII,
)
_MAX_BYTE_SECONDS: Final = (1 << 63) - 1


def parse_budgets(text: str) -> list[TenantBudget]:
    """Return the budgets, none for "none".

    Raises:
        typer.BadParameter: the text is none of what is accepted.
    """
    return [] if text == "none" else [_parse_budget(entry) for entry in text.split(",")]


def _parse_budget(text: str) -> TenantBudget:
    from kvtier.client import TenantBudget  # noqa: PLC0415 - brings grpc

    # A tenant may have a "=" in its name, as base64 has; an amount has none.
    tenant, equals, amount = text.rpartition("=")
    match = _BUDGET.fullmatch(amount)
    if not equals or match is None:
        raise typer.BadParameter(f"{text!r}: accepted is {BUDGETS_ACCEPTED}")
    period_s = parse_duration(match["period"])
    held_s = Decimal(str(parse_duration(match["held"])))
    byte_seconds = int(Decimal(match["bytes"]) * _UNITS[match["unit"]] * held_s)
    if period_s <= 0 or byte_seconds > _MAX_BYTE_SECONDS:
        raise typer.BadParameter(
            f"{text!r}: accepted is a period of more than 0 and at most {_MAX_BYTE_SECONDS} byte-seconds"
        )
    return TenantBudget(tenant, byte_seconds, period_s)


def show_budgets(budgets: Sequence[TenantBudget]) -> str:
    """Return what `parse_budgets` reads as these budgets, if no tenant's name has a comma."""
    return ",".join(_show_budget(budget) for budget in budgets) or "none"


def _show_budget(budget: TenantBudget) -> str:
    amount, unit = budget.byte_seconds, ""
    for name, size in _UNITS.items():
        if budget.byte_seconds and budget.byte_seconds % size == 0:
            amount, unit = budget.byte_seconds // size, name
    return f"{budget.tenant}={amount}{unit}*1s/{format_duration(budget.period_s)}"
