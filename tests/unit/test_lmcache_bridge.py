"""The engine's side of the CPU tier's protocol, over a real socket to a server that misbehaves."""

from __future__ import annotations

import itertools
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zmq

from kvtier import wire
from kvtier.backend import (
    CommitDone,
    Evicted,
    LookupDone,
    OperationFailed,
    Region,
    ReserveDone,
    StateChanged,
    TierEvent,
    TierState,
)
from kvtier.lmcache_bridge import REFUSALS, BridgeConfig, LMCacheBridge
from kvtier.server.residency import ResidencyTable
from tests.unit.fake_l1 import FakeL1

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WAIT_S = 20.0
KEYS = bytes(range(3 * wire.KEY_BYTES))
NS = "model"


class Server(threading.Thread):
    """What kvtier's module does inside the LMCache server, without LMCache.

    Attributes:
        answer: Called with a request and the right reply; returns what is sent instead (raw bytes
            or a message; None to stay silent).
        hellos: Owners that have said hello, in order.
        seen: Requests other than hellos.
        used: Bytes that it says are used.
    """

    def __init__(self, endpoint: str, generation: str = "one", l1_slots: int = 8) -> None:
        super().__init__(daemon=True)
        self.generation = generation
        self.table = ResidencyTable(FakeL1(l1_slots))
        self.answer: Callable[[wire.Request, wire.Reply], wire.Reply | bytes | None] = (
            lambda _, reply: reply
        )
        self.policy = "noop"
        self.used = 0
        self.hellos: list[str] = []
        self.seen: list[wire.Request] = []
        self.owners: dict[bytes, str] = {}
        self.stopping = threading.Event()
        self._zmq = zmq.Context()
        self._socket = self._zmq.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        self.start()

    def run(self) -> None:
        while not self.stopping.is_set():
            if self._socket.poll(10):
                identity, frame = self._socket.recv_multipart()
                request = wire.request_decoder.decode(frame)
                sent = self.answer(request, self._reply(identity, request))
                if sent is not None:
                    data = sent if isinstance(sent, bytes) else wire.encoder.encode(sent)
                    self._socket.send_multipart([identity, data])
        self._socket.close()
        self._zmq.term()

    def stop(self) -> None:
        self.stopping.set()
        self.join(WAIT_S)
        assert not self.is_alive()

    def _reply(self, identity: bytes, request: wire.Request) -> wire.Reply:  # noqa: C901, PLR0912 - a case a request
        if isinstance(request, wire.Hello):
            self.hellos.append(request.owner)
            if request.api != wire.API_VERSION:
                return wire.Failed(request.id, "api_mismatch", "other version")
            self.owners[identity] = request.owner
            return wire.HelloReply(
                request.id, wire.API_VERSION, self.generation, "shm", 800, self.policy, self.used
            )
        self.seen.append(request)
        owner = self.owners.get(identity)
        if owner is None:
            return wire.Failed(request.id, "unknown_owner", "say hello first")
        r: Any = request
        match request:
            case wire.Lookup():
                hit, slots = self.table.lookup(
                    owner, r.id, r.namespace, r.program, r.keys, r.ranks, 0.0
                )
                return wire.LookupReply(r.id, self.generation, hit, slots)
            case wire.Trim():
                self.table.trim(owner, r.lookup_id, r.keep_from, r.keep_to)
            case wire.Reserve():
                what = (r.namespace, r.program, r.keys, r.start, r.end, r.ranks, r.slot_bytes)
                reserved = self.table.reserve(owner, r.id, *what, r.value_s, r.lease_s, 0.0)
                if reserved is None:
                    return wire.Failed(r.id, "l1_full", "")
                return wire.ReserveReply(r.id, self.generation, reserved)
            case wire.Commit():
                resident = self.table.commit(owner, r.reserve_id, 0.0, ok=r.ok)
                if resident is None:
                    return wire.Failed(r.id, "unknown_reservation", "")
                return wire.CommitReply(r.id, self.generation, resident, self.used)
            case wire.Status():
                return wire.StatusReply(r.id, self.generation, self.used, 800, 1, 1, 0, 0, 0)
            case wire.Drop():
                self.table.drop(r.namespace, r.program)
            case wire.Spoilt():
                self.table.spoilt(r.namespace, r.key)
            case wire.Mark():
                self.table.mark(owner, r.namespace, r.program, r.activity, 0.0)
        return wire.Ack(request.id)


