"""What `bench/control_load.py` measures on: the served engine, its control server, another one, and clients."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from bench.instructions import Instructions
from bench.steady_agents import Agents
from bench.step_clock import read_steps
from kvtier.control.files import ControlFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.steady_agents import Work
    from bench.step_clock import Step
    from tests.engine.served import Served

ROOT: Final = Path(__file__).parents[1]
ALONE, CALLED, BESIDE = "alone", "called", "beside"
START_S: Final = 60.0
POLL_S: Final = 0.02
SETTLE_S: Final = 0.5
"""Then the engine has told of its last turn: watchers that begin one after the other see the same events."""
STAND_IN_EVENTS_PER_S: Final = 60
"""About what the engine reports in a window."""


@dataclass(frozen=True)
class Traffic:
    """What the clients do; one call in `commands_every` is a command for the engine (0: none is)."""

    calls_per_s: float = 1000.0
    clients: int = 8
    watchers: int = 16
    stuck: int = 1
    commands_every: int = 20


class Child:
    """A process of the bench that waits for its beginning or its end to be told."""

    def __init__(self, spec: dict[str, Any], program: str, *arguments: str) -> None:
        """Start it; it is connected when this returns."""
        command = [sys.executable, str(ROOT / "bench" / program), *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.go(json.dumps(spec))
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{program}: not connected")

    def go(self, line: str = "") -> None:
        """Begin, or end."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """What it found; waits for its end."""
        text, _ = self._process.communicate(timeout=300)
        found: dict[str, Any] = json.loads(text)
        return found


@dataclass
class Window:
    """What one window brought; `calls` and `watchers` are what the clients found.

    Of the engine's `cpu_s` kvtier has used `hooks_cpu_s` in the scheduler's hooks; `messages_cpu_s` are the threads of
    ZeroMQ, of which one is kvtier's and the others vLLM's. `instructions` are the engine's; 0 where they are not counted.
    """

    arm: str
    cpu_s: float
    tokens: int
    steps: list[Step]
    seconds: float
    turn_s: list[float]
    control_cpu_s: float
    hooks_cpu_s: float
    messages_cpu_s: float
    instructions: int
    calls: dict[str, Any] = field(default_factory=dict)
    watchers: list[list[int]] = field(default_factory=list)
    clients_cpu_s: float = 0.0

    @property
    def cpu_per_token_us(self) -> float:
        """Of the engine's process."""
        return self.cpu_s / self.tokens * 1e6

    def problems(self) -> Iterator[str]:
        """What was lost without a word."""
        if not self.calls:
            return
        codes = self.calls["codes"]
        if sum(codes.values()) != self.calls["made"] or set(codes) != {"OK"}:
            yield f"{self.arm}: {self.calls['made']} calls, answers: {codes}"
        if not all(ended for *_, ended in self.watchers):
            yield f"{self.arm}: a watcher has not come to the end: {self.watchers}"
        if len({events + lost for _, events, lost, _ in self.watchers}) != 1:
            yield f"{self.arm}: events and losses differ between watchers: {self.watchers}"


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


