"""The control server's memory while it is told of far more decisions than it keeps.

    python bench/control_memory.py [--programs 150000] [--json FILE]

Its window of decisions (32 MiB, `kvtier_control_decision_history_bytes`) takes hours to fill behind a real engine. Here a
stand-in for one reports programs one after the other, six turns each, and waits after each of them until the server
has taken it in. The server's private memory is looked at as the window fills and long after: the allocator settles within
the first few fillings. Exit code 1: in the second half of the run memory rises by more than 0.5 %; 2: the window was not full
for all of that.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import torch
import typer
import zmq
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from bench.process_memory import anon_bytes
from bench.stand_in_engine import hello, report
from kvtier import link_messages as link
from kvtier.control.decision_history import MAX_BYTES
from kvtier.control.files import ControlFiles
from kvtier.linkbench.machine import machine

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[1]
TURNS: Final = 6
N_SAMPLES: Final = 24
ALMOST_FULL: Final = 0.98
MOST_GROWTH: Final = 0.005
START_S: Final = 60.0
_MIB: Final = 1 << 20
_ENGINE: Final = "stand-in"


@dataclass(frozen=True)
class Sample:
    """The server's memory after so many programs."""

    programs: int
    window_bytes: int
    anon_bytes: int


class Engine:
    """Tells of programs."""

    def __init__(self, run_dir: Path) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        # A server that is gone is an error, not a wait.
        self._socket.setsockopt(zmq.RCVTIMEO, round(START_S * 1000))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"ipc://{ControlFiles(run_dir).link_socket_path}")
        self._settle()

    def program(self, number: int) -> None:
        """A program begins, has its turns and ends; returns when the server has taken that in."""
        key = link.ProgramKey(None, f"agent-{number:06}")
        events = [event for turn in range(TURNS) for event in _turn(key, turn)]
        events.append(link.ProgramGone(at_s=time.time(), program=key))
        self._send(report(_ENGINE, events, 1))
        self._settle()

    def close(self) -> None:
        """Say goodbye."""
        self._send(link.EngineBye(engine_id=_ENGINE))
        self._socket.close(linger=5000)
        self._context.term()

    def _settle(self) -> None:
        """Every hello has its answer, after all that was sent before it."""
        self._send(hello(_ENGINE))
        while not isinstance(
            command := link.engine_decoder.decode(self._socket.recv()), link.OverridesCommand
        ):
            pass
        answer = link.Answer(id=command.id, engine_id=_ENGINE, outcome="accepted", reason="done")
        self._send(link.Answered(engine_id=_ENGINE, answers=[answer]))

    def _send(self, message: link.ToServer) -> None:
        self._socket.send(link.encoder.encode(message))


def _turn(key: link.ProgramKey, turn: int) -> list[link.Event]:
    """What an engine tells of a turn that returned to a pin, and of the pause behind it."""
    at_s, request_id, tokens = time.time(), f"chatcmpl-{key.name}-{turn}", 1000 * (turn + 1)
    head: dict[str, Any] = {"at_s": at_s, "program": key, "request_id": request_id}
    costs = [link.OptionCost(name, 0.125) for name in ("drop", "pin", "offload", "pin_and_stage")]
    inputs = {
        "context_tokens": tokens,
        "tool": "bash",
        "keep_tokens": tokens,
        "stage_tokens": tokens,
        "stage_reason": "staged_at_pause",
        "miss_staged_s": 0.25,
        "miss_unstaged_s": 0.5,
        "price_s_per_s": 0.001,
    }
    told = {"source": "gpu", "gpu_tokens": tokens, "tier_tokens": 0, "prompt_tokens": tokens}
    return [
        link.TurnStarted(**head, turn=turn + 1, prompt_tokens=tokens, gap_s=2.0),
        link.Decided(**head, event="return", action="gpu", reason="gpu_hit", inputs=told),
        link.TurnRunning(**head, gpu_tokens=tokens - 100, cpu_tokens=0, recomputed_tokens=100),
        link.PinEnded(**head, cause="handoff", tokens=tokens),
        link.TurnEnded(**head, context_tokens=tokens, output_tokens=20, tool="bash"),
        link.Decided(
            **head,
            event="pause",
            action="pin",
            reason="optimal_ttl",
            ttl_s=4.0,
            costs=costs,
            inputs=inputs,
        ),
        link.Pinned(**head, tokens=tokens, deadline_s=at_s + 4.0),
    ]


