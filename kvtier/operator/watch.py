"""`kvtier watch`: what happens, as it happens."""

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvtier.operator.command import TOP_LEVEL, Session, control_command
from kvtier.operator.output import plain, print_json
from kvtier.operator.reasons import headline

if TYPE_CHECKING:
    from kvtier.client import Event, Lost

KINDS: Final = (
    "turn_started",
    "turn_running",
    "turn_ended",
    "decision",
    "pinned",
    "pin_ended",
    "staged",
    "loaded",
    "program_gone",
    "command",
    "engine",
)


def _kind(text: str) -> str:
    if text not in KINDS:
        raise typer.BadParameter(f"{text!r}: accepted is {', '.join(KINDS)}")
    return text


@control_command(
    TOP_LEVEL,
    "watch",
    examples=(
        "kvtier watch --kind decision --program my-agent",
        "kvtier watch --json --count 100 > events.jsonl",
    ),
)
def watch(
    session: Session,
    *,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only events of this kind: {', '.join(KINDS)}. May be repeated.",
            parser=_kind,
            metavar="KIND",
            autocompletion=lambda: list(KINDS),
        ),
    ] = None,
    program: Annotated[
        str, typer.Option(help="Only of this program.", metavar="PROGRAM", show_default=False)
    ] = "",
    tenant: Annotated[
        str,
        typer.Option(
            help="Only of this tenant's programs; with --program: the program's tenant.",
            metavar="TENANT",
            show_default=False,
        ),
    ] = "",
    count: Annotated[
        int | None, typer.Option(help="End after so many. Default: on Ctrl-C.", min=1)
    ] = None,
) -> None:
    """Print events as they happen, one line each (with --json: one object each), until Ctrl-C.

    Where events are missing, because this reads too slowly or an engine could not report all, a line
    says how many.
    """
    from kvtier.client import Lost  # noqa: PLC0415 - brings grpc

    seen = 0
    with (
        suppress(KeyboardInterrupt),
        session.client.watch(kinds=kind or (), name=program, tenant=tenant) as events,
    ):
        for item in events:
            if session.as_json:
                print_json({"lost": item.events} if isinstance(item, Lost) else item, lines=True)
            else:
                session.console.print(plain(describe(item)), soft_wrap=True)
            seen += 1
            if seen == count:
                return


def describe(item: "Event | Lost") -> str:
    """Return an event as a line."""
    from kvtier.client import Lost  # noqa: PLC0415 - brings grpc

    if isinstance(item, Lost):
        return (
            f"lost {item.events} events: this reader is too slow, or an engine could not report all"
        )
    at = item.happened_at.astimezone().strftime("%H:%M:%S.%f")[:-3] if item.happened_at else ""
    said = [headline(item.decision) + f" ({item.decision.reason})"] if item.decision else []
    said += [f"{key}={value}" for key, value in item.fields.items()]
    who = item.name + (f" of {item.tenant}" if item.tenant else "")
    engine = f"({item.engine_id})" if item.engine_id else ""
    return "  ".join(part for part in (f"{at:12}", f"{item.kind:12}", who, *said, engine) if part)
