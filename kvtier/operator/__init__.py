"""The operator's commands: what the host's control server says and does, from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

# These register their commands at `TOP_LEVEL`.
from kvtier.operator import chaos, explain, status, top, watch
from kvtier.operator.command import TOP_LEVEL
from kvtier.operator.policy import POLICY
from kvtier.operator.programs import PROGRAMS
from kvtier.operator.ttl import TTL

if TYPE_CHECKING:
    import typer

__all__ = ["add_commands", "chaos", "explain", "status", "top", "watch"]


def add_commands(app: typer.Typer) -> None:
    """Add them to kvtier's own commands."""
    for group in (TOP_LEVEL, PROGRAMS, TTL, POLICY):
        app.add_typer(group)
