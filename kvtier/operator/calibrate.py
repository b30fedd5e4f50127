"""``kvtier calibrate --running``: the engines that run measure their link anew."""

from typing import Annotated, Final

import typer

from kvtier.operator.command import Session, control_command, make_group

RUNNING: Final = make_group()
"""Not among the operator's commands: `kvtier calibrate` hands over to it."""


@control_command(
    RUNNING,
    "calibrate",
    examples=("kvtier calibrate --running", "kvtier calibrate --running --engine ENGINE"),
)
def calibrate_running(
    session: Session,
    *,
    engine: Annotated[
        str, typer.Option(help="Only this one. Default: all.", metavar="ENGINE", show_default=False)
    ] = "",
) -> None:
    """Let the engines that run measure their link anew, each at its next idle moment.

    It takes two seconds, in which an engine does nothing else, and as much scratch memory on each side as
    at its start. What is known of prefill times stays. `kvtier status` tells when the link was measured.
    """
    session.finish(session.client.calibrate(engine_id=engine))
