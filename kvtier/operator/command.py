"""What all operators' commands share: how they reach the control server, and how they end.

Exit codes: 0 done; 1 the server said no; 2 wrong usage; 3 no server or engine answers.

Nothing here imports grpc before a command runs, so that `kvtier --help` stays quick.
"""

import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, NoReturn, ParamSpec

import typer
from rich.console import Console
from typer.core import TyperCommand

from kvtier.operator.durations import DURATION, format_duration, parse_duration
from kvtier.operator.output import make_console, plain, print_json

if TYPE_CHECKING:
    from kvtier.client import CommandResult, ControlError, KVTierClient

P = ParamSpec("P")

SAID_NO: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3

EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 the server said no; 2 wrong usage; 3 no server or engine answers."
)

_FILE: Final = {"metavar": "FILE"}
# What gRPC says before it says what has happened, with the address once more.
_GRPC_PREAMBLE: Final = re.compile(
    r"^failed to connect to all addresses; last error: \w+: \S+: "
    r"(Failed to connect to remote host: )?(connect: )?"
)


def _common(
    *,
    target: Annotated[
        str | None,
        typer.Option(
            help="Control server: HOST:PORT or unix:PATH. Default: KVTIER_CONTROL_TARGET, else the "
            "socket in the run directory, else 127.0.0.1:7461.",
            metavar="TARGET",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with a bearer token. Default: KVTIER_CONTROL_TOKEN_FILE.", **_FILE),
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Encrypt; check the server by the system's certificates.")
    ] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(help="Encrypt; check the server by these certificates (PEM).", **_FILE),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Own certificate (PEM), for mutual TLS.", **_FILE)
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).", **_FILE)] = None,
    timeout: Annotated[
        float,
        typer.Option(
            help="Longest wait for an answer. Default: 5s.", show_default=False, **DURATION
        ),
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Options of every command; their signature is added to each command's own."""


_COMMON: Final = tuple(inspect.signature(_common).parameters.values())


@dataclass
class Session:
    """One command's connection and output."""

    client: "KVTierClient"
    as_json: bool
    timeout_s: float
    console: Console = field(default_factory=make_console)

    def finish(self, results: "Sequence[CommandResult]", value: object = None) -> None:
        """Print the engines' answers, and end with 1 unless it was done and nobody has refused.

        `value` is what is printed as JSON, by default the answers.
        """
        if self.as_json:
            print_json({"results": results} if value is None else value)
        else:
            for result in results:
                said = result.detail or result.reason
                engine = f"  ({result.engine_id})" if result.engine_id else ""
                self.console.print(plain(f"{result.outcome}: {said}{engine}"), soft_wrap=True)
            if not results:
                self.console.print("no engine was there to do it")
        refused = any(result.outcome == "rejected" for result in results)
        if refused or not any(result.is_done for result in results):
            raise typer.Exit(SAID_NO)


def make_group(name: str | None = None, help_text: str | None = None) -> typer.Typer:
    """Make a group of commands, styled as kvtier's own; without a name it joins its parent's."""
    return typer.Typer(
        name=name,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


TOP_LEVEL: Final = make_group()
"""Commands that belong to no group."""


class _DurationCommand(TyperCommand):
    """A command with a duration among its arguments: `-1m` is one below 0, not an unknown option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        valued = {name for p in self.params if not getattr(p, "is_flag", True) for name in p.opts}
        for before, text in zip(["", *args], args, strict=False):
            if text == "--":
                break
            if re.match(r"-\d", text) and before not in valued:
                parse_duration(text)
        return super().parse_args(ctx, args)


def control_command(
    app: typer.Typer, name: str, *, examples: Sequence[str]
) -> Callable[[Callable[Concatenate[Session, P], None]], Callable[Concatenate[Session, P], None]]:
    """Register a command that speaks with the control server, with the options of all such commands.

    Args:
        app: To which it belongs.
        name: Of the command.
        examples: Command lines that its help shows.
    """

    def register(
        function: Callable[Concatenate[Session, P], None],
    ) -> Callable[Concatenate[Session, P], None]:
        own = list(inspect.signature(function).parameters.values())[1:]

        def run(**values: Any) -> None:
            common = {parameter.name: values.pop(parameter.name) for parameter in _COMMON}
            with _session(**common) as session:
                function(session, **values)  # type: ignore[call-arg]

        # typer reads the options from the signature.
        run.__signature__ = inspect.Signature([*own, *_COMMON])  # type: ignore[attr-defined]
        run.__doc__ = function.__doc__
        run.__name__ = function.__name__
        shown = "\n".join(f"  {example}" for example in examples)
        heading = "Example:" if len(examples) == 1 else "Examples:"
        # "\b" keeps the lines that follow as they are.
        notes = (note for p in own for note in getattr(p.annotation, "__metadata__", ()))
        is_timed = any(getattr(note, "parser", None) is parse_duration for note in notes)
        cls = _DurationCommand if is_timed else None
        app.command(name, cls=cls, epilog=f"\b\n{heading}\n{shown}\n\n{EXIT_CODES}")(run)
        return function

    return register


@contextmanager
def _session(
    *,
    target: str | None,
    token_file: Path | None,
    tls: bool,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    timeout: float,
    as_json: bool,
) -> Iterator[Session]:
    """Open a client for a command, and end the command where the client fails."""
    # gRPC's own log would stand beside the one line that says what is wrong.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from kvtier.client import ControlError, KVTierClient  # noqa: PLC0415 - grpc: see above

    if timeout <= 0:
        stop("--timeout 0: accepted is more than 0", USAGE)
    try:
        with KVTierClient(
            target,
            token_file=token_file,
            tls=tls,
            tls_ca=tls_ca,
            tls_cert=tls_cert,
            tls_key=tls_key,
            timeout_s=timeout,
        ) as client:
            try:
                yield Session(client, as_json, timeout)
            except ControlError as error:
                _fail(error, str(client.connection), timeout, as_json=as_json)
    # Of the client, for what cannot be sent: a bad target, an unreadable file, an absurd number.
    except ValueError as error:
        stop(str(error), USAGE)


def _fail(error: "ControlError", where: str, timeout_s: float, *, as_json: bool) -> NoReturn:
    message, code = describe_failure(error, where, timeout_s)
    if as_json:
        fields = {"code": error.code, "message": message, "fields": error.fields}
        typer.echo(json.dumps({"error": fields | {"reason": error.reason}}), err=True)
        raise typer.Exit(code)
    stop(message, code)


def describe_failure(error: "ControlError", where: str, timeout_s: float) -> tuple[str, int]:
    """Return what to tell an operator, in one line, and the exit code."""
    match error.code:
        # A reason is the server's own: it is there.
        case "UNAVAILABLE" if error.reason:
            return f"{where}: {error}", UNREACHABLE
        case "UNAVAILABLE":
            why = _GRPC_PREAMBLE.sub("", str(error)).rstrip(".")
            return f"no control server answers at {where}: {why}. {_advice(why)}", UNREACHABLE
        case "DEADLINE_EXCEEDED":
            waited = format_duration(timeout_s)
            return f"{where} did not answer within {waited}; --timeout allows more", UNREACHABLE
        case "UNAUTHENTICATED":
            return (
                f"{where}: {error}. --token-file or KVTIER_CONTROL_TOKEN_FILE names a file "
                "with a token."
            ), SAID_NO
        case "INVALID_ARGUMENT":
            return str(error), USAGE
        case _:
            return f"{error}", SAID_NO


def _advice(why: str) -> str:
    """Return what an operator may do where no server answers."""
    if "handshake" in why.lower():
        return "--tls-ca names the certificates that the server's one is checked by."
    if why == "Socket closed":
        return "Does it want TLS? --tls-ca names the certificates that its own one is checked by."
    return (
        "Does an engine run with kvtier.control=on? --target or KVTIER_CONTROL_TARGET names another "
        "server."
    )


def stop(message: str, code: int) -> NoReturn:
    """End with a message for the user."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.print(f"kvtier: {plain(message)}", soft_wrap=True)
    raise typer.Exit(code)