class Client:
    """A bridge with a clock of its own, and all events that have come."""

    def __init__(self, endpoint: str) -> None:
        self.now_s = 1000.0
        config = BridgeConfig(endpoint, "engine", ranks=2, slot_bytes=100)
        self.revivals_s: list[float] = []
        self.bridge = LMCacheBridge(
            config, self.now_s, revive=lambda: self.revivals_s.append(self.now_s)
        )
        self.config = config
        self.events: list[TierEvent] = []

    def poll(self, wait_s: float = 0.0) -> None:
        self.events += self.bridge.poll(self.now_s, wait_s)

    def until(self, done: Callable[[], bool], *, step_s: float = 0.0) -> None:
        """Poll until `done`, `step_s` of the bridge's time passing with each poll."""
        deadline_s = time.monotonic() + WAIT_S
        while not done():
            assert time.monotonic() < deadline_s, self.events
            self.now_s += step_s
            self.poll(0.02)

    def ready(self) -> None:
        self.until(lambda: self.bridge.state is TierState.READY, step_s=self.config.retry_s)

    def outcome(self, op_id: int) -> TierEvent:
        """The event of an operation; there is exactly one."""

        def found() -> list[TierEvent]:
            return [e for e in self.events if getattr(e, "op_id", None) == op_id]

        self.until(lambda: bool(found()))
        self.poll()
        (event,) = found()
        return event

    def lookup(self) -> int:
        return self.bridge.lookup(NS, "p", KEYS)

    def store(self, program: str = "p") -> int:
        """Reserve and commit all chunks; the resident ones."""
        reserved = self.outcome(self.bridge.reserve(NS, program, KEYS, 0, 3, 1.0, 60.0))
        assert isinstance(reserved, ReserveDone), reserved
        committed = self.outcome(self.bridge.commit(reserved.op_id, ok=True))
        assert isinstance(committed, CommitDone), committed
        return committed.resident_chunks

    @property
    def states(self) -> list[tuple[TierState, str]]:
        changes = [e for e in self.events if isinstance(e, StateChanged)]
        return [(e.state, e.detail.partition(":")[0]) for e in changes]


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    # A Unix socket's path has at most 107 bytes; pytest's directories can be longer.
    if len(str(tmp_path)) < 90:
        return f"ipc://{tmp_path}/s"
    link = f"/tmp/kvtier-{os.getpid()}-{tmp_path.name[-20:]}"
    return f"ipc://{link}"


@pytest.fixture
def server(endpoint: str) -> Iterator[Server]:
    server = Server(endpoint)
    yield server
    server.stop()


@pytest.fixture
def connect(endpoint: str) -> Iterator[Callable[[], Client]]:
    """For tests whose server must be as it is before the first hello."""
    clients: list[Client] = []

    def connect() -> Client:
        clients.append(Client(endpoint))
        return clients[-1]

    yield connect
    for client in clients:
        client.bridge.close()


@pytest.fixture
def client(connect: Callable[[], Client]) -> Client:
    return connect()


def test_hello_tells_the_region(server: Server, client: Client) -> None:
    assert client.bridge.state is TierState.CONNECTING
    assert client.bridge.region is None
    client.ready()
    assert client.bridge.region == Region("shm", 800, "one")
    assert [state for state, _ in client.states] == [TierState.READY]
    assert set(server.hellos) == {"engine/0"}


def test_an_eviction_policy_that_ignores_leases_is_told(
    server: Server, connect: Callable[[], Client]
) -> None:
    server.policy = "lru"
    client = connect()
    client.ready()
    (change,) = client.events
    assert isinstance(change, StateChanged)
    assert "lru" in change.detail


