"""Clients of the control server for `bench/control_load.py`, in processes of their own and cheap.

    python bench/control_clients.py calls | watchers < SPEC

They share two cores with what is measured, so they spend as little as gRPC's Python client allows: requests
are encoded once, answers are counted and not decoded. A process reads its task as JSON from standard input, says
`ready` when it is connected, begins at the next line, ends at the one after, and prints what it found as JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpc
from google.protobuf import duration_pb2
from grpc.experimental import ChannelOptions

from kvtier.v1 import observability_pb2, program_pb2

CONNECT_S: Final = 30.0
CALL_S: Final = 10.0
END_S: Final = 60.0
"""Most time for watchers to see the end."""
_PROGRAMS, _OBSERVABILITY = "/kvtier.v1.ProgramService/", "/kvtier.v1.ObservabilityService/"

# What dashboards and agents ask; commands for the engine come in between (`--commands-every` of the bench).
READS: Final = (
    *(["get"] * 9),
    *(["status"] * 4),
    *(["explain"] * 3),
    *(["list"] * 3),
)


def request_of(kind: str, program: str) -> tuple[str, bytes]:
    """Return a call's method and its encoded request."""
    match kind:
        case "get":
            message: Any = program_pb2.GetProgramRequest(name=program)
            return f"{_PROGRAMS}GetProgram", message.SerializeToString()
        case "status":
            return f"{_OBSERVABILITY}GetStatus", b""
        case "explain":
            message = observability_pb2.ExplainDecisionRequest(name=program)
            return f"{_OBSERVABILITY}ExplainDecision", message.SerializeToString()
        case "list":
            message = program_pb2.ListProgramsRequest(page_size=10)
            return f"{_PROGRAMS}ListPrograms", message.SerializeToString()
        case "tool_call":
            expected = duration_pb2.Duration(seconds=1)
            message = program_pb2.AnnounceToolCallRequest(
                name=program, tool="bash", duration=expected
            )
            return f"{_PROGRAMS}AnnounceToolCall", message.SerializeToString()
        case "pin":
            ttl = duration_pb2.Duration(seconds=60)
            message = program_pb2.PinProgramRequest(name=program, ttl=ttl)
            return f"{_PROGRAMS}PinProgram", message.SerializeToString()
        case _:
            raise ValueError(kind)


def channel_to(target: str) -> grpc.Channel:
    """Return a connected channel of its own."""
    channel = grpc.insecure_channel(
        target,
        [("grpc.use_local_subchannel_pool", 1), (ChannelOptions.SingleThreadedUnaryStream, 1)],
    )
    grpc.channel_ready_future(channel).result(CONNECT_S)
    return channel


class Caller(threading.Thread):
    """One client: a call at a time, at its times; one that is late is made at once, none is left out."""

    def __init__(self, spec: dict[str, Any], index: int) -> None:
        """Connect."""
        super().__init__()
        self._index, self._clients = index, spec["clients"]
        self._interval_s = self._clients / spec["calls_per_s"]
        self._programs: list[str] = spec["programs"]
        self._commands_every: int = spec["commands_every"]
        self._channel = channel_to(spec["target"])
        self._methods: dict[str, Any] = {}
        self.codes: Counter[str] = Counter()
        self.took_s: list[float] = []
        self.made = 0
        self.began_s = 0.0
        self.stop = False

    def run(self) -> None:
        """Make the calls."""
        due_s = self.began_s + self._index * self._interval_s / self._clients
        for number in itertools.count():
            if self.stop:
                break
            if (left_s := due_s - time.monotonic()) > 0:
                time.sleep(left_s)
            self._call(number)
            due_s += self._interval_s
        self._channel.close()

    def _call(self, number: int) -> None:
        position = self._index + number * self._clients
        kind = READS[number % len(READS)]
        if self._commands_every and position % self._commands_every == 0:
            kind = ("tool_call", "pin")[position // self._commands_every % 2]
        # The clients walk through the programs, and no two of them in step.
        method, request = request_of(kind, self._programs[position % len(self._programs)])
        if method not in self._methods:
            self._methods[method] = self._channel.unary_unary(method)
        self.made += 1
        begun_s = time.monotonic()
        try:
            self._methods[method](request, timeout=CALL_S)
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name  # type: ignore[attr-defined]
        self.took_s.append(time.monotonic() - begun_s)
        self.codes[code] += 1


def make_calls(spec: dict[str, Any]) -> dict[str, Any]:
    """Call as the task says; what was called and what came back."""
    callers = [Caller(spec, index) for index in range(spec["clients"])]
    _ready()
    began_s = time.monotonic()
    for caller in callers:
        caller.began_s = began_s
        caller.start()
    sys.stdin.readline()
    for caller in callers:
        caller.stop = True
    for caller in callers:
        caller.join()
    codes: Counter[str] = sum((caller.codes for caller in callers), Counter())
    return {
        "made": sum(caller.made for caller in callers),
        "seconds": time.monotonic() - began_s,
        "codes": codes,
        "took_s": sorted(t for caller in callers for t in caller.took_s),
        "cpu_s": time.process_time(),
    }


class Watcher(threading.Thread):
    """One stream: counts events and what it is told to have lost, up to an event about `last`."""

    def __init__(self, spec: dict[str, Any], *, stuck: bool) -> None:
        """Begin to watch; returns when the server has said that nothing is missed from here on."""
        super().__init__(daemon=True)
        self.stuck = stuck
        self._last = spec["last"].encode()
        self._channel = channel_to(spec["target"])
        self._stream: Any = self._channel.unary_stream(f"{_OBSERVABILITY}WatchEvents")(b"")
        self._stream.initial_metadata()
        self.events = self.lost = 0
        self.ended = False

    def run(self) -> None:
        """Read."""
        for message in self._stream:
            if message[0] == _EVENT_TAG:
                self.events += 1
                if self._last in message:
                    self.ended = True
                    break
            else:
                self.lost += observability_pb2.WatchEventsResponse.FromString(message).lost
        self._stream.cancel()
        self._channel.close()


_EVENT_TAG: Final = 1 << 3 | 2
"""A message's first byte where it holds an event: field 1, with a length."""


def watch(spec: dict[str, Any]) -> dict[str, Any]:
    """Watch until told to end, then up to the last event; the stuck ones begin to read only then."""
    watchers = [Watcher(spec, stuck=i < spec["stuck"]) for i in range(spec["watchers"])]
    for watcher in watchers:
        if not watcher.stuck:
            watcher.start()
    _ready()
    sys.stdin.readline()
    cpu_s = time.process_time()
    for watcher in watchers:
        if watcher.stuck:
            watcher.start()
    until_s = time.monotonic() + END_S
    for watcher in watchers:
        watcher.join(max(0.0, until_s - time.monotonic()))
    found = [[int(w.stuck), w.events, w.lost, int(w.ended)] for w in watchers]
    return {"watchers": found, "cpu_s": cpu_s}


def _ready() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    task = json.loads(sys.stdin.readline())
    print(json.dumps({"calls": make_calls, "watchers": watch}[sys.argv[1]](task)), flush=True)
