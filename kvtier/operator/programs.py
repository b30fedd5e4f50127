"""`kvtier programs`: which programs there are, where their KV is, and what is to become of it."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.table import Table

from kvtier.operator.command import Session, control_command, make_group
from kvtier.operator.durations import about, parse_duration
from kvtier.operator.output import ago, make_table, plain, print_json, print_pairs, until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.client import Program

PROGRAMS: Final = make_group("programs", "List programs (agents), and steer where their KV is.")

MAX_PAGE: Final = 1000
_STATES: Final = ("waiting", "running", "paused")

Name = Annotated[
    str, typer.Argument(help="Name of the program: its session id.", metavar="PROGRAM")
]
Tenant = Annotated[
    str, typer.Option(help="Its tenant, vLLM's cache_salt.", metavar="TENANT", show_default=False)
]


def _state(text: str) -> str:
    if text not in _STATES:
        raise typer.BadParameter(f"{text!r}: accepted is {', '.join(_STATES)}")
    return text


@control_command(
    PROGRAMS,
    "ls",
    examples=("kvtier programs ls", "kvtier programs ls --state paused --state waiting"),
)
def ls(
    session: Session,
    *,
    state: Annotated[
        list[str] | None,
        typer.Option(
            help="Only in this state; may be repeated.",
            parser=_state,
            metavar="|".join(_STATES),
        ),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Only of this tenant.", metavar="TENANT")
    ] = None,
    limit: Annotated[int, typer.Option(help="Show at most so many; 0: all.", min=0)] = 100,
) -> None:
    """List programs, most recently active first."""
    states = list(dict.fromkeys(state or ()))
    found: list[Program] = []
    token, total_size = "", 0
    while True:
        page = session.client.list_programs(
            states=states,
            tenant=tenant,
            page_size=min(limit - len(found), MAX_PAGE) if limit else MAX_PAGE,
            page_token=token,
        )
        found += page.programs
        token, total_size = page.next_page_token, page.total_size
        if not token or len(found) >= limit > 0:
            break
    if session.as_json:
        print_json({"programs": found, "total_size": total_size})
        return
    if not found:
        session.console.print("no programs")
        return
    session.console.print(program_table(found, datetime.now(UTC)))
    if token:
        more = total_size - len(found)
        session.console.print(f"and {more:,} more: --limit 0 shows all")


def program_table(programs: "Sequence[Program]", now: datetime) -> Table:
    """Make a table of programs, with the columns that have anything in them."""
    columns: list[tuple[str, Callable[[Program], object]]] = [
        ("program", lambda p: p.name),
        ("tenant", lambda p: p.tenant),
        ("state", lambda p: p.state),
        ("tool", lambda p: p.tool or ""),
        ("turns>", lambda p: p.turns),
        ("context>", lambda p: f"{p.context_tokens:,}"),
        ("gpu>", lambda p: f"{p.gpu_pinned_tokens:,}" if p.gpu_pinned_tokens else ""),
        ("cpu>", lambda p: f"{p.cpu_tokens:,}" if p.cpu_tokens else ""),
        ("ttl left>", lambda p: about(p.ttl_left_s)),
        ("returns in>", lambda p: until(p.predicted_return_at, now)),
        ("active>", lambda p: f"{ago(p.last_active_at, now)} ago" if p.last_active_at else ""),
        ("engine", lambda p: p.engine_id),
    ]
    if len({program.engine_id for program in programs}) < 2:  # noqa: PLR2004 - one says nothing
        columns.pop()
    cells = [[str(show(program)) for _, show in columns] for program in programs]
    used = [n for n in range(len(columns)) if any(row[n] for row in cells)]
    return make_table([columns[n][0] for n in used], [[row[n] for n in used] for row in cells])


@control_command(PROGRAMS, "get", examples=("kvtier programs get my-agent",))
def get(session: Session, name: Name, *, tenant: Tenant = "") -> None:
    """Show one program, once for each engine that knows it."""
    found = session.client.get_program(name, tenant=tenant)
    if session.as_json:
        print_json({"programs": found})
        return
    now = datetime.now(UTC)
    for program in found:
        session.console.print(plain(program.name), style="bold")
        returns = until(program.predicted_return_at, now)
        print_pairs(
            session.console,
            [
                ("tenant", program.tenant),
                ("known by", "its session id" if program.named else "its prefix alone"),
                ("state", program.state),
                ("tool", program.tool),
                ("engine", program.engine_id),
                ("turns", program.turns),
                ("context", f"{program.context_tokens:,} tokens"),
                ("in gpu memory", f"{program.gpu_pinned_tokens:,} tokens pinned"),
                ("in cpu tier", f"{program.cpu_tokens:,} tokens"),
                ("ttl left", about(program.ttl_left_s)),
                ("returns", returns if returns in {"", "overdue"} else f"in {returns}"),
                ("started", _ago(program.started_at, now)),
                ("last active", _ago(program.last_active_at, now)),
            ],
        )


def _ago(moment: datetime | None, now: datetime) -> str:
    return f"{ago(moment, now)} ago" if moment else ""


@control_command(PROGRAMS, "pin", examples=("kvtier programs pin my-agent 10m",))
def pin(
    session: Session,
    name: Name,
    ttl: Annotated[
        float,
        typer.Argument(help="How long, from now, e.g. 10m.", parser=parse_duration, metavar="TTL"),
    ],
    *,
    tenant: Tenant = "",
) -> None:
    """Keep a paused program's KV in GPU memory for a while."""
    session.finish(session.client.pin_program(name, ttl, tenant=tenant))


@control_command(PROGRAMS, "release", examples=("kvtier programs release my-agent",))
def release(session: Session, name: Name, *, tenant: Tenant = "") -> None:
    """Give up a paused program's KV in GPU memory; its copy in the CPU tier stays."""
    session.finish(session.client.release_program(name, tenant=tenant))


@control_command(PROGRAMS, "stage", examples=("kvtier programs stage my-agent",))
def stage(session: Session, name: Name, *, tenant: Tenant = "") -> None:
    """Copy a paused program's KV to the CPU tier."""
    session.finish(session.client.stage_program(name, tenant=tenant))


@control_command(PROGRAMS, "prefetch", examples=("kvtier programs prefetch my-agent",))
def prefetch(session: Session, name: Name, *, tenant: Tenant = "") -> None:
    """Load a paused program's KV from the CPU tier: it is about to return."""
    session.finish(session.client.prefetch_program(name, tenant=tenant))


@control_command(PROGRAMS, "end", examples=("kvtier programs end my-agent",))
def end(session: Session, name: Name, *, tenant: Tenant = "") -> None:
    """Say that a program is over: its KV is given up everywhere."""
    session.finish(session.client.end_program(name, tenant=tenant))