def test_store_read_and_forget(server: Server, client: Client) -> None:
    client.ready()
    assert client.store() == 3
    found = client.outcome(client.lookup())
    assert isinstance(found, LookupDone)
    assert (found.hit_chunks, found.generation) == (3, "one")
    assert [len(rank) for rank in found.slots] == [3, 3]
    client.bridge.trim(found.op_id, 1, 2)
    client.until(lambda: server.table.counts()["locked_chunks"] == 1)
    client.bridge.trim(found.op_id, 0, 0)
    for activity in ("waiting", "running", "paused"):
        client.bridge.mark(NS, "p", activity)
        client.until(lambda: server.table._programs[NS, "p"].activity == activity)  # noqa: B023
    n_chunks = server.table.counts()["chunks"]
    last = server.table._programs[NS, "p"].keys[-1]
    client.bridge.spoilt(NS, last)
    client.until(lambda: server.table.counts()["chunks"] == n_chunks - 1)
    client.bridge.drop(NS, "p")
    client.until(lambda: server.table.counts()["chunks"] == 0)
    assert client.bridge.state is TierState.READY
    reserve = next(r for r in server.seen if isinstance(r, wire.Reserve))
    assert (reserve.ranks, reserve.slot_bytes, reserve.value_s, reserve.lease_s) == (
        2,
        100,
        1.0,
        60.0,
    )


def test_refusals_are_events_with_the_servers_reason(server: Server, client: Client) -> None:
    client.ready()
    unknown = client.outcome(client.bridge.commit(77, ok=True))
    assert isinstance(unknown, OperationFailed)
    assert unknown.reason == "unknown_reservation"
    server.table = ResidencyTable(FakeL1(2))
    full = client.outcome(client.bridge.reserve(NS, "p", KEYS, 0, 3, 1.0, 60.0))
    assert isinstance(full, OperationFailed)
    assert full.reason == "l1_full"
    assert client.bridge.state is TierState.READY


def test_without_a_server_nothing_waits(client: Client) -> None:
    failed = client.outcome(client.lookup())
    assert isinstance(failed, OperationFailed)
    assert failed.reason == "tier_connecting"
    client.bridge.trim(1, 0, 0)
    client.bridge.drop(NS, "p")
    client.poll()
    assert len(client.events) == 1


def test_a_server_that_comes_later_is_found(endpoint: str, client: Client) -> None:
    client.now_s += 5.0
    client.poll()
    server = Server(endpoint)
    client.ready()
    server.stop()


def test_a_server_that_stays_away_is_called_back_ever_more_rarely(
    endpoint: str, client: Client
) -> None:
    for _ in range(110):
        client.now_s += 1
        client.poll()
    assert client.revivals_s == [1015, 1045, 1105]
    server = Server(endpoint)
    client.ready()
    server.stop()
    client.until(lambda: client.bridge.state is TierState.AWAY)
    lost_s = client.now_s
    for _ in range(50):
        client.now_s += 1
        client.poll()
    assert client.revivals_s[3:] == [lost_s + 15, lost_s + 45]


def test_a_silent_server_is_away_after_the_timeout(server: Server, client: Client) -> None:
    client.ready()
    server.answer = lambda request, reply: reply if isinstance(request, wire.Hello) else None
    op_ids = [client.lookup(), client.bridge.commit(5, ok=True)]
    client.poll()
    client.now_s += client.config.timeout_s
    client.poll()
    assert client.bridge.state is TierState.READY, "not a moment too early"
    client.now_s += 0.01
    client.poll()
    failed = [client.outcome(op_id) for op_id in op_ids]
    assert [f.reason for f in failed if isinstance(f, OperationFailed)] == ["timeout", "timeout"]
    assert client.states[1] == (TierState.AWAY, "timeout")


def test_a_long_step_is_no_timeout(server: Server, client: Client) -> None:
    """The engine has not polled for a while when it asks: the wait begins with the question."""
    client.ready()
    server.answer = lambda request, reply: None
    op_id = client.lookup()
    client.now_s += 3 * client.config.timeout_s
    client.poll()
    assert client.bridge.state is TierState.READY
    client.now_s += client.config.timeout_s + 0.01
    client.poll()
    failed = client.outcome(op_id)
    assert isinstance(failed, OperationFailed)
    assert failed.reason == "timeout"


