"""The control server as an engine's link sees it: a socket that loses, repeats and garbles."""

from __future__ import annotations

from collections import Counter, deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import zmq

from kvtier import link_messages as messages
from kvtier.control.engine_status import EngineStatus
from kvtier.control.link import EngineLink

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.scheduler_half import SchedulerHalf


class Wire:
    """Stands in for the link's socket.

    Attributes:
        inbox: What the engine will receive.
        is_up: Whether the server reads.
        due: How many answers are still to come, by command.
        outcomes: Answers that came, by outcome.
    """

    def __init__(self) -> None:
        self.inbox: deque[bytes] = deque()
        self.is_up = True
        self.due: Counter[int] = Counter()
        self.outcomes: Counter[str] = Counter()

    def command(self, message: messages.ToEngine) -> None:
        """Send a message to the engine."""
        self.inbox.append(messages.encoder.encode(message))

    def recv(self, _: int) -> bytes:
        """As a ZeroMQ socket."""
        if not self.inbox:
            raise zmq.Again
        frame = self.inbox.popleft()
        try:
            message = messages.engine_decoder.decode(frame)
        except (messages.msgspec.DecodeError, UnicodeDecodeError):
            return frame
        if not isinstance(message, messages.Resync):
            self.due[message.id] += 1
        return frame

    def send(self, frame: bytes, _: int) -> None:
        """As a ZeroMQ socket."""
        if b"Answered" in frame[:16]:
            message = messages.server_decoder.decode(frame)
            assert isinstance(message, messages.Answered)
            for answer in message.answers:
                self._answered(answer)
        if not self.is_up:
            raise zmq.Again

    def _answered(self, answer: messages.Answer) -> None:
        assert self.due[answer.id] > 0, f"command {answer.id} has more answers than it may"
        self.due[answer.id] -= 1
        if not self.due[answer.id]:
            del self.due[answer.id]
        self.outcomes[f"{answer.outcome}:{answer.reason}"] += 1

    def get(self, option: int) -> int:
        """As a ZeroMQ socket."""
        assert option == zmq.EVENTS
        return self.poll(0, zmq.POLLIN | zmq.POLLOUT)

    def poll(self, _: int, flags: int = zmq.POLLIN) -> int:
        """As a ZeroMQ socket."""
        ready = (zmq.POLLIN if self.inbox else 0) | (zmq.POLLOUT if self.is_up else 0)
        return ready & flags

    def setsockopt(self, option: int, value: int) -> None:
        """As a ZeroMQ socket."""

    def connect(self, endpoint: str) -> None:
        """As a ZeroMQ socket."""

    def close(self, linger: int = 0) -> None:
        """As a ZeroMQ socket."""


def scripted_link(
    half: Callable[[], SchedulerHalf], clock: Callable[[], float], wall_clock: Callable[[], float]
) -> tuple[EngineLink, Wire]:
    """An engine's link, and the wire that it speaks into."""
    status: list[EngineStatus] = []

    def read() -> Any:
        if not status:
            status.append(EngineStatus(half(), "engine", "model", 0))
        return status[0]

    wire = Wire()
    # No threads of ZeroMQ's either: a life would wait for their end.
    context = SimpleNamespace(socket=lambda _: wire, term=lambda: None)
    with mock.patch.object(zmq, "Context", return_value=context):
        link = EngineLink(
            "inproc://nobody",
            engine_id="engine",
            hello=lambda: read().hello(),
            read_gauges=lambda: read().gauges(),
            block_tokens=16,
            clock=clock,
            wall_clock=wall_clock,
        )
    return link, wire
