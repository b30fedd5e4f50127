"""Looks into the LMCache server from outside the engine."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import zmq

from kvtier import wire
from kvtier.server.processes import start_s

WAIT_S = 240.0
"""What should happen at once may take this long on a busy machine; a test fails after it."""


def server_status(endpoint: str) -> wire.StatusReply:
    """Ask the server for its counts."""
    (reply,) = _asked(endpoint, [wire.Status(2)])
    assert isinstance(reply, wire.StatusReply), reply
    return reply


def occupy(endpoint: str, namespace: str, keys: bytes, slot_bytes: int) -> int:
    """Store these chunks as another model's engine does; returns how many are resident then."""
    n_chunks = len(keys) // wire.KEY_BYTES
    reserve = wire.Reserve(
        2, namespace, "program", keys, 0, n_chunks, 1, slot_bytes, value_s=1e-6, lease_s=600.0
    )
    _, reply = _asked(endpoint, [reserve, wire.Commit(3, 2, ok=True)])
    assert isinstance(reply, wire.CommitReply), reply
    return reply.resident_chunks


def _asked(endpoint: str, requests: list[wire.Request]) -> list[wire.Reply]:
    """The server's answers to these, from a client that has said hello."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.connect(endpoint)
        pid = os.getpid()
        hello = wire.Hello(1, wire.API_VERSION, "probe/0", pid, start_s(pid) or 0.0)
        replies = []
        for message in (hello, *requests):
            socket.send(wire.encoder.encode(message))
            assert socket.poll(int(WAIT_S * 1000)), "the server does not answer"
            replies.append(wire.reply_decoder.decode(socket.recv()))
        return replies[1:]
    finally:
        socket.close()
        context.term()


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