def test_an_answer_that_is_there_is_no_timeout(server: Server, client: Client) -> None:
    client.ready()
    asked = threading.Event()

    def answer(_: wire.Request, reply: wire.Reply) -> wire.Reply:
        asked.wait(WAIT_S)
        return reply

    server.answer = answer
    op_id = client.lookup()
    client.poll()
    asked.set()
    # The answer arrives; the engine looks only much later.
    assert client.bridge._socket.poll(int(WAIT_S * 1000))
    client.now_s += 100.0
    assert isinstance(client.outcome(op_id), LookupDone)


def test_after_a_timeout_a_new_session_begins(server: Server, client: Client) -> None:
    client.ready()
    client.store()
    found = client.outcome(client.lookup())
    silent = threading.Event()
    silent.set()
    server.answer = lambda _, reply: None if silent.is_set() else reply
    client.lookup()
    client.poll()
    client.now_s += 10.0
    client.poll()
    assert client.bridge.state is TierState.AWAY
    silent.clear()
    client.ready()
    assert server.hellos[-1] == "engine/1"
    assert [state for state, _ in client.states[-2:]] == [TierState.AWAY, TierState.READY]
    # The old session's locks are its own: a trim from the new one does not touch them.
    client.bridge.trim(found.op_id, 0, 0)  # type: ignore[union-attr]
    again = client.outcome(client.lookup())
    assert isinstance(again, LookupDone)
    assert again.hit_chunks == 3
    assert server.table.counts()["locked_chunks"] == 3
    server.table.owner_gone("engine/0")
    client.bridge.trim(again.op_id, 0, 0)
    client.until(lambda: server.table.counts()["locked_chunks"] == 0)


def test_a_restarted_server_has_another_region(endpoint: str, client: Client) -> None:
    first = Server(endpoint)
    client.ready()
    client.store()
    first.stop()
    op_id = client.lookup()
    client.poll()
    client.now_s += 10.0
    second = Server(endpoint, generation="two")
    assert isinstance(client.outcome(op_id), OperationFailed)
    client.ready()
    assert client.bridge.region == Region("shm", 800, "two")
    found = client.outcome(client.lookup())
    assert isinstance(found, LookupDone)
    assert (found.hit_chunks, found.generation) == (0, "two")
    assert [state for state, _ in client.states] == [
        TierState.READY,
        TierState.AWAY,
        TierState.READY,
    ]
    second.stop()


def test_it_knows_how_much_of_the_tier_is_used(server: Server, client: Client) -> None:
    assert client.bridge.used_bytes is None
    server.used = 100
    client.ready()
    client.until(lambda: client.bridge.used_bytes == 100, step_s=0.1)
    server.used = 400
    client.store()
    assert client.bridge.used_bytes == 400, "at once: the engine may be idle from now on"
    # Other engines fill it too.
    server.used = 700
    before = len(server.seen)
    client.until(lambda: client.bridge.used_bytes == 700, step_s=0.1)
    asked = [request for request in server.seen[before:] if isinstance(request, wire.Status)]
    assert len(asked) <= 2, "once in a while is enough"
    server.stop()
    client.until(lambda: client.bridge.state is TierState.AWAY, step_s=1.0)
    assert client.bridge.used_bytes is None


def test_a_server_of_before_tells_no_use() -> None:
    reply = wire.reply_decoder.decode(
        msgspec.msgpack.encode(["HelloReply", 0, wire.API_VERSION, "one", "shm", 800, "noop"])
    )
    assert isinstance(reply, wire.HelloReply)
    assert reply.used_bytes is None


