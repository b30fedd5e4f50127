"""Minutes or hours of real vLLM and LMCache on a CPU, with agents at work and faults: nothing leaks.

    python bench/real_soak.py [--minutes 60] [--agents 6] [--no-faults] [--mode on|off] [--json FILE]

`kvtier serve` runs a small random model. Agents take turn after turn with pauses, end their programs and begin others, in
less GPU memory than all of them want, and beside a small CPU tier. In the first half `kvtier chaos` breaks the LMCache
server, its guardian and the control server, one after the other; nothing is broken in the second half, so that
every process has a long life to be judged by. No request may fail, and each fault must be got over.

Sampled every five seconds: the private memory (`RssAnon`) of the API server, the engine, its workers, the LMCache server and the
control server, the last without the window of decisions that it fills. Each is judged in the longest life of its process, but for the first third of that life: allocators, caches and logs
settle meanwhile. The engine itself is never restarted. `--mode off` shows what vLLM and the agents alone make of it.

At the end, all programs have ended: no pin, no lock, no reservation, no copy and no request may be left, and all GPU blocks must be
free. Exit code 1 where something is not so. Below 20 minutes memory is shown and not judged.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import typer
from rich.console import Console
from rich.table import Table

from bench.process_memory import Memory, growth
from kvtier.client import ControlError
from kvtier.demo.servers import free_ports
from kvtier.operator.chaos_faults import FAULTS, SERVER_NAME
from tests.engine.served import serving
from tests.engine.tier_probe import server_status
from tests.engine.tiny_model import write_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.client import EngineStatus
    from tests.engine.served import Served

N_BLOCKS: Final = 200
SETTINGS: Final = {"kvtier.dram_gb": 0.05, "kvtier.control_grace_s": 5.0}
HOLD_S: Final = 8.0
JUDGED_MINUTES: Final = 20.0
MOST_MIB_PER_HOUR: Final = 4.0
"""The upper end of the 95 % interval of a process's slope."""
SETTLE_S: Final = 90.0
FAULTS_SHARE: Final = 0.5
"""Of the time; the rest is at least `JUDGED_MINUTES` of the default hour."""
MAX_TURNS: Final = 9
TOOLS: Final = ("bash", "search", "edit")
_FILE: Final[dict[str, Any]] = {"metavar": "FILE", "dir_okay": False}


class Agents:
    """Programs that come, take turns and end, in threads."""

    def __init__(self, served: Served, n_agents: int, seed: int) -> None:
        self._served = served
        self._stop = threading.Event()
        self.turns = 0
        self.programs = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(i, seed), name=f"agent-{i}")
            for i in range(n_agents)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let each end its program."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int, seed: int) -> None:
        chance = random.Random(f"{seed}-{number}")  # noqa: S311 - a load, not secrets
        generation = 0
        while not self._stop.is_set():
            generation += 1
            self._program(f"agent-{number}-{generation}", chance)

    def _program(self, name: str, chance: random.Random) -> None:
        turns = chance.randint(3, MAX_TURNS)
        for turn in range(turns):
            last = turn + 1 == turns or self._stop.is_set()
            n_new = chance.randint(40, 200) if turn else chance.randint(300, 600)
            n_output = chance.choice((4, 16, 40))
            try:
                self._served.turn(
                    name, n_new, max_tokens=n_output, tool=chance.choice(TOOLS), end=last
                )
            except Exception as error:  # noqa: BLE001 - told at the end
                self.errors.append(f"{name}, turn {turn + 1}: {type(error).__name__}: {error}")
            with self._lock:
                self.turns += 1
            if last:
                break
            self._stop.wait(chance.expovariate(2.0))
        with self._lock:
            self.programs += 1
        self._served.contexts.pop(name, None)
        self._served.turns.pop(name, None)


