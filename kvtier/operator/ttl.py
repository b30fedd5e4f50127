"""`kvtier ttl`: overrides of the TTL that kvtier chooses for pauses."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvtier.operator.command import USAGE, Session, control_command, make_group, stop
from kvtier.operator.durations import DURATION, format_duration, parse_duration
from kvtier.operator.output import make_table, plain, print_json, until

if TYPE_CHECKING:
    from kvtier.client import TtlOverride, TtlScope

TTL: Final = make_group(
    "ttl",
    "Override for how long pauses keep their KV in GPU memory. Overrides hold from the next pause on, "
    "survive restarts, and the most specific one wins: program before tool before tenant before all.",
)

_MODES: Final = ("fixed", "cap", "floor")
_NOT_SAVED: Final = "not saved, as the control server cannot write its state file"

ProgramOption = Annotated[
    str | None, typer.Option("--program", help="Pauses of this program.", metavar="PROGRAM")
]
ToolOption = Annotated[
    str | None, typer.Option("--tool", help="Pauses after calls of this tool.", metavar="TOOL")
]
TenantOption = Annotated[
    str | None,
    typer.Option(
        "--tenant",
        help="Pauses of this tenant (vLLM's cache_salt); with --program: the program's tenant.",
        metavar="TENANT",
    ),
]
AllOption = Annotated[bool, typer.Option("--all", help="All pauses.")]


def _mode(text: str) -> str:
    if text not in _MODES:
        raise typer.BadParameter(f"{text!r}: accepted is {', '.join(_MODES)}")
    return text


@control_command(
    TTL,
    "set",
    examples=(
        "kvtier ttl set 60s --tool bash --mode cap --expires 1h",
        "kvtier ttl set 0 --program my-agent",
        "kvtier ttl set 5m --all --mode floor",
    ),
)
def set_(
    session: Session,
    ttl: Annotated[
        float,
        typer.Argument(help="E.g. 60s; 0 pins nothing.", parser=parse_duration, metavar="TTL"),
    ],
    *,
    program: ProgramOption = None,
    tool: ToolOption = None,
    tenant: TenantOption = None,
    everything: AllOption = False,
    mode: Annotated[
        str,
        typer.Option(
            help="fixed: exactly so long. cap: at most. floor: at least.",
            parser=_mode,
            metavar="|".join(_MODES),
        ),
    ] = "fixed",
    expires: Annotated[
        float | None, typer.Option(help="End the override after this. Default: never.", **DURATION)
    ] = None,
) -> None:
    """Set an override, in place of the one that its scope has."""
    scope = _scope(program, tool, tenant, everything=everything)
    try:
        expires_at = None if expires is None else datetime.now(UTC) + timedelta(seconds=expires)
    except OverflowError:
        stop("--expires: accepted is what ends before the year 10000", USAGE)
    applied = session.client.set_ttl_override(scope, ttl, mode=mode, expires_at=expires_at)
    if session.as_json:
        print_json(applied)
        return
    session.console.print(plain(_sentence(applied.override)), soft_wrap=True)
    session.console.print(f"engines that have it: {applied.engines}")
    if not applied.saved:
        session.console.print(f"{_NOT_SAVED}: it ends with the control server")


@control_command(TTL, "ls", examples=("kvtier ttl ls",))
def ls(session: Session) -> None:
    """List the overrides that hold, the most specific first."""
    overrides = list(session.client.iter_ttl_overrides(page_size=1000))
    if session.as_json:
        print_json({"overrides": overrides})
        return
    if not overrides:
        session.console.print("no overrides: kvtier chooses every TTL")
        return
    now = datetime.now(UTC)
    rows = [
        (o.scope, o.mode, format_duration(o.ttl_s), until(o.expires_at, now) or "never")
        for o in overrides
    ]
    session.console.print(make_table(("scope", "mode", "ttl>", "expires in>"), rows))


@control_command(TTL, "rm", examples=("kvtier ttl rm --tool bash", "kvtier ttl rm --all"))
def rm(
    session: Session,
    *,
    program: ProgramOption = None,
    tool: ToolOption = None,
    tenant: TenantOption = None,
    everything: AllOption = False,
) -> None:
    """Remove the override of a scope (--all: the one for all pauses, no other)."""
    scope = _scope(program, tool, tenant, everything=everything)
    deleted = session.client.delete_ttl_override(scope)
    if session.as_json:
        print_json({"deleted": scope, "engines": deleted.engines, "saved": deleted.saved})
        return
    session.console.print(plain(f"removed: {scope}"), soft_wrap=True)
    if not deleted.saved:
        session.console.print(f"{_NOT_SAVED}: it is back when the control server starts anew")


def _scope(
    program: str | None, tool: str | None, tenant: str | None, *, everything: bool
) -> "TtlScope":
    from kvtier.client import TtlScope  # noqa: PLC0415 - brings grpc

    given = (program is not None, tool is not None, everything)
    if sum(given) > 1 or (tenant is not None and (tool is not None or everything)):
        stop("one scope at a time: --program (with --tenant), --tool, --tenant or --all", USAGE)
    if program is not None:
        return TtlScope.of_program(program, tenant or "")
    if tool is not None:
        return TtlScope.of_tool(tool)
    if tenant is not None:
        return TtlScope.of_tenant(tenant)
    if not everything:
        stop("for which pauses? --program, --tool, --tenant or --all", USAGE)
    return TtlScope.of_all()


def _sentence(override: "TtlOverride") -> str:
    limit = {"fixed": "exactly", "cap": "at most", "floor": "at least"}.get(override.mode, "")
    ends = until(override.expires_at, datetime.now(UTC))
    return f"{override.scope}: {limit} {format_duration(override.ttl_s)}" + (
        f", for {ends}" if ends else ""
    )