def test_a_restart_that_nobody_noticed(server: Server, client: Client) -> None:
    """A hello's late answer comes from another server: what was staged there is gone."""
    client.ready()
    other = wire.HelloReply(0, wire.API_VERSION, "two", "shm2", 900, "noop")
    server.answer = lambda _, reply: other
    op_id = client.lookup()
    failed = client.outcome(op_id)
    assert isinstance(failed, OperationFailed)
    assert failed.reason == "server_restarted"
    assert client.bridge.region == Region("shm2", 900, "two")
    assert [state for state, _ in client.states] == [
        TierState.READY,
        TierState.AWAY,
        TierState.READY,
    ]


def test_a_server_that_ends_is_noticed_at_once(endpoint: str, client: Client) -> None:
    server = Server(endpoint)
    client.ready()
    server.stop()
    client.until(lambda: client.bridge.state is TierState.AWAY)
    assert client.states[-1] == (TierState.AWAY, "disconnected")


def test_a_server_that_does_not_know_us_is_told_hello(server: Server, client: Client) -> None:
    client.ready()
    server.owners.clear()
    failed = client.outcome(client.lookup())
    assert isinstance(failed, OperationFailed)
    assert failed.reason == "unknown_owner"
    assert client.states[1] == (TierState.AWAY, "server_restarted")
    client.ready()
    assert isinstance(client.outcome(client.lookup()), LookupDone)


def test_locks_of_an_answer_that_nobody_awaits_are_given_back(
    server: Server, client: Client
) -> None:
    client.ready()
    client.store()
    keep: list[wire.Reply] = []

    def answer(request: wire.Request, reply: wire.Reply) -> wire.Reply:
        if isinstance(request, wire.Lookup):
            keep.append(reply)
            return wire.Failed(request.id, "server_error", "given up")
        return keep.pop() if keep else reply

    server.answer = answer
    assert isinstance(client.outcome(client.lookup()), OperationFailed)
    assert server.table.counts()["locked_chunks"] == 3
    client.bridge.drop(NS, "other")  # its acknowledgement is replaced by the late answer
    client.until(lambda: server.table.counts()["locked_chunks"] == 0)
    assert [e for e in client.events if isinstance(e, LookupDone)] == []


@pytest.mark.parametrize("garbage", [b"", b"\xc1", b"not msgpack", b"\x92\xa5Hello\x00"])
def test_garbage_ends_the_session(server: Server, client: Client, garbage: bytes) -> None:
    client.ready()
    server.answer = lambda request, reply: reply if isinstance(request, wire.Hello) else garbage
    failed = client.outcome(client.lookup())
    assert isinstance(failed, OperationFailed)
    assert failed.reason == "malformed"
    server.answer = lambda _, reply: reply
    client.ready()
    assert isinstance(client.outcome(client.lookup()), LookupDone)


def test_what_had_to_make_room_is_told_unasked(server: Server, client: Client) -> None:
    client.ready()
    server.answer = lambda request, reply: (
        wire.Evicted(0, NS, "p", 2) if isinstance(request, wire.Mark) else reply
    )
    client.bridge.mark(NS, "p", "running")
    client.until(lambda: Evicted(NS, "p", 2) in client.events)
    assert isinstance(client.outcome(client.lookup()), LookupDone), "the session goes on"


