"""What a busy control API costs the engine: 1,000 calls a second and 16 watchers, one of them stuck.

    python bench/control_load.py [--pairs 6] [--rate 1000] [--turns 12] [--soak-turns 72] [--json FILE]

Serves a tiny random model with `kvtier serve` and lets agents work through the same turns in every window.
Windows take turns, so that drift of the machine cancels:

  alone   nobody calls
  called  8 clients make 1,000 calls a second, 16 watchers follow, one of which never reads
  beside  the same clients and watchers, with another control server and a stand-in for an engine: what is
          lost here is lost to the shared processors, not to kvtier

Of the calls one in 20 is a command for the engine, so 50 a second, five times what the agents here would announce (two
for each of their some 4 turns a second). The others are what dashboards and agents ask.

The clients run on the same machine, so the engine's process is measured and not the clock: its processor time per
output token, and per step (from vLLM's own scheduler, see bench/step_clock.py). Steps by the clock are shown too.

A processor that is shared makes the same instructions slower (caches, the sibling of a hyperthread), whoever the
others are, by more than the limits here, and windows alike differ by tens of percent. So the limits are on the number of
instructions that the engine's process retires, where the machine counts them (bench/instructions.py): `called` against
`alone`, per token +2 %, p99 of a step +5 %. Where it does not, processor time stands in, and what is lost to the shared
processors counts too: see how `beside` compares. In the soak at the end the control server's memory may grow by 2 MiB
after the first third. In all windows every call must be answered, and every watcher must have had the same number of
events, those counted that it was told to have lost. The exit code is 1 where one does not hold, or where less than nine
tenths of the calls were made.

For information it is also said what kvtier itself uses of the engine's processor time, in the scheduler's hooks and in
threads for messages.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.control_stack import (
    ALONE,
    BESIDE,
    CALLED,
    ROOT,
    Stack,
    Traffic,
    Window,
    percentile,
)
from bench.control_verdict import beyond
from bench.steady_agents import Work
from bench.step_clock import FILE_VARIABLE
from kvtier.linkbench.machine import machine
from tests.engine.served import serving
from tests.engine.tiny_model import write_model

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_GROWTH_MIB: Final = 2.0
N_BLOCKS: Final = 600
"""Enough for all agents of a window: nobody has to make room, whose cost would vary."""
COMPARED: Final = (
    *("instructions_per_token", "cpu_us_per_token"),
    *("step_p50_instructions", "step_cpu_p50_us"),
    *("step_p99_instructions", "step_cpu_p99_us", "step_wall_p99_us"),
)
_MIB: Final = 1 << 20
_LONG: Final = 10
_FLAGS: Final = (
    *("--scheduler-cls", "bench.step_clock.TimedScheduler"),
    *("--scheduling-policy", "priority"),
    # vLLM's own executor for CPUs has a worker process, for which the engine's process spins: the busier the
    # machine, the less. In one process all of its processor time is work.
    *("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"),
)
_FILE: Final[dict[str, Any]] = {"metavar": "FILE", "dir_okay": False}


class Results:
    """Windows by arm, and what is to be said of them."""

    def __init__(self, windows: list[Window]) -> None:
        self.windows = windows
        self.arms = [a for a in (ALONE, CALLED, BESIDE) if any(w.arm == a for w in windows)]

    def of(self, arm: str) -> list[Window]:
        """Windows of an arm."""
        return [window for window in self.windows if window.arm == arm]

    def row(self, arm: str) -> dict[str, Any]:
        """The figures of an arm over all its windows."""
        windows = self.of(arm)
        cpu_us = [step.cpu_ns / 1e3 for w in windows for step in w.steps]
        wall_us = [step.wall_ns / 1e3 for w in windows for step in w.steps]
        counted = [float(step.instructions) for w in windows for step in w.steps]
        seconds = sum(w.seconds for w in windows)
        row: dict[str, Any] = {
            "arm": arm,
            "windows": len(windows),
            "engine_cores": sum(w.cpu_s for w in windows) / seconds,
            "cpu_us_per_token": _us_per_token(windows, "cpu_s"),
            "hooks_us_per_token": _us_per_token(windows, "hooks_cpu_s"),
            "messages_us_per_token": _us_per_token(windows, "messages_cpu_s"),
            "instructions_per_token": sum(w.instructions for w in windows)
            / sum(w.tokens for w in windows),
            "steps": len(cpu_us),
            "hooks_p99_us": percentile([s.hooks_ns / 1e3 for w in windows for s in w.steps], 99),
            "control_cores": sum(w.control_cpu_s for w in windows) / seconds,
            "clients_cores": sum(w.clients_cpu_s for w in windows) / seconds,
            "turn_p50_ms": percentile([t for w in windows for t in w.turn_s], 50) * 1e3,
        }
        for percent in (50, 99):
            row[f"step_cpu_p{percent}_us"] = percentile(cpu_us, percent)
            row[f"step_wall_p{percent}_us"] = percentile(wall_us, percent)
            row[f"step_p{percent}_instructions"] = percentile(counted, percent)
        if windows[0].calls:
            took_s = sorted(t for w in windows for t in w.calls["took_s"])
            made = sum(w.calls["made"] for w in windows)
            row["calls_per_s"] = made / sum(w.calls["seconds"] for w in windows)
            row["call_p50_ms"] = percentile(took_s, 50) * 1e3
            row["call_p99_ms"] = percentile(took_s, 99) * 1e3
            row["events"] = sum(w.watchers[0][1] + w.watchers[0][2] for w in windows)
        return row

    def ratios(self, arm: str) -> list[float]:
        """Processor time per token over that of the windows without calls around it, one by one."""
        alone = self.of(ALONE)
        pairs = zip(self.of(arm), alone, alone[1:], strict=False)
        return [
            window.cpu_per_token_us / ((before.cpu_per_token_us + after.cpu_per_token_us) / 2)
            for window, before, after in pairs
        ]

    def broken(self, rate: float) -> list[str]:
        """Limits that do not hold at this rate of calls."""
        found = [problem for window in self.windows for problem in window.problems()]
        return found + beyond(self.row(CALLED), self.row(ALONE), rate)


def own_rise(called: dict[str, Any], base: dict[str, Any]) -> float:
    """By how much kvtier's own processor time per token has risen, of all that the engine uses per token."""
    own = "hooks_us_per_token", "messages_us_per_token"
    risen_us: float = sum(called[name] - base[name] for name in own)
    return risen_us / float(base["cpu_us_per_token"])


