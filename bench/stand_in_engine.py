"""A process that is an engine to a control server: reports turns at a steady pace and answers commands.

    python bench/stand_in_engine.py < SPEC

For `bench/control_load.py`, whose clients call another control server with it: then nothing of what they cost is
the real engine's. It is told its task, its beginning and its end as `control_clients.py` is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import zmq

from kvtier import link_messages as link
from kvtier.control.files import ControlFiles
from kvtier.server import processes

REPORT_INTERVAL_S: Final = 0.1
_ENGINE: Final = "stand-in"


class StandIn:
    """The engine. `events_per_s` is what it reports besides its answers."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """Register with the server of the run directory."""
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.connect(f"ipc://{ControlFiles(Path(spec['run_dir'])).link_socket_path}")
        self._keys = [link.ProgramKey(None, name) for name in spec["programs"]]
        self._last = link.ProgramKey(None, spec["last"])
        self._events_a_report = round(spec["events_per_s"] * REPORT_INTERVAL_S)
        self._count = 0
        self._send(hello(_ENGINE))
        self._socket.recv()
        self._report([self._event(key) for key in self._keys])

    def run(self) -> None:
        """Report and answer until standard input says so; then tell of the last program."""
        sys.stdin.readline()
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(sys.stdin.fileno(), zmq.POLLIN)
        due_s = time.monotonic()
        while True:
            ready = dict(poller.poll(max(0.0, due_s - time.monotonic()) * 1000))
            if self._socket in ready:
                self._answer(link.engine_decoder.decode(self._socket.recv()))
            if sys.stdin.fileno() in ready:
                break
            if time.monotonic() >= due_s:
                due_s += REPORT_INTERVAL_S
                keys = [self._keys[(self._count + i) % len(self._keys)] for i in range(8)]
                events = [self._event(keys[i % 8]) for i in range(self._events_a_report)]
                self._report(events)
        self._report([self._event(self._last)])
        self._send(link.EngineBye(engine_id=_ENGINE))
        self._socket.close(linger=5000)

    def _event(self, key: link.ProgramKey) -> link.Event:
        self._count += 1
        return link.TurnStarted(
            at_s=time.time(), program=key, request_id="r", turn=self._count, prompt_tokens=500
        )

    def _answer(self, message: link.ToEngine) -> None:
        if not isinstance(message, link.Resync):
            answer = link.Answer(
                id=message.id, engine_id=_ENGINE, outcome="accepted", reason="done"
            )
            self._send(link.Answered(engine_id=_ENGINE, answers=[answer]))

    def _report(self, events: list[link.Event]) -> None:
        self._send(report(_ENGINE, events, len(self._keys)))

    def _send(self, message: link.ToServer) -> None:
        self._socket.send(link.encoder.encode(message))


def report(engine_id: str, events: list[link.Event], n_programs: int) -> link.Report:
    """What a stand-in tells: these events, and figures that say little."""
    gauges = link.Gauges(
        mode="on",
        free_blocks=1,
        pinned_blocks=0,
        budget_blocks=1,
        programs=n_programs,
        running_requests=1,
        waiting_requests=0,
        waiting_tokens=0,
        queue_delay_s=0.0,
        tier_state="ready",
        tier_bytes=1,
        staging_programs=0,
        loading_requests=0,
        to_cpu_bytes_per_s=1.0,
        to_gpu_bytes_per_s=1.0,
    )
    return link.Report(engine_id=engine_id, sent_s=time.time(), events=events, gauges=gauges)


def hello(engine_id: str) -> link.EngineHello:
    """Who a stand-in is: this process."""
    policy = link.PolicyState(
        mode="on",
        pin_budget_fraction=0.5,
        max_ttl_s=600.0,
        admission="off",
        aging_s=600.0,
        max_defer_s=3600.0,
        stage=True,
    )
    return link.EngineHello(
        link=link.LINK_VERSION,
        engine_id=engine_id,
        pid=os.getpid(),
        pid_start_s=processes.start_s(os.getpid()),
        parent_pid=os.getppid(),
        dp_rank=0,
        model="stand-in",
        started_s=time.time(),
        block_tokens=16,
        block_bytes=1,
        total_blocks=1,
        versions={},
        policy=policy,
    )


if __name__ == "__main__":
    stand_in = StandIn(json.loads(sys.stdin.readline()))
    print("ready", flush=True)
    stand_in.run()
    print("{}", flush=True)