def test_an_answer_of_the_wrong_kind_fails_the_operation(server: Server, client: Client) -> None:
    client.ready()
    server.answer = lambda request, _: wire.Ack(request.id)
    failed = client.outcome(client.lookup())
    assert isinstance(failed, OperationFailed)
    assert failed.reason == "malformed"


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_server_that_refuses_is_asked_ever_more_rarely(
    server: Server, connect: Callable[[], Client], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.answer = lambda request, _: wire.Failed(request.id, reason, "get another one")
    client = connect()
    client.until(lambda: client.bridge.state is TierState.AWAY, step_s=1.0)
    assert client.states == [(TierState.AWAY, reason)]
    refused = client.outcome(client.lookup())
    assert isinstance(refused, OperationFailed)
    assert refused.reason == "tier_away"
    asked_s = refused_hellos(client, 700)
    waits_s = [after - before for before, after in itertools.pairwise(asked_s)]
    assert waits_s == [10, 20, 40, 80, 160, 300]
    assert client.revivals_s == [], "it is there"
    assert caplog.messages == [], "the change of state told it"
    # For another reason it is told again, once.
    server.answer = lambda request, _: wire.Failed(request.id, "other", "not you")
    assert len(refused_hellos(client, 700)) == 3
    assert caplog.messages == ["LMCache server refuses this engine: other: not you"]
    server.answer = lambda _, reply: reply
    client.until(lambda: client.bridge.state is TierState.READY, step_s=10.0)
    assert isinstance(client.outcome(client.lookup()), LookupDone)


def refused_hellos(client: Client, seconds: int) -> list[float]:
    """When the client says hello in this time, the last hello before it first; each is answered."""
    assert client.bridge._socket.poll(int(WAIT_S * 1000), zmq.POLLOUT), "not connected"
    asked_s = [client.bridge._hello_sent_s]
    for _ in range(seconds):
        client.now_s += 1.0
        client.poll()
        if client.bridge._hello_sent_s != asked_s[-1]:
            asked_s.append(client.bridge._hello_sent_s)
            assert client.bridge._socket.poll(int(WAIT_S * 1000)), "no answer"
            client.poll()
    return asked_s


@pytest.mark.parametrize("reason", REFUSALS)
def test_another_server_is_asked_at_once(
    endpoint: str, connect: Callable[[], Client], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by an engine that has been refused for long; it calls back one that has ended."""
    wrong = Server(endpoint)
    wrong.answer = lambda request, _: wire.Failed(request.id, reason, "get another one")
    client = connect()
    client.until(lambda: client.bridge.state is TierState.AWAY, step_s=1.0)
    refused_hellos(client, 400)
    wrong.stop()
    client.until(lambda: not client.bridge._is_refused)
    ended_s = client.now_s
    client.now_s += 15.0
    client.poll()
    assert client.revivals_s == [ended_s + 15.0]
    # It is wrong again: the same reason is not told twice.
    wrong = Server(endpoint, generation="two")
    wrong.answer = lambda request, _: wire.Failed(request.id, reason, "get another one")
    client.until(lambda: client.bridge._is_refused, step_s=client.config.retry_s)
    wrong.stop()
    client.until(lambda: not client.bridge._is_refused)
    assert caplog.messages == []
    right = Server(endpoint, generation="three")
    began_s = client.now_s
    client.until(lambda: client.bridge.state is TierState.READY, step_s=0.1)
    assert client.now_s - began_s < 300.0
    assert [state for state, _ in client.states] == [TierState.AWAY, TierState.READY]
    assert client.store() == 3
    right.stop()


def test_leaving_ends_the_session_at_the_server(
    server: Server, connect: Callable[[], Client]
) -> None:
    client = connect()
    client.ready()
    client.bridge.close()
    deadline_s = time.monotonic() + WAIT_S
    while len(server.hellos) < 2:
        assert time.monotonic() < deadline_s, server.hellos
        time.sleep(0.01)
    assert server.hellos == ["engine/0", "engine/1"]


def test_hello_is_not_repeated_in_every_step(server: Server, connect: Callable[[], Client]) -> None:
    server.answer = lambda request, reply: None
    client = connect()
    client.until(lambda: bool(server.hellos), step_s=1.0)
    sent_s = client.bridge._hello_sent_s
    for _ in range(7):
        client.now_s += client.config.retry_s / 8
        client.poll()
        assert client.bridge._hello_sent_s == sent_s
    client.now_s += client.config.retry_s / 8
    client.poll()
    assert client.bridge._hello_sent_s == client.now_s


def test_a_wait_ends_with_the_answer(server: Server, client: Client) -> None:
    client.ready()
    op_id = client.lookup()
    began_s = time.monotonic()
    # Ended by the answer, not by what else the server may have to say.
    client.bridge._send(wire.Status, expect_event=False)
    client.poll(wait_s=WAIT_S)
    assert time.monotonic() - began_s < WAIT_S
    assert isinstance(client.events[-1], LookupDone)
    assert client.events[-1].op_id == op_id