class Server:
    """A control server of the bench's own."""

    def __init__(self, process: subprocess.Popen[bytes], metrics: str) -> None:
        self._process = process
        self._metrics = metrics

    def sample(self, programs: int) -> Sample:
        """Its memory now."""
        text = httpx.get(self._metrics).raise_for_status().text
        (window,) = (
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "kvtier_control_decision_history_bytes"
        )
        return Sample(programs, int(window), anon_bytes(self._process.pid))


@contextmanager
def control_server(run_dir: Path) -> Iterator[Server]:
    """Start one; it ends with the context."""
    files = ControlFiles(run_dir)
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    env = {
        "KVTIER_CONTROL_LISTEN": "none",
        "KVTIER_CONTROL_METRICS_LISTEN": listen,
        "KVTIER_CONTROL_STATE_FILE": str(run_dir / "overrides.json"),
    }
    command = [sys.executable, "-m", "kvtier.control.sidecar", "--run-dir", str(run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stderr=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + START_S
        while (record := files.read_record()) is None or record.phase != "serving":
            if time.monotonic() > until_s or process.poll() is not None:
                raise RuntimeError("the control server does not start")
            time.sleep(0.02)
        yield Server(process, f"http://{listen}/metrics")
    finally:
        process.terminate()
        process.wait()


def settled(samples: list[Sample]) -> list[Sample]:
    """Those of the second half; none if the window has not been full for all of it."""
    half = samples[len(samples) // 2 :]
    return half if half[0].window_bytes > ALMOST_FULL * MAX_BYTES else []


def main(
    *,
    programs: Annotated[int, typer.Option(min=N_SAMPLES, metavar="N")] = 150_000,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results here.")
    ] = None,
) -> None:
    """Tell a control server of programs, and see whether its memory ends to grow when its window is full."""
    console, progress = Console(), Console(stderr=True)
    every = programs // N_SAMPLES
    with tempfile.TemporaryDirectory(prefix="kvtier-memory-") as folder:
        run_dir = Path(folder)
        with control_server(run_dir) as server:
            engine = Engine(run_dir)
            samples = [server.sample(0)]
            for number in itertools.count(1):
                engine.program(number)
                if number % every == 0:
                    samples.append(server.sample(number))
                    progress.print(f"{number} of {programs} programs")
                if number == programs:
                    break
            engine.close()
    table = Table("programs told of", "window, MiB", "server, MiB", box=None)
    for sample in samples:
        table.add_row(
            str(sample.programs),
            f"{sample.window_bytes / _MIB:.1f}",
            f"{sample.anon_bytes / _MIB:.1f}",
        )
    console.print(table)
    judged = settled(samples)
    if not judged:
        console.print("the window was not full for long enough: more --programs")
        raise typer.Exit(2)
    growth = max(sample.anon_bytes for sample in judged) / judged[0].anon_bytes - 1
    console.print(
        f"growth from {judged[0].programs} to {judged[-1].programs} programs: {growth:+.2%}"
    )
    if json_file is not None:
        config = machine(torch.device("cpu"), ["python", "bench/control_memory.py"])
        config |= {"programs": programs, "turns": TURNS}
        result = {"config": config, "samples": [asdict(s) for s in samples], "growth": growth}
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    raise typer.Exit(int(growth > MOST_GROWTH))


if __name__ == "__main__":
    typer.run(main)
