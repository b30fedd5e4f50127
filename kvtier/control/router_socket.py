"""A ZeroMQ ROUTER on the event loop: frames in by a callback, frames out without waiting."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from enum import Enum
from typing import TYPE_CHECKING, Final

import zmq

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

HIGH_WATER_MARK: Final = 2000
"""Messages that wait for one peer, in each direction."""
MAX_MESSAGE_BYTES: Final = 64 << 20
READS_A_TURN: Final = 256
"""Messages taken in before the loop may do something else."""


class Sent(Enum):
    """What became of a message to a peer."""

    QUEUED = "queued"
    FULL = "full"
    """Too many messages wait for the peer."""
    NO_PEER = "no_peer"
    """Nobody of this identity is connected."""


class RouterSocket:
    """The socket; used from the loop's thread only.

    Args:
        path: Of the Unix socket. Whoever listened there before is gone: the caller knows.
        received: Called with a peer's identity and the frames of each message.

    Raises:
        OSError, zmq.ZMQError: It cannot be bound.
    """

    def __init__(self, path: Path, received: Callable[[bytes, list[bytes]], None]) -> None:
        self._path = path
        self._received = received
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        path.unlink(missing_ok=True)
        old_umask = os.umask(0o177)
        try:
            self._socket.bind(f"ipc://{path}")
        except zmq.ZMQError:
            self._socket.close()
            self._context.term()
            raise
        finally:
            os.umask(old_umask)
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._is_reading = False
        self._loop.add_reader(self._descriptor, self._read)
        self._look_again()

    def send(self, identity: bytes, payload: bytes) -> Sent:
        """Queue a message, or say why not."""
        try:
            self._socket.send_multipart([identity, payload], zmq.NOBLOCK)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return Sent.NO_PEER
        finally:
            # The descriptor tells of a change once, and sending may have taken it in.
            self._look_again()
        return Sent.QUEUED

    def close(self) -> None:
        """Close the socket and remove its file."""
        self._loop.remove_reader(self._descriptor)
        self._socket.close()
        self._context.term()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _look_again(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        """Take in what has come, a bounded part of it at a time."""
        self._is_reading = False
        if self._socket.closed:
            return
        for _ in range(READS_A_TURN):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._received(identity, frames)
            except Exception:
                # One message must not end the link of all engines.
                logger.exception("a message of the link could not be handled")
        self._look_again()
