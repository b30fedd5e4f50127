"""Looks into the LMCache server from outside the engine."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Self

import zmq

from kvtier import wire
from kvtier.server.processes import start_s

WAIT_S = 240.0
"""What should happen at once may take this long on a busy machine; a test fails after it."""


class Probe:
    """An engine by what it says to the server: one thing at a time.

    Args:
        endpoint: The server's.
        name: Of the engine, and of its namespace.

    Attributes:
        evictions: What it was told unasked.
    """

    def __init__(self, endpoint: str, name: str) -> None:
        self.name = name
        self.evictions: list[wire.Evicted] = []
        self._next_id = 1
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)
        pid = os.getpid()
        hello = wire.Hello(self._take_id(), wire.API_VERSION, f"{name}/0", pid, start_s(pid) or 0.0)
        assert isinstance(self.ask(hello), wire.HelloReply)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._context.term()

    def ask(self, request: wire.Request) -> wire.Reply:
        """The server's answer; what comes before it is kept."""
        self._socket.send(wire.encoder.encode(request))
        while True:
            assert self._socket.poll(int(WAIT_S * 1000)), "the server does not answer"
            reply: wire.Reply = wire.reply_decoder.decode(self._socket.recv())
            if not isinstance(reply, wire.Evicted):
                return reply
            self.evictions.append(reply)

    def store(self, program: str, n_chunks: int, slot_bytes: int, *, value_s: float) -> int:
        """How many of the program's chunks the server holds then."""
        return self.store_keys(program, self._keys(program, n_chunks), slot_bytes, value_s=value_s)

    def store_keys(self, program: str, keys: bytes, slot_bytes: int, *, value_s: float) -> int:
        """The same, of given chunks."""
        reserve_id, n_chunks = self._take_id(), len(keys) // wire.KEY_BYTES
        what = (self.name, program, keys, 0, n_chunks, 1, slot_bytes, value_s, 600.0)
        reserved = self.ask(wire.Reserve(reserve_id, *what))
        assert isinstance(reserved, wire.ReserveReply), reserved
        committed = self.ask(wire.Commit(self._take_id(), reserve_id, ok=True))
        assert isinstance(committed, wire.CommitReply), committed
        return committed.resident_chunks

    def resident(self, program: str, n_chunks: int) -> int:
        """How many of the program's chunks the server holds."""
        lookup_id = self._take_id()
        keys = self._keys(program, n_chunks)
        found = self.ask(wire.Lookup(lookup_id, self.name, program, keys, 1))
        assert isinstance(found, wire.LookupReply), found
        self.ask(wire.Trim(self._take_id(), lookup_id, 0, 0))
        return found.hit_chunks

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _keys(self, program: str, n_chunks: int) -> bytes:
        texts = (f"{program} {i}".encode() for i in range(n_chunks))
        return b"".join(blake2b(text, digest_size=wire.KEY_BYTES).digest() for text in texts)


def server_status(endpoint: str) -> wire.StatusReply:
    """Ask the server for its counts."""
    with Probe(endpoint, "probe") as probe:
        reply = probe.ask(wire.Status(2))
    assert isinstance(reply, wire.StatusReply), reply
    return reply


def occupy(endpoint: str, namespace: str, keys: bytes, slot_bytes: int) -> int:
    """Store these chunks as another model's engine does; returns how many are resident then."""
    with Probe(endpoint, namespace) as probe:
        return probe.store_keys("program", keys, slot_bytes, value_s=1e-6)


def await_clean(endpoint: str) -> wire.StatusReply:
    """Wait until no chunk is locked and no reservation is open."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        status = server_status(endpoint)
        if not status.locked_chunks and not status.reservations:
            return status
        assert time.monotonic() < deadline_s, f"left over in the server: {status}"
        time.sleep(0.1)


def await_stopped(pid: int) -> None:
    """Wait until each thread of a process that was sent SIGSTOP has stopped.

    A thread that has no processor at that moment stops when it gets one, and can answer until then.
    """
    deadline_s = time.monotonic() + WAIT_S
    while (states := _states(pid)) != {"T"}:
        assert time.monotonic() < deadline_s, f"process {pid} does not stop: {states}"
        time.sleep(0.001)


def _states(pid: int) -> set[str]:
    """The states of a process's threads, as proc(5) writes them: "T" is stopped."""
    states = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        # One may end meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            states.add((task / "stat").read_text().rpartition(") ")[2][0])
    return states


def knock(endpoint: str) -> list[wire.Reply]:
    """Talk to the server as it should not be talked to; its answers to what it can answer."""
    context = zmq.Context()
    dealer, stranger = context.socket(zmq.DEALER), context.socket(zmq.REQ)
    try:
        for socket in (dealer, stranger):
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
        # This kind of socket puts an empty frame in front.
        stranger.send(b"hello?")
        replies = []
        of_another_host = wire.Hello(1, wire.API_VERSION, "far/0", 2**22 + 1, 1.0)
        for frame in (b"", b"\xff" * 100, wire.encoder.encode(of_another_host)):
            dealer.send(frame)
            assert dealer.poll(int(WAIT_S * 1000)), "the server does not answer"
            replies.append(wire.reply_decoder.decode(dealer.recv()))
        return replies
    finally:
        dealer.close()
        stranger.close()
        context.term()