class Stack:
    """See the module's docstring."""

    def __init__(self, served: Served, run_dir: Path, other_dir: Path, steps_file: Path) -> None:
        self._served = served
        self._other_dir = other_dir
        self._steps_file = steps_file
        self._count = 0
        record = ControlFiles(run_dir).read_record()
        assert record is not None
        self.control = psutil.Process(record.pid)

    @property
    def engine(self) -> psutil.Process:
        """The process of vLLM's engine; known after the first step."""
        return psutil.Process(next(iter(read_steps(self._steps_file))).pid)

    def window(self, arm: str, work: Work, traffic: Traffic) -> Window:
        """Let the agents work, and clients call where the arm has them."""
        self._count += 1
        agents = Agents(self._served.url, self._served.model, work, f"w{self._count}")
        # So that clients find every program.
        agents.first_turns()
        time.sleep(SETTLE_S)
        last = f"end-{self._count}"
        if arm == ALONE:
            return self._measured(arm, agents, work)
        if arm == CALLED:
            clients = Clients(self._served.socket, agents.names, traffic, last)
            window = self._measured(arm, agents, work, clients)
            clients.finish(window, lambda: self._served.turn(last, 32))
            return window
        with self._other_server(agents, last) as (target, stand_in):
            clients = Clients(target, agents.names, traffic, last)
            stand_in.go()
            window = self._measured(arm, agents, work, clients)
            clients.finish(window, stand_in.go)
            return window

    def _measured(
        self, arm: str, agents: Agents, work: Work, clients: Clients | None = None
    ) -> Window:
        engine = self.engine
        cpu_s, control_cpu_s = _cpu_s(engine), _cpu_s(self.control)
        messages_s = _messages_cpu_s(engine)
        counter = _instructions(engine)
        began_ns = time.monotonic_ns()
        if clients is not None:
            clients.go()
        agents.run()
        ended_ns = time.monotonic_ns()
        instructions = 0
        if counter is not None:
            with counter:
                instructions = counter.count()
        steps = [s for s in read_steps(self._steps_file) if began_ns < s.ended_ns <= ended_ns]
        messages_s = _messages_cpu_s(engine) - messages_s
        return Window(
            arm=arm,
            cpu_s=_cpu_s(engine) - cpu_s,
            tokens=work.output_tokens_a_window,
            steps=steps,
            seconds=(ended_ns - began_ns) / 1e9,
            turn_s=agents.turn_s,
            control_cpu_s=_cpu_s(self.control) - control_cpu_s,
            hooks_cpu_s=sum(step.hooks_ns for step in steps) / 1e9,
            messages_cpu_s=messages_s,
            instructions=instructions,
        )

    @contextmanager
    def _other_server(self, agents: Agents, last: str) -> Iterator[tuple[str, Child]]:
        """Another control server, with a stand-in for an engine; its target."""
        files = ControlFiles(self._other_dir)
        command = [sys.executable, "-m", "kvtier.control.sidecar", "--run-dir", str(files.run_dir)]
        state_file = str(files.run_dir / "overrides.json")
        env = {"KVTIER_CONTROL_LISTEN": "none", "KVTIER_CONTROL_STATE_FILE": state_file}
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | env, stderr=subprocess.DEVNULL
        )
        try:
            until_s = time.monotonic() + START_S
            while (record := files.read_record()) is None or record.phase != "serving":
                if time.monotonic() > until_s:
                    raise RuntimeError("the other control server does not start")
                time.sleep(POLL_S)
            spec = {
                "run_dir": str(files.run_dir),
                "programs": agents.names,
                "last": last,
                "events_per_s": STAND_IN_EVENTS_PER_S,
            }
            stand_in = Child(spec, "stand_in_engine.py")
            yield files.unix_target, stand_in
            stand_in.result()
        finally:
            process.terminate()
            process.wait()


class Clients:
    """Clients and watchers of one window."""

    def __init__(self, target: str, programs: list[str], traffic: Traffic, last: str) -> None:
        watching = {"target": target, "watchers": traffic.watchers, "stuck": traffic.stuck}
        self._watchers = Child(watching | {"last": last}, "control_clients.py", "watchers")
        calling = {
            "target": target,
            "clients": traffic.clients,
            "calls_per_s": traffic.calls_per_s,
            "programs": programs,
            "commands_every": traffic.commands_every,
        }
        self._calls = Child(calling, "control_clients.py", "calls")

    def go(self) -> None:
        """Begin to call; the watchers watch already."""
        self._calls.go()
        self._watchers.go()

    def finish(self, window: Window, say_last: Callable[[], object]) -> None:
        """Write what was found into the window; `say_last` brings the event that watchers wait for."""
        self._calls.go()
        window.calls = self._calls.result()
        say_last()
        self._watchers.go()
        watched = self._watchers.result()
        window.watchers = watched["watchers"]
        window.clients_cpu_s = window.calls["cpu_s"] + watched["cpu_s"]


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _instructions(process: psutil.Process) -> Instructions | None:
    try:
        return Instructions(process.pid)
    except OSError:
        return None


def _messages_cpu_s(process: psutil.Process) -> float:
    """Processor time of a process's ZeroMQ threads."""
    total_ns = 0
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        if (thread / "comm").read_text().startswith("ZMQbg"):
            total_ns += int((thread / "schedstat").read_text().split()[0])
    return total_ns / 1e9
