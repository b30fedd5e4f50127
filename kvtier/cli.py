"""The command `kvtier`."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from kvtier import __version__
from kvtier.config import ConfigError, Settings, accepted
from kvtier.operator import add_commands

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtier.doctor import Check

_STYLES: Final = {"ok": "green", "warn": "yellow", "fail": "red"}
_PASS_THROUGH: Final = {"allow_extra_args": True, "ignore_unknown_options": True}
_RUNNING: Final = "--running"

app = typer.Typer(
    name="kvtier",
    help="Keeps the KV cache of agents at hand while their tools run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
add_commands(app)


@app.callback()
def start() -> None:
    """Keep the KV cache of agents at hand while their tools run."""
    logging.basicConfig(level=logging.INFO, format="kvtier: %(message)s")


@app.command(context_settings=_PASS_THROUGH)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model name or directory.")],
    *,
    program_scheduler: Annotated[
        bool | None,
        typer.Option(
            "--program-scheduler/--no-program-scheduler",
            help="Order requests by program inside vLLM's scheduler, under its priority policy. "
            "Default: yes, unless your flags choose another scheduler or policy, or kvtier is not on.",
            show_default=False,
        ),
    ] = None,
    no_middleware: Annotated[
        bool,
        typer.Option(
            "--no-middleware",
            help="Neither recognise agents by their own headers nor wake an idle engine for commands.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command and run nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
) -> None:
    """Serve MODEL with vLLM and kvtier; all other flags go to vllm serve.

    Starts the host's LMCache server, or joins the one that runs. What your flags leave open is
    filled in: the connector, the scheduler, the tool parser, the middleware, and on CPU the block size.
    """
    _serve(
        model,
        context.args,
        program_scheduler=program_scheduler,
        middleware=not no_middleware,
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command(context_settings=_PASS_THROUGH)
def record(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="File to append to; kvtier replay reads it.", metavar="FILE")
    ],
    model: Annotated[str, typer.Argument(help="Model name or directory.")],
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command and run nothing.")
    ] = False,
) -> None:
    """Serve MODEL as kvtier serve does, and record every turn in FILE for kvtier replay.

    A turn is one line of JSON: when it came and ended, its tokens, and hashes of its program, its
    tool and its prompt's content, with a key that is kept nowhere. No text is recorded.
    """
    path = file.expanduser().resolve()
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        _stop(f"{file}: accepted is a file that can be written, in a directory that exists")
    _serve(model, context.args, dry_run=dry_run, record_file=str(path))


def _serve(
    model: str,
    arguments: Sequence[str],
    *,
    dry_run: bool,
    as_json: bool = False,
    program_scheduler: bool | None = None,
    middleware: bool = True,
    record_file: str | None = None,
) -> None:
    """Plan and run `vllm serve`."""
    from kvtier.serving.plan import ServeError, VllmFlags, plan_serve  # noqa: PLC0415
    from kvtier.serving.process import read_chat_template, run_serve, runs_on_cpu  # noqa: PLC0415
    from kvtier.supervisor import SupervisorError  # noqa: PLC0415

    words, cpu = list(arguments), runs_on_cpu()
    if as_json and not dry_run:
        _stop("--json prints the plan of --dry-run: give both")
    try:
        flags = VllmFlags(words)
        _check_model(model)
        # A template is read only to infer the parser.
        template = None
        if not flags.given("--tool-call-parser"):
            template = read_chat_template(model, flags.value("--chat-template"))
        configured = Settings.load()
        if program_scheduler is None and configured.mode != "on":
            # kvtier is to change nothing: neither the order nor what clients' priorities mean.
            program_scheduler = False
        plan = plan_serve(
            model,
            words,
            cpu=cpu,
            chat_template=template,
            configured_parser=configured.tool_call_parser,
            program_scheduler=program_scheduler,
            middleware=middleware,
            record_file=record_file,
        )
        # Whatever is wrong with a setting must show here, not minutes later in the engine.
        settings = Settings.load(plan.extra)
    except (ServeError, ConfigError, OSError) as error:
        _stop(str(error))
    if dry_run:
        _print_json(_plan_object(plan)) if as_json else typer.echo(shlex.join(plan.argv))
        return
    for note in plan.notes:
        logging.getLogger(__name__).info("%s", note)
    try:
        code = run_serve(plan, model, settings, cpu=cpu)
    except SupervisorError as error:
        _stop(str(error))
    raise typer.Exit(code)


def _check_model(model: str) -> None:
    """Refuse a path that is not there before anything is started."""
    from kvtier.serving.plan import ServeError  # noqa: PLC0415

    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().exists():
        raise ServeError(f"{model} does not exist; give a directory with a model, or a hub name")


@app.command()
def doctor(
    *,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="vLLM's --block-size, tokens.")
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a chunk of the CPU tier.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this host; the exit code is 1 when something must be changed."""
    from kvtier.doctor import Status, run_checks  # noqa: PLC0415
    from kvtier.serving.process import runs_on_cpu  # noqa: PLC0415

    extra = {} if chunk_tokens is None else {"kvtier.chunk_tokens": chunk_tokens}
    try:
        settings = Settings.load(extra)
    except ConfigError as error:
        _stop(str(error))
    checks = run_checks(settings, block_tokens=block_size, cpu=runs_on_cpu())
    failed = any(check.status is Status.FAIL for check in checks)
    if as_json:
        _print_json({"ok": not failed, "checks": [_check_object(check) for check in checks]})
    else:
        _print_checks(checks)
    raise typer.Exit(int(failed))