def p99_rise(called: dict[str, Any], base: dict[str, Any]) -> float:
    """By how much the p99 of kvtier's time in a step has risen, as a share of the p99 of a whole step."""
    risen_us: float = called["hooks_p99_us"] - base["hooks_p99_us"]
    return risen_us / float(base["step_cpu_p99_us"])


def _us_per_token(windows: list[Window], name: str) -> float:
    seconds: float = sum(getattr(window, name) for window in windows)
    return seconds / sum(window.tokens for window in windows) * 1e6


class Sampler:
    """Calls something about once a second, in a thread, while the context lasts."""

    def __init__(self, sample: Callable[[], None]) -> None:
        self._sample = sample
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self._sample()

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._stop.set()
        self._thread.join()


def main(
    *,
    pairs: Annotated[int, typer.Option(min=1, help="Windows of each kind.", metavar="N")] = 6,
    rate: Annotated[float, typer.Option(min=1, help="Calls a second.", metavar="N")] = 1000.0,
    commands_every: Annotated[
        int,
        typer.Option(
            min=0, help="One call in N is a command for the engine; 0: none.", metavar="N"
        ),
    ] = 20,
    turns: Annotated[
        int, typer.Option(min=1, help="Turns of each of 8 agents in a window.", metavar="N")
    ] = 12,
    soak_turns: Annotated[
        int, typer.Option(min=0, help="The same in the soak at the end; 0: none.", metavar="N")
    ] = 72,
    beside: Annotated[
        bool, typer.Option(help="Also measure with the clients at another control server.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.", **_FILE)
    ] = None,
) -> None:
    """Measure what calls and watchers of the control API cost the engine.

    A tiny model is served; the same agents' turns are done without calls, with them, and with the same calls to
    another control server. Exit code 1: a limit does not hold (of the engine's process +2 % per token and +5 % in the p99
    of a step over no calls, +2 MiB of memory, every call answered, every event told or told to be lost).
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    progress = Console(stderr=True)
    traffic = Traffic(calls_per_s=rate, commands_every=commands_every)
    work = Work(turns=1 + turns)
    arms = [ALONE, CALLED, *([BESIDE] if beside else [])]
    with tempfile.TemporaryDirectory(prefix="kvtier-load-") as folder:
        places = {name: Path(folder) / name for name in ("model", "run", "other", "work")}
        for place in places.values():
            place.mkdir(mode=0o700)
        steps_file = places["work"] / "steps"
        progress.print("making the model")
        write_model(places["model"])
        progress.print("starting kvtier serve")
        with serving(
            places["model"],
            places["run"],
            places["work"],
            flags=_FLAGS,
            env={FILE_VARIABLE: str(steps_file), "PYTHONPATH": str(ROOT)},
            n_blocks=N_BLOCKS,
        ) as served:
            stack = Stack(served, places["run"], places["other"], steps_file)
            stack.window(ALONE, Work(turns=4), traffic)  # warms up
            plan = [*arms * pairs, ALONE]
            windows = []
            for index, arm in enumerate(plan):
                window = stack.window(arm, work, traffic)
                windows.append(window)
                progress.print(
                    f"window {index + 1} of {len(plan)}, {arm}: {window.cpu_per_token_us:.0f} us a token"
                )
            results = Results(windows)
            broken = results.broken(rate)
            soak = None
            if soak_turns:
                progress.print(f"soak of {soak_turns} turns")
                soak = soaked(stack, Work(turns=1 + soak_turns), traffic)
                broken += soak.pop("broken")
    rows = [results.row(arm) for arm in results.arms]
    show(console, results, rows, soak)
    for text in broken:
        console.print(text, markup=False)
    verdict = "the limits do not hold" if broken else "the limits hold"
    made = results.row(CALLED)["calls_per_s"]
    memory = "" if soak else ", memory not looked at"
    console.print(f"{verdict} at {made:.0f} of {rate:.0f} calls a second{memory}")
    if json_file is not None:
        options = {"pairs": pairs, **asdict(traffic), **asdict(work)}
        config = machine(torch.device("cpu"), ["python", "bench/control_load.py"]) | options
        report = {
            "config": config,
            "results": rows,
            "cpu_ratios": {a: results.ratios(a) for a in results.arms if a != ALONE},
            "soak": soak,
            "broken": broken,
        }
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    raise typer.Exit(int(bool(broken)))


def soaked(stack: Stack, work: Work, traffic: Traffic) -> dict[str, Any]:
    """Call for a long while; figures, and what is `broken`."""
    mib: list[float] = []
    with Sampler(lambda: mib.append(stack.control.memory_info().rss / _MIB)):
        window = stack.window(CALLED, work, traffic)
    settled, last = mib[len(mib) // 3], mib[-1]
    broken = list(window.problems())
    if last - settled > MOST_GROWTH_MIB:
        broken.append(f"the control server has grown by {last - settled:.1f} MiB in the soak")
    stuck = [found for found in window.watchers if found[0]]
    return {
        "seconds": window.seconds,
        "calls": window.calls["made"],
        "memory_mib": [mib[0], settled, last],
        "events": window.watchers[-1][1] + window.watchers[-1][2],
        "lost_by_readers": sum(lost for is_stuck, _, lost, _ in window.watchers if not is_stuck),
        "lost_by_stuck": sum(lost for _, _, lost, _ in stuck),
        "broken": broken,
    }


def show(
    console: Console, results: Results, rows: list[dict[str, Any]], soak: dict[str, Any] | None
) -> None:
    """Print tables."""
    table = Table("", *results.arms, box=None)
    for name in rows[-1] | rows[1]:
        if name != "arm":
            table.add_row(name, *(_figure(row.get(name)) for row in rows))
    for base in (rows[0], rows[-1]):
        for name in COMPARED:
            if not base[name]:
                continue
            ratios = [f"{row[name] / base[name]:.4f}" for row in rows]
            table.add_row(f"{name}, of {base['arm']}", *ratios)
        rises = [f"{own_rise(row, base):+.2%}" for row in rows]
        table.add_row(f"for information: kvtier's own rise over {base['arm']}", *rises)
        rises = [f"{p99_rise(row, base):+.2%}" for row in rows]
        table.add_row(f"for information: kvtier's p99 in a step over {base['arm']}", *rises)
    console.print(table)
    for arm in results.arms[1:]:
        ratios = " ".join(f"{ratio:.3f}" for ratio in sorted(results.ratios(arm)))
        console.print(f"{arm}: time per token over the windows around: {ratios}")
    if soak is not None:
        console.print("soak: " + ", ".join(f"{name} {value}" for name, value in soak.items()))


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.{0 if value >= _LONG else 3}f}"


if __name__ == "__main__":
    typer.run(main)
