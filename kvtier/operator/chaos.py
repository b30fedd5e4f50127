"""`kvtier chaos`: faults on purpose, in a deployment that is there to be tested, and what becomes of it."""

import http.client
import re
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvtier.operator.chaos_faults import FAULTS, SERVER_NAME, Fault, NotThereError, Victim
from kvtier.operator.command import SAID_NO, TOP_LEVEL, UNREACHABLE, USAGE, stop
from kvtier.operator.durations import DURATION, format_duration
from kvtier.operator.output import make_console, make_table, print_json
from kvtier.stop_signals import as_interrupt

if TYPE_CHECKING:
    from kvtier.client import KVTierClient

LOOK_INTERVAL_S: Final = 0.1
ANSWER_S: Final = 1.0
"""Who does not answer in so long is silent."""
READY: Final = "ready"
SILENT: Final = "silent"
_FAILURE: Final = re.compile(r'^vllm:kvtier_failures_total\{.*kind="([^"]+)".*\} (\S+)$')


@dataclass(frozen=True)
class Health:
    """What answers, and what engines say of their CPU tier. `generation` counts starts of the server."""

    lmcache: str
    generation: int
    control: str
    engines: dict[str, str]


@dataclass(frozen=True)
class Change:
    """The health from a moment on; `at_s` is counted from the fault."""

    at_s: float
    health: Health


@dataclass
class Report:
    """What one fault did.

    Attributes:
        fault: Its name.
        pid: Of the process that it hit; 0 where there was none.
        injected: In words.
        recovered_s: From the end of the fault until all was as before; None: it was not within the wait.
        changes: Each change of the health, from the fault on.
        failures: Counted by the engines meanwhile, by kind; None where nobody was asked.
        problem: Why it was not injected.
    """

    fault: str
    pid: int = 0
    injected: str = ""
    recovered_s: float | None = None
    changes: list[Change] = field(default_factory=list)
    failures: dict[str, int] | None = None
    problem: str = ""


class Observer:
    """Looks at a deployment from outside."""

    def __init__(self, run_dir: Path, client: "KVTierClient", metrics: Sequence[str]) -> None:
        self._run_dir = run_dir
        self._client = client
        self._metrics = metrics

    def look(self) -> Health:
        """Ask everybody."""
        lmcache, generation = self._lmcache()
        engines = self._engines()
        control = SILENT if engines is None else "answers"
        return Health(lmcache, generation, control, engines or {})

    def failures(self) -> Counter[str]:
        """The engines' counters, added up."""
        found: Counter[str] = Counter()
        for url in self._metrics:
            with suppress(OSError, http.client.HTTPException):
                # The scheme was checked when the option was read.
                with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:  # noqa: S310  # nosec B310
                    text = answer.read().decode(errors="replace")
                for match in filter(None, map(_FAILURE.match, text.splitlines())):
                    found[match[1]] += int(float(match[2]))
        return found

    def _lmcache(self) -> tuple[str, int]:
        from kvtier.server.files import ServerFiles  # noqa: PLC0415 - see `chaos_faults`
        from kvtier.server.health import is_healthy  # noqa: PLC0415
        from kvtier.server.state import state_of  # noqa: PLC0415

        record = ServerFiles(self._run_dir, SERVER_NAME).read_record()
        if record is None:
            return "none", 0
        state = state_of(record)
        if state.status == READY and not is_healthy(record.endpoint.http_port, ANSWER_S):
            return SILENT, state.generation
        return str(state.status), state.generation

    def _engines(self) -> dict[str, str] | None:
        from kvtier.client import ControlError  # noqa: PLC0415 - grpc is slow to import

        with suppress(ControlError):
            found = self._client.get_status(timeout_s=ANSWER_S)
            return {engine.engine_id: engine.cpu.state for engine in found.engines}
        return None


def is_recovered(fault: Fault, before: Health, now: Health) -> bool:
    """Whether all that worked before the fault works again."""
    if fault.loses_staged_kv and now.generation <= before.generation:
        return False
    if before.lmcache == READY and now.lmcache != READY:
        return False
    if before.control != SILENT and now.control == SILENT:
        return False
    had = {engine for engine, state in before.engines.items() if state == READY}
    return had <= {engine for engine, state in now.engines.items() if state == READY}


def inject(fault: Fault, run_dir: Path, observer: Observer, hold_s: float, wait_s: float) -> Report:
    """Do it, undo it, and wait until all is as before."""
    report = Report(fault.name)
    before, counted = observer.look(), observer.failures()
    begin_s = time.monotonic()
    with ExitStack() as stack:
        try:
            victim = stack.enter_context(closing(Victim(run_dir, fault.part)))
            victim.send(fault.number)
        except NotThereError as error:
            report.problem = str(error)
            return report
        report.pid = victim.pid
        report.injected = f"{fault.number.name} to process {victim.pid} ({fault.part})"
        try:
            while fault.holds and time.monotonic() - begin_s < hold_s:
                _note(report, observer.look(), begin_s)
                time.sleep(LOOK_INTERVAL_S)
        finally:
            if fault.holds:
                with suppress(NotThereError):
                    victim.send(signal.SIGCONT)
    ended_s = time.monotonic()
    while time.monotonic() - ended_s < wait_s:
        health = observer.look()
        _note(report, health, begin_s)
        if is_recovered(fault, before, health):
            report.recovered_s = time.monotonic() - ended_s
            break
        time.sleep(LOOK_INTERVAL_S)
    report.failures = dict(observer.failures() - counted)
    return report


