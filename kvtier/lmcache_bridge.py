"""`TierBackend` on an LMCache server that runs kvtier's module (`kvtier.server_module`).

A ZeroMQ DEALER used from the scheduler's thread without blocking: ZeroMQ's own I/O thread is native, so
nothing here contends for the interpreter lock (DESIGN D11). No LMCache code is imported: what kvtier
needs of LMCache happens inside its server.

When the server does not answer within `timeout_s`, everything pending fails, the state becomes `away`
(kvtier pins only, prompts that are not in GPU memory are recomputed) and a hello is tried again every
`retry_s`. A restarted server has another generation; ids from before it mean nothing to it. A server
that refuses this engine is asked ever more rarely, another one at once.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import zmq

from kvtier import wire
from kvtier.backend import (
    Activity,
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
from kvtier.server.processes import start_s

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_HELLO_ID = 0

GOODBYE_MS = 200
"""How long leaving may take at most."""
FIRST_REVIVAL_S = 15.0
STATUS_INTERVAL_S = 2.0
"""Between two questions how much of its memory the server uses: other engines fill it too."""
LONGEST_REVIVAL_S = 600.0
"""A server that has been away for so long is called back; twice as long after each call in vain."""
REFUSALS = ("api_mismatch", "no_shared_memory", "not_on_this_host")
"""What a server says that will hardly change its mind."""
FIRST_REFUSED_S = 10.0
LONGEST_REFUSED_S = 300.0
"""It is asked again after so long; twice as long after each refusal."""


@dataclass(frozen=True, slots=True)
class BridgeConfig:
    """Where the server is and how the engine's KV is laid out."""

    endpoint: str
    owner: str
    ranks: int
    slot_bytes: int
    timeout_s: float = 5.0
    retry_s: float = 1.0


