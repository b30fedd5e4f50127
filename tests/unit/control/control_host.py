"""A control server in a thread of the test, and engines that do what the test says."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
import zmq
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kvtier import link_messages as link
from kvtier.config import Settings
from kvtier.control.control_server import ControlServer
from kvtier.control.files import ControlFiles
from kvtier.server import processes
from kvtier.v1 import (
    observability_pb2_grpc,
    policy_pb2_grpc,
    program_pb2_grpc,
    ttl_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

T = TypeVar("T")
DEADLINE_S = 20.0
BLOCK_BYTES = 1 << 20

POLICY = link.PolicyState(
    mode="on",
    pin_budget_fraction=0.5,
    max_ttl_s=600.0,
    admission="working_set",
    aging_s=600.0,
    max_defer_s=3600.0,
    stage=True,
)
GAUGES = link.Gauges(
    mode="on",
    free_blocks=60,
    pinned_blocks=10,
    budget_blocks=50,
    programs=1,
    running_requests=0,
    waiting_requests=0,
    waiting_tokens=0,
    queue_delay_s=0.25,
    tier_state="ready",
    tier_bytes=1 << 30,
    staging_programs=0,
    loading_requests=0,
    to_cpu_bytes_per_s=1e9,
    to_gpu_bytes_per_s=2e9,
    calibrated_s=1_700_000_000.0,
)


def program(
    name: str = "agent", tenant: str | None = None, *, named: bool = True
) -> link.ProgramKey:
    return link.ProgramKey(tenant, name, named)


def hello(engine_id: str = "engine-0", **changes: Any) -> link.EngineHello:
    pid = changes.pop("pid", os.getpid())
    fields: dict[str, Any] = {
        "link": link.LINK_VERSION,
        "engine_id": engine_id,
        "pid": pid,
        "pid_start_s": processes.start_s(pid),
        "parent_pid": os.getppid(),
        "dp_rank": 0,
        "model": "small",
        "started_s": 1_700_000_000.0,
        "block_tokens": 16,
        "block_bytes": BLOCK_BYTES,
        "total_blocks": 100,
        "versions": {"kvtier": "0.1.0", "vllm": "0.32.0"},
        "policy": POLICY,
    }
    return link.EngineHello(**(fields | changes))


def wait_until(condition: Callable[[], T], what: str) -> T:
    """Poll until `condition` holds, and return what it found; fail at the deadline."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"timed out waiting until {what}"
        time.sleep(0.005)
    return found