def break_things(
    served: Served, run_dir: Path, minutes: float, every_s: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One fault after the other until the time is over; what `kvtier chaos` says of each."""
    until_s = time.monotonic() + minutes * 60
    command = [sys.executable, "-m", "kvtier.cli", "chaos", "--test-deployment", "--json"]
    command += ["--hold", f"{HOLD_S:g}s", "--wait", "3m", "--run-dir", str(run_dir)]
    command += ["--metrics", f"{served.url}/metrics"]
    reports: list[dict[str, Any]] = []
    for name in cycle(FAULTS):
        time.sleep(max(0.0, min(every_s, until_s - time.monotonic())))
        if time.monotonic() >= until_s:
            return reports
        done = subprocess.run([*command, name], capture_output=True, text=True, check=False)
        try:
            (report,) = json.loads(done.stdout)["faults"]
        except ValueError:
            report = {"fault": name, "recovered_s": None, "problem": done.stderr[-500:]}
        reports.append({key: report.get(key) for key in ("fault", "recovered_s", "problem")})
        say(f"{name}: {report.get('problem') or report['recovered_s']}")
    return reports


def only_engine(served: Served) -> EngineStatus:
    """What the control server says of the engine; waits for a server that was killed."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        with suppress(ControlError):
            engines = served.client.get_status(timeout_s=2.0).engines
            if engines:
                return engines[0]
        if time.monotonic() > deadline_s:
            raise RuntimeError("the control server does not know the engine")
        time.sleep(0.5)


def left_over(served: Served, run_dir: Path) -> dict[str, float]:
    """What is still held some time after the last program has ended; empty when nothing is."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        # An idle engine ends nothing: this makes it take steps.
        served.turn("last", 8, max_tokens=1, pin=False, stage=False, end=True)
        served.contexts.clear()
        time.sleep(1.0)
        engine = only_engine(served)
        left: dict[str, float] = {
            "pinned bytes": engine.gpu.pinned_bytes,
            "GPU bytes": engine.gpu.total_bytes - engine.gpu.free_bytes,
            "staging programs": engine.cpu.staging_programs,
            "loading requests": engine.cpu.loading_requests,
            "running requests": engine.queue.running_requests,
            "waiting requests": engine.queue.waiting_requests,
        }
        try:
            status = server_status(f"ipc://{run_dir}/{SERVER_NAME}.kvtier.sock")
            left |= {"locked chunks": status.locked_chunks, "reservations": status.reservations}
        except AssertionError:
            left["LMCache servers that do not answer"] = 1
        left = {name: n for name, n in left.items() if n}
        if not left or time.monotonic() > deadline_s:
            return left


def wrong_of(facts: dict[str, Any], *, judges_memory: bool) -> list[str]:
    """What is wrong, in words."""
    found = [f"left at the end: {facts['left']}"] if facts["left"] else []
    if facts["errors"]:
        found.append(f"{len(facts['errors'])} requests failed, the first: {facts['errors'][0]}")
    found += [
        f"{report['fault']} was not got over: {report['problem']}"
        for report in facts["faults"]
        if report["recovered_s"] is None
    ]
    for role, figures in facts["memory"].items() if judges_memory else ():
        high = figures.get("high_per_hour", 0.0)
        if figures["minutes"] >= JUDGED_MINUTES and high > MOST_MIB_PER_HOUR:
            found.append(f"{role} may grow by {high:.1f} MiB an hour")
    return found


def show(console: Console, facts: dict[str, Any]) -> None:
    """Print tables."""
    table = Table(title="Private memory, MiB; slopes but for the first third of the longest life")
    for column in ("process", "lives", "longest", "first", "settled", "last", "MiB an hour"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for role, one in facts["memory"].items():
        slope = "-"
        if "mib_per_hour" in one:
            slope = f"{one['mib_per_hour']:+.2f} [{one['low_per_hour']:+.2f}, {one['high_per_hour']:+.2f}]"
        mib = (f"{one[name]:.1f}" for name in ("first_mib", "settled_mib", "last_mib"))
        table.add_row(role, str(one["lives"]), f"{one['minutes']:.1f} min", *mib, slope)
    console.print(table)
    console.print(
        f"{facts['turns']} turns of {facts['programs']} programs in {facts['minutes']:.1f} minutes, "
        f"{len(facts['faults'])} faults; turns a minute, by tenths: {facts['turns_a_minute']}"
    )
    for text in facts["wrong"]:
        console.print(text, markup=False)
    if not facts["wrong"]:
        console.print("nothing is left, and nothing failed")


def work(
    served: Served,
    run_dir: Path,
    control_metrics: str,
    *,
    minutes: float,
    n_agents: int,
    fault_every_s: float | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Let agents work for so long; what was seen."""
    engine = only_engine(served)
    agents = Agents(served, n_agents, seed=1)
    tenths: list[int] = []
    stop = threading.Event()

    def count() -> None:
        while not stop.wait(minutes * 6):
            tenths.append(agents.turns)
            say(f"{agents.turns} turns, {len(agents.errors)} failed")

    counter = threading.Thread(target=count, name="tenths")
    with Memory(run_dir, engine.pid, control_metrics) as samples:
        began_s = time.monotonic()
        agents.start()
        counter.start()
        try:
            if fault_every_s is not None:
                faults = break_things(served, run_dir, minutes * FAULTS_SHARE, fault_every_s, say)
            else:
                faults = []
            time.sleep(max(0.0, began_s + minutes * 60 - time.monotonic()))
        finally:
            stop.set()
            agents.stop()
            counter.join()
        lasted_s = time.monotonic() - began_s
    return {
        "minutes": lasted_s / 60,
        "agents": n_agents,
        "turns": agents.turns,
        "programs": agents.programs,
        "turns_a_minute": [
            round((b - a) / (minutes / 10)) for a, b in zip([0, *tenths], tenths, strict=False)
        ],
        "errors": agents.errors,
        "faults": faults,
        "left": left_over(served, run_dir),
        "samples": samples,
        "memory": {role: growth(taken) for role, taken in samples.items()},
    }


def main(
    *,
    minutes: Annotated[float, typer.Option(min=1, help="How long.", metavar="N")] = 60.0,
    agents: Annotated[int, typer.Option(min=1, help="Programs at a time.", metavar="N")] = 6,
    faults: Annotated[bool, typer.Option(help="Break things meanwhile.")] = True,
    fault_every: Annotated[
        float, typer.Option(min=1, help="Seconds between two faults.", metavar="S")
    ] = 60.0,
    mode: Annotated[str, typer.Option(help="kvtier's: on or off.")] = "on",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.", **_FILE)
    ] = None,
) -> None:
    """See the module's docstring."""
    console, progress = Console(width=None if sys.stdout.isatty() else 140), Console(stderr=True)

    def say(text: str) -> None:
        progress.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)

    with tempfile.TemporaryDirectory(prefix="kvtier-soak-") as folder:
        places = {name: Path(folder) / name for name in ("model", "run", "work")}
        for place in places.values():
            place.mkdir(mode=0o700)
        write_model(places["model"])
        say("starting kvtier serve")
        (port,) = free_ports(1)
        listen = f"127.0.0.1:{port}"
        settings = SETTINGS | {"kvtier.mode": mode, "kvtier.control_metrics_listen": listen}
        with serving(
            places["model"], places["run"], places["work"], settings=settings, n_blocks=N_BLOCKS
        ) as served:
            facts = work(
                served,
                places["run"],
                f"http://{listen}/metrics",
                minutes=minutes,
                n_agents=agents,
                fault_every_s=fault_every if faults else None,
                say=say,
            )
            facts["mode"] = mode
            facts["seen"] = {
                source: served.metric("prompt_tokens_total", source=source)
                for source in ("gpu_pin", "gpu_cache", "cpu", "recomputed")
            }
    facts["wrong"] = wrong_of(facts, judges_memory=minutes >= JUDGED_MINUTES)
    show(console, facts)
    if json_file is not None:
        samples = {
            role: [asdict(sample) for sample in taken]
            for role, taken in facts.pop("samples").items()
        }
        text = json.dumps({**facts, "samples": samples}, indent=1)
        json_file.write_text(text + "\n", encoding="utf-8")
    raise typer.Exit(int(bool(facts["wrong"])))


if __name__ == "__main__":
    typer.run(main)