@app.command()
def config(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Print what may be set, as a Markdown table.")
    ] = False,
) -> None:
    """Print the settings in force and where each comes from."""
    if reference:
        typer.echo(settings_reference(), nl=False)
        return
    try:
        settings, sources = Settings.load_with_sources()
    except ConfigError as error:
        _stop(str(error))
    values = settings.model_dump(mode="json")
    if as_json:
        _print_json({n: {"value": v, "source": sources[n]} for n, v in values.items()})
        return
    table = Table("setting", "value", "source", box=None)
    for name, value in values.items():
        shown = accepted(name).rpartition(" or ")[2] if value is None else str(value)
        table.add_row(name, shown, sources[name])
    Console().print(table)


@app.command()
def version() -> None:
    """Print kvtier's version."""
    typer.echo(__version__)


@app.command(
    name="demo",
    context_settings={**_PASS_THROUGH, "help_option_names": []},
    help="Run the same agents on vLLM, stock LMCache and kvtier, and compare.",
)
def demo(context: typer.Context) -> None:
    """Hand over to the demo's own command, whose imports take seconds."""
    from kvtier.demo.command import demo as command  # noqa: PLC0415

    own = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    own.command()(command)
    own(args=context.args, prog_name="kvtier demo", standalone_mode=True)


@app.command(
    name="replay",
    context_settings={**_PASS_THROUGH, "help_option_names": []},
    help="Replay agents under several policies in virtual time, and compare.",
)
def replay(context: typer.Context) -> None:
    """Hand over to the replay's own command."""
    from kvtier.replay.command import replay as command  # noqa: PLC0415

    own = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    own.command()(command)
    own(args=context.args, prog_name="kvtier replay", standalone_mode=True)


@app.command(
    name="calibrate",
    context_settings={**_PASS_THROUGH, "help_option_names": []},
    help="Measure this machine's link and a model's prefill times, which engines start from.",
)
def calibrate(context: typer.Context) -> None:
    """Hand over to the calibration's own command, or to the operator's for engines that run."""
    if _RUNNING in context.args:
        from kvtier.operator.calibrate import RUNNING  # noqa: PLC0415

        words = [word for word in context.args if word != _RUNNING]
        RUNNING(args=words, prog_name=f"kvtier calibrate {_RUNNING}", standalone_mode=True)
    from kvtier.measuring.command import calibrate as command  # noqa: PLC0415

    own = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    own.command(context_settings=_PASS_THROUGH)(command)
    own(args=context.args, prog_name="kvtier calibrate", standalone_mode=True)


bench = typer.Typer(
    name="bench", help="Benchmarks of kvtier's parts.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(bench)


@bench.callback()
def start_bench() -> None:
    """Benchmarks of kvtier's parts."""


@bench.command(
    name="link",
    context_settings={**_PASS_THROUGH, "help_option_names": []},
    help="GB/s of copies between the KV cache and host memory: kvtier's, the link's limit, others'.",
)
def bench_link(context: typer.Context) -> None:
    """Hand over to the benchmark's own command."""
    from kvtier.linkbench.command import link as command  # noqa: PLC0415

    own = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    own.command()(command)
    own(args=context.args, prog_name="kvtier bench link", standalone_mode=True)


def settings_reference() -> str:
    """Return a Markdown table of all settings."""
    lines = ["| setting | accepted | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        values = accepted(name)
        default = field.default
        if default is None:
            default = values.rpartition(" or ")[2]
        shown = str(default).lower() if isinstance(default, bool) else default
        lines.append(f"| `{name}` | {values} | {shown} | {field.description} |")
    return "\n".join(lines) + "\n"


def _plan_object(plan: Any) -> dict[str, object]:
    return {"command": plan.argv, "extra_config": plan.extra, "notes": plan.notes}


def _check_object(check: Check) -> dict[str, str]:
    return {
        "name": check.name,
        "status": check.status.value,
        "found": check.found,
        "change": check.change,
    }


def _print_checks(checks: list[Check]) -> None:
    table = Table("", "check", "found", "what to change", box=None)
    for check in checks:
        style = _STYLES[check.status]
        table.add_row(f"[{style}]{check.status}[/]", check.name, check.found, check.change)
    Console().print(table)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def _stop(message: str) -> NoReturn:
    """End with a message for the user, as for any usage error."""
    Console(stderr=True, highlight=False).print(f"kvtier: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    sys.exit(app())