class LMCacheBridge:
    """See the module's docstring. Not thread-safe: used by the scheduler's thread."""

    def __init__(
        self, config: BridgeConfig, now_s: float, revive: Callable[[], None] | None = None
    ) -> None:
        """Connect in the background.

        Args:
            config: Where and what.
            now_s: Monotonic time.
            revive: Sees to it that there is a server; called now and then while there is none.
        """
        self._config = config
        self._revive = revive
        self._revival_wait_s = FIRST_REVIVAL_S
        self._revival_due_s = now_s + FIRST_REVIVAL_S
        self._state = TierState.CONNECTING
        self._region: Region | None = None
        self._zmq = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._open()
        self._next_id = _HELLO_ID + 1
        self._pending: dict[int, float] = {}
        self._unstamped: list[int] = []
        self._events: list[TierEvent] = []
        self._hello_sent_s = float("-inf")
        self._status_sent_s = float("-inf")
        self._used_bytes: int | None = None
        self._now_s = now_s
        self._is_refused = False
        self._refused_wait_s = FIRST_REFUSED_S
        self._last_refusal = ""
        self._session = 0
        self._say_hello()

    def _open(self) -> zmq.Socket[bytes]:
        socket = self._zmq.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        # Never queue for a server that is not there: a request must not surface minutes later.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        # The end of a server shows at once, not when the next operation times out.
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.connect(self._config.endpoint)
        return socket

    def _close_socket(self, linger_ms: int = 0) -> None:
        self._socket.disable_monitor()
        # Closed by nobody else, and an open one would make the context's end wait for ever.
        self._monitor.close()
        self._socket.close(linger=linger_ms)

    def _disconnected(self) -> bool:
        lost = False
        while True:
            try:
                self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return lost
            lost = True

    @property
    def state(self) -> TierState:
        """See `TierBackend.state`."""
        return self._state

    @property
    def region(self) -> Region | None:
        """See `TierBackend.region`."""
        return self._region

    @property
    def used_bytes(self) -> int | None:
        """See `TierBackend.used_bytes`."""
        return self._used_bytes if self._state is TierState.READY else None

    def lookup(self, namespace: str, program: str, keys: bytes) -> int:
        """See `TierBackend.lookup`."""
        return self._send(lambda i: wire.Lookup(i, namespace, program, keys, self._config.ranks))

    def trim(self, lookup_id: int, keep_from: int, keep_to: int) -> None:
        """See `TierBackend.trim`. If it is lost, the server releases the locks with the session."""
        self._send(lambda i: wire.Trim(i, lookup_id, keep_from, keep_to), expect_event=False)

    def reserve(
        self,
        namespace: str,
        program: str,
        keys: bytes,
        start: int,
        end: int,
        value_s: float,
        lease_s: float,
    ) -> int:
        """See `TierBackend.reserve`."""
        config = self._config
        return self._send(
            lambda i: wire.Reserve(
                i,
                namespace,
                program,
                keys,
                start,
                end,
                config.ranks,
                config.slot_bytes,
                value_s,
                lease_s,
            )
        )

    def commit(self, reserve_id: int, *, ok: bool) -> int:
        """See `TierBackend.commit`."""
        return self._send(lambda i: wire.Commit(i, reserve_id, ok))

    def drop(self, namespace: str, program: str) -> None:
        """See `TierBackend.drop`."""
        self._send(lambda i: wire.Drop(i, namespace, program), expect_event=False)

    def spoilt(self, namespace: str, key: bytes) -> None:
        """See `TierBackend.spoilt`."""
        self._send(lambda i: wire.Spoilt(i, namespace, key), expect_event=False)

    def mark(self, namespace: str, program: str, activity: Activity) -> None:
        """See `TierBackend.mark`."""
        self._send(lambda i: wire.Mark(i, namespace, program, activity), expect_event=False)

    def poll(self, now_s: float, wait_s: float = 0.0) -> list[TierEvent]:
        """See `TierBackend.poll`."""
        self._now_s = now_s
        deadline_s = time.monotonic() + wait_s
        self._take_frames()
        # What comes meanwhile may be nobody's answer: to a status question, or what had to make room.
        while not self._has_answer() and (left_s := deadline_s - time.monotonic()) > 0:
            self._socket.poll(int(left_s * 1000) + 1)
            self._take_frames()
        # An operation's time runs from the first poll after it was sent: the engine's step in between
        # may have taken longer than the time-out.
        self._pending.update((i, now_s) for i in self._unstamped if i in self._pending)
        self._unstamped.clear()
        if self._disconnected():
            if self._is_refused:
                # Who answers next is another server.
                self._is_refused = False
                self._plan_first_revival()
            if self._state is TierState.READY:
                self._go_away("disconnected", "the server closed the connection")
        if self._pending and now_s - next(iter(self._pending.values())) > self._config.timeout_s:
            self._go_away("timeout", f"no answer for {self._config.timeout_s:g} s")
        if self._state is not TierState.READY:
            self._say_hello()
            if not self._is_refused:
                self._call_back()
        if self._state is TierState.READY and now_s - self._status_sent_s >= STATUS_INTERVAL_S:
            self._status_sent_s = now_s
            self._send(wire.Status, expect_event=False)
        events, self._events = self._events, []
        return events

    def _has_answer(self) -> bool:
        return any(not isinstance(event, Evicted) for event in self._events)

    def _take_frames(self) -> None:
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._receive(frame)

    def close(self) -> None:
        """Leave: the server releases what this engine holds as soon as no copy can be using it.

        Idempotent.
        """
        if self._socket.closed:
            return
        if self._state is TierState.READY:
            # A new session ends the old one; it will hold nothing.
            self._session += 1
            self._hello_sent_s = float("-inf")
            self._say_hello()
        # Who still has something to give back is told that nobody is there, instead of failing.
        self._state = TierState.AWAY
        self._close_socket(linger_ms=GOODBYE_MS)
        self._zmq.term()

    # -- internals ---------------------------------------------------------------------------------

    def _send(self, build: object, *, expect_event: bool = True) -> int:
        op_id = self._next_id
        self._next_id += 1
        if self._state is not TierState.READY:
            if expect_event:
                self._events.append(OperationFailed(op_id, f"tier_{self._state}", "not connected"))
            return op_id
        assert callable(build)
        try:
            self._socket.send(wire.encoder.encode(build(op_id)), zmq.NOBLOCK)
        except zmq.Again:
            if expect_event:
                self._pending[op_id] = float("inf")
            self._go_away("unreachable", "the connection is gone")
            return op_id
        if expect_event:
            self._pending[op_id] = float("inf")
            self._unstamped.append(op_id)
        return op_id

    def _say_hello(self) -> None:
        wait_s = self._refused_wait_s if self._is_refused else self._config.retry_s
        if self._now_s - self._hello_sent_s < wait_s:
            return
        self._hello_sent_s = self._now_s
        if self._is_refused:
            self._refused_wait_s = min(2 * self._refused_wait_s, LONGEST_REFUSED_S)
        pid = os.getpid()
        owner = f"{self._config.owner}/{self._session}"
        hello = wire.Hello(_HELLO_ID, wire.API_VERSION, owner, pid, start_s(pid) or 0.0)
        try:
            self._socket.send(wire.encoder.encode(hello), zmq.NOBLOCK)
        except zmq.Again:
            return

    def _plan_first_revival(self) -> None:
        self._revival_wait_s = FIRST_REVIVAL_S
        self._revival_due_s = self._now_s + FIRST_REVIVAL_S

    def _call_back(self) -> None:
        if self._revive is None or self._now_s < self._revival_due_s:
            return
        self._revival_wait_s = min(2 * self._revival_wait_s, LONGEST_REVIVAL_S)
        self._revival_due_s = self._now_s + self._revival_wait_s
        try:
            self._revive()
        except OSError as error:
            logger.warning("cannot see to the LMCache server: %s", error)

    def _receive(self, frame: bytes) -> None:
        try:
            reply = wire.reply_decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._go_away("malformed", f"the server's answer cannot be read: {error}")
            return
        if isinstance(reply, wire.HelloReply | wire.CommitReply | wire.StatusReply):
            self._used_bytes = reply.used_bytes
        if isinstance(reply, wire.HelloReply):
            self._connected(reply)
            return
        if isinstance(reply, wire.Failed) and reply.id == _HELLO_ID:
            self._refused(reply)
            return
        if isinstance(reply, wire.Evicted):
            self._events.append(Evicted(reply.namespace, reply.program, reply.resident_chunks))
            return
        if self._pending.pop(reply.id, None) is None:
            if isinstance(reply, wire.LookupReply) and reply.hit_chunks:
                # Too late: nobody waits for it any more, so give the locks back.
                self.trim(reply.id, 0, 0)
            return
        self._answered(reply)

    def _answered(self, reply: wire.Reply) -> None:
        """An operation that somebody waits for has ended."""
        match reply:
            case wire.LookupReply():
                self._events.append(
                    LookupDone(reply.id, reply.generation, reply.hit_chunks, reply.slots)
                )
            case wire.ReserveReply():
                self._events.append(ReserveDone(reply.id, reply.generation, reply.slots))
            case wire.CommitReply():
                self._events.append(CommitDone(reply.id, reply.resident_chunks))
            case wire.Failed():
                self._events.append(OperationFailed(reply.id, reply.reason, reply.detail))
                if reply.reason == "unknown_owner":
                    self._go_away("server_restarted", "the server does not know this engine")
            case _:
                self._events.append(OperationFailed(reply.id, "malformed", type(reply).__name__))

    def _connected(self, reply: wire.HelloReply) -> None:
        if self._region is not None and self._region.generation != reply.generation:
            self._fail_pending("server_restarted", "the server was restarted")
            if self._state is TierState.READY:
                # What was staged is gone, though the connection was not noticed to be.
                self._state = TierState.AWAY
                self._events.append(StateChanged(self._state, "server_restarted"))
        self._region = Region(reply.shm_name, reply.pool_bytes, reply.generation)
        self._is_refused, self._last_refusal = False, ""
        if self._state is not TierState.READY:
            self._state = TierState.READY
            self._status_sent_s = self._now_s
            detail = f"{reply.pool_bytes / 1e9:.1f} GB in {reply.shm_name}"
            if reply.eviction_policy not in ("noop", "unknown"):
                detail += f"; eviction policy {reply.eviction_policy}: leases are best effort"
            self._events.append(StateChanged(self._state, detail))

    def _refused(self, reply: wire.Failed) -> None:
        if reply.reason in REFUSALS and not self._is_refused:
            self._is_refused, self._refused_wait_s = True, FIRST_REFUSED_S
        if self._state is TierState.AWAY and reply.reason != self._last_refusal:
            # No change of state tells it.
            logger.warning("LMCache server refuses this engine: %s: %s", reply.reason, reply.detail)
        self._last_refusal = reply.reason
        self._go_away(reply.reason, reply.detail)

    def _fail_pending(self, reason: str, detail: str) -> None:
        self._events.extend(OperationFailed(op_id, reason, detail) for op_id in self._pending)
        self._pending.clear()

    def _go_away(self, reason: str, detail: str) -> None:
        self._fail_pending(reason, detail)
        if self._state is not TierState.AWAY:
            self._state = TierState.AWAY
            self._plan_first_revival()
            self._events.append(StateChanged(self._state, f"{reason}: {detail}"))
            # A new session: the server keeps what the old one holds until no copy can be using it.
            self._session += 1
            self._close_socket()
            self._socket = self._open()