def _note(report: Report, health: Health, begin_s: float) -> None:
    if not report.changes or report.changes[-1].health != health:
        report.changes.append(Change(round(time.monotonic() - begin_s, 3), health))


_NAMES: Final = "\n".join(f"  {name:16}{fault.effect}" for name, fault in FAULTS.items())
_EPILOG: Final = f"""\b
Faults:
{_NAMES}

\b
Examples:
  kvtier chaos --test-deployment lmcache-kill
  kvtier chaos --test-deployment lmcache-stop --hold 20s --metrics http://127.0.0.1:8000/metrics
  kvtier chaos --test-deployment --json

An idle engine notices a fault, and its end, with its next request: keep some traffic on. Only processes that kvtier has
started on this host are touched.

Exit codes: 0 all is as before; 1 something is not; 2 wrong usage; 3 there was nothing to break."""


@TOP_LEVEL.command("chaos", epilog=_EPILOG)
def chaos(
    faults: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FAULT",
            help="What to break, in this order. Default: all.",
            show_default=False,
        ),
    ] = None,
    *,
    test_deployment: Annotated[
        bool,
        typer.Option(
            "--test-deployment",
            help="Say that this deployment is there to be tested: its staged KV may be lost and its requests "
            "may wait. Without it nothing is done.",
        ),
    ] = False,
    hold: Annotated[
        float,
        typer.Option(
            help="How long what hangs does. Default: 10s.", show_default=False, **DURATION
        ),
    ] = 10.0,
    wait: Annotated[
        float,
        typer.Option(
            help="Longest wait until all is as before. Default: 2m.", show_default=False, **DURATION
        ),
    ] = 120.0,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="kvtier's run directory. Default: this user's, or KVTIER_RUN_DIR.", metavar="DIR"
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="An engine's /metrics, to count its failures by; may be given several times.",
            metavar="URL",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Break parts of a test deployment on purpose, one after the other, and tell what became of it.

    For each fault: what was done to which process, how the health of LMCache server, control server and engines changed, what
    the engines counted as failures, and how long it took until all was as before.
    """
    names = faults or list(FAULTS)
    _check(names, metrics or ())
    if not test_deployment:
        stop(
            "this breaks what runs here, and loses the KV that it holds; say --test-deployment if that is "
            "what it is for",
            USAGE,
        )
    from kvtier.client import KVTierClient  # noqa: PLC0415 - grpc is slow to import
    from kvtier.control.files import ControlFiles  # noqa: PLC0415

    directory = _existing(run_dir)
    reports = []
    # What hangs must go on, however this ends.
    signals = as_interrupt(signal.SIGTERM, signal.SIGHUP)
    target = ControlFiles(directory).unix_target
    with signals, KVTierClient(target, timeout_s=ANSWER_S) as client:
        observer = Observer(directory, client, metrics or ())
        for name in names:
            report = inject(FAULTS[name], directory, observer, hold, wait)
            if not metrics:
                report.failures = None
            reports.append(report)
            if not as_json:
                _show(report, wait)
    if as_json:
        print_json({"faults": reports})
    if all(report.problem for report in reports):
        raise typer.Exit(UNREACHABLE)
    if any(report.recovered_s is None for report in reports):
        raise typer.Exit(SAID_NO)


def _check(names: Sequence[str], metrics: Sequence[str]) -> None:
    for name in names:
        if name not in FAULTS:
            stop(f"{name}: accepted are {', '.join(FAULTS)}", USAGE)
    for url in metrics:
        if not url.startswith(("http://", "https://")):
            stop(f"--metrics {url}: accepted is a URL, as in http://127.0.0.1:8000/metrics", USAGE)


def _existing(run_dir: Path | None) -> Path:
    """The run directory, which is not made for the sake of breaking what would be in it."""
    from kvtier.server.files import (  # noqa: PLC0415 - see `chaos_faults`
        RunDirError,
        default_run_dir,
        prepare_run_dir,
    )

    chosen = run_dir or default_run_dir()
    if not chosen.is_dir():
        stop(f"{chosen} does not exist: no kvtier of this user has run here", UNREACHABLE)
    try:
        return prepare_run_dir(chosen)
    except RunDirError as error:
        stop(str(error), USAGE)


def _show(report: Report, wait_s: float) -> None:
    console = make_console()
    console.print(report.fault, style="bold")
    if report.problem:
        console.print(f"  not done: {report.problem}")
        return
    console.print(f"  {report.injected}")
    rows = [
        (
            f"{change.at_s:.1f}s",
            f"{change.health.lmcache} ({change.health.generation})",
            change.health.control,
            ", ".join(sorted(change.health.engines.values())),
        )
        for change in report.changes
    ]
    console.print(make_table(("after>", "LMCache server", "control server", "engines' tier"), rows))
    if report.failures is not None:
        counted = ", ".join(f"{kind} {n}" for kind, n in sorted(report.failures.items()))
        console.print(f"  failures counted: {counted or 'none'}")
    if report.recovered_s is None:
        console.print(f"  not as before within {format_duration(wait_s)}")
    else:
        console.print(f"  as before after {report.recovered_s:.1f}s")