def in_background(call: Callable[[], Any]) -> Callable[[], Any]:
    """Begin a call; the returned function waits for its answer."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()

    def result() -> Any:
        thread.join(20)
        return found[0]

    return result


class Peer:
    """A DEALER at the link of a server."""

    def __init__(self, run_dir: Path) -> None:
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"ipc://{ControlFiles(run_dir).link_socket_path}")

    def send(self, message: link.ToServer | link.Resync) -> None:
        self.socket.send(link.encoder.encode(message))

    def next_frame(self) -> bytes:
        assert self.socket.poll(DEADLINE_S * 1000), "the server says nothing"
        return self.socket.recv()

    def says_nothing(self, timeout_ms: int = 0) -> bool:
        return not self.socket.poll(timeout_ms)

    def close(self) -> None:
        self.socket.close()
        self._context.term()


class FakeEngine(Peer):
    """An engine that sends and answers what the test says."""

    def __init__(self, run_dir: Path, engine_id: str = "engine-0", **changes: Any) -> None:
        super().__init__(run_dir)
        self.hello = hello(engine_id, **changes)
        self.engine_id = engine_id

    def join(self, gauges: link.Gauges | None = GAUGES) -> list[link.TtlOverride]:
        """Say hello, take the overrides, report; return the overrides when all that is known."""
        overrides = self.settle()
        if gauges is not None:
            self.report(gauges=gauges)
        return overrides

    def settle(self) -> list[link.TtlOverride]:
        """Return when the server has taken in all that was sent before: it answers every hello."""
        self.send(self.hello)
        command = self.next(link.OverridesCommand)
        self.answer(command)
        return command.overrides

    def report(self, *events: link.Event, gauges: link.Gauges = GAUGES, lost: int = 0) -> None:
        """Report, and see that the server has taken it in."""
        self.send(
            link.Report(
                engine_id=self.engine_id,
                sent_s=time.time(),
                events=list(events),
                gauges=gauges,
                lost=lost,
            )
        )
        self.settle()

    def knows(self, *keys: link.ProgramKey) -> None:
        """Make these programs known: each has had a turn."""
        now_s = time.time()
        self.report(
            *(
                event
                for key in keys
                for event in (
                    link.TurnStarted(at_s=now_s, program=key, turn=1, prompt_tokens=100),
                    link.TurnEnded(at_s=now_s, program=key, context_tokens=120, output_tokens=20),
                )
            )
        )

    def next(self, kind: type[T]) -> T:
        """The next command, of this kind."""
        message = link.engine_decoder.decode(self.next_frame())
        assert isinstance(message, kind), message
        return message

    def answer(
        self,
        command: Any,
        outcome: link.Outcome = "accepted",
        reason: str = "done",
        detail: str = "",
        policy: link.PolicyState | None = None,
    ) -> None:
        answer = link.Answer(
            id=command.id,
            engine_id=self.engine_id,
            outcome=outcome,
            reason=reason,
            detail=detail,
            policy=policy,
        )
        self.send(link.Answered(engine_id=self.engine_id, answers=[answer]))


class Host:
    """A control server on a loop of its own, and clients of it."""

    def __init__(self, run_dir: Path, **settings: Any) -> None:
        self.run_dir = run_dir
        extra = {
            "control_listen": "none",
            "control_state_file": str(run_dir / "state" / "overrides.json"),
        }
        extra |= {f"control_{name}": value for name, value in settings.items()}
        self.settings = Settings.load({"kvtier": extra}, {})
        self.files = ControlFiles(run_dir)
        self.server: ControlServer
        self._started = threading.Event()
        self._problem: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=self._run, name="control server")
        self._told_to_stop = False
        self._peers: list[Peer] = []
        self._channels: list[grpc.Channel] = []

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(DEADLINE_S)
        if self._problem is not None:
            raise self._problem
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers:
            peer.close()
        for channel in self._channels:
            channel.close()
        self.stop()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        # Its loop may be closed already where it was told before.
        if self._thread.is_alive() and not self._told_to_stop:
            self._told_to_stop = True
            self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> None:
        """Wait for the server's own end."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            self.server = ControlServer(self.settings, self.files, start_grace_s=3600)
            self.listening = await self.server.start()
            self._started.set()
            await self.server.run(self._stop)
            await self.server.close()

        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001 - the test's thread raises it
            self._problem = error
            self._started.set()

    def call(self, do: Callable[[], T]) -> T:
        """Call something on the server's loop."""

        async def run() -> T:
            return do()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(DEADLINE_S)

    def sample(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 where there is none."""
        registry = self.server.metrics.registry
        return self.call(lambda: registry.get_sample_value(name, labels) or 0.0)

    # -- outsiders -----------------------------------------------------------------------------------

    def engine(self, engine_id: str = "engine-0", **changes: Any) -> FakeEngine:
        engine = FakeEngine(self.run_dir, engine_id, **changes)
        self._peers.append(engine)
        return engine

    def peer(self) -> Peer:
        peer = Peer(self.run_dir)
        self._peers.append(peer)
        return peer

    def channel(
        self,
        target: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> grpc.Channel:
        target = self.files.unix_target if target is None else target
        # Each test's server has a channel of its own, whatever the address.
        options = [("grpc.use_local_subchannel_pool", 1), *options]
        channel = (
            grpc.insecure_channel(target, options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options)
        )
        self._channels.append(channel)
        return channel

    @property
    def client(self) -> Client:
        return Client(self.channel())


class Client:
    """The stubs of one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.programs: Any = program_pb2_grpc.ProgramServiceStub(channel)
        self.ttl: Any = ttl_pb2_grpc.TtlServiceStub(channel)
        self.policy: Any = policy_pb2_grpc.PolicyServiceStub(channel)
        self.observability: Any = observability_pb2_grpc.ObservabilityServiceStub(channel)


class Refused:
    """What a call that failed says: code, message, fields of BadRequest, the other details by name."""

    def __init__(self, call: Callable[[], Any]) -> None:
        try:
            answer = call()
        except grpc.RpcError as error:
            self._read(error)
            return
        raise AssertionError(f"answered: {answer}")

    def _read(self, error: Any) -> None:
        self.code = error.code()
        self.message = error.details()
        self.fields: dict[str, str] = {}
        self.details: dict[str, Any] = {}
        status = rpc_status.from_call(error)
        for packed in status.details if status is not None else ():
            name = packed.TypeName().rpartition(".")[2]
            detail = getattr(error_details_pb2, name)()
            packed.Unpack(detail)
            self.details[name] = detail
            if name == "BadRequest":
                self.fields = {v.field: v.description for v in detail.field_violations}

    @property
    def reason(self) -> str:
        return str(self.details["ErrorInfo"].reason)


__all__ = ["GAUGES", "POLICY", "Client", "FakeEngine", "Host", "Peer", "Refused"]
