"""`kvtier top`: engines, tiers, programs and decisions, live."""

import sys
from typing import Annotated, Final

import typer

from kvtier.operator.command import TOP_LEVEL, Session, control_command
from kvtier.operator.durations import DURATION
from kvtier.operator.output import print_json

_SHORTEST_S: Final = 0.1


@control_command(TOP_LEVEL, "top", examples=("kvtier top", "kvtier top --once"))
def top(
    session: Session,
    *,
    interval: Annotated[
        float,
        typer.Option(help="Time between frames. Default: 1s.", show_default=False, **DURATION),
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame; so it is where there is no terminal.")
    ] = False,
) -> None:
    """Watch engines, memory, programs and decisions live; q or Ctrl-C ends it."""
    # Loading these takes what `kvtier --help` should not wait for.
    from kvtier.operator.top_frame import frame  # noqa: PLC0415
    from kvtier.operator.top_live import show_live  # noqa: PLC0415
    from kvtier.operator.top_view import Decisions, collect  # noqa: PLC0415

    decisions = Decisions()
    view = collect(session.client, decisions)
    if session.as_json:
        print_json(view)
    elif once or not sys.stdout.isatty():
        session.console.print(frame(view))
    else:
        with decisions.followed(session.client):
            show_live(session, decisions, view, max(_SHORTEST_S, interval))
