"""An engine's end of the control link against a real ZeroMQ ROUTER, with a real scheduler half behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import zmq

from kvtier import link_messages as messages
from kvtier.control import engine_picture
from kvtier.control.engine_status import EngineStatus
from kvtier.control.link import EngineLink
from tests.unit.fake_vllm import BLOCK_TOKENS
from tests.unit.mini_engine import MiniEngine
from tests.unit.program_cases import prompt, turn

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

UNIX_S = 1_700_000_000.0
Kind = TypeVar("Kind")


class Server:
    """The other end; bound when the test says so."""

    def __init__(self, path: Path) -> None:
        self.endpoint = f"ipc://{path}"
        self._context = zmq.Context()
        self._socket: Any = None
        self._peer = b""

    def bind(self) -> None:
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.endpoint)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    def send(self, message: Any) -> None:
        frame = message if isinstance(message, bytes) else messages.encoder.encode(message)
        self._socket.send_multipart([self._peer, frame])

    def next(self) -> Any:
        assert self._socket.poll(10_000), "the engine says nothing"
        self._peer, frame = self._socket.recv_multipart()
        return messages.server_decoder.decode(frame)

    def all(self) -> list[Any]:
        """What has come until nothing comes any more: ZeroMQ keeps the order of a peer's messages."""
        found = []
        while self._socket.poll(200):
            found.append(self.next())
        return found


class Rig:
    """A small engine with a real link to `server`."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.revived = 0
        status: list[EngineStatus] = []
        self.link = EngineLink(
            server.endpoint,
            engine_id="engine",
            hello=lambda: status[0].hello(),  # noqa: PLW0108 - it comes later
            read_gauges=lambda: status[0].gauges(),  # noqa: PLW0108
            block_tokens=BLOCK_TOKENS,
            clock=lambda: self.engine.now_s,
            revive=self._revive,
            wall_clock=lambda: UNIX_S + self.engine.now_s,
        )
        self.engine = MiniEngine(link=self.link)
        status.append(EngineStatus(self.engine.half, "engine", "a-model", dp_rank=0))
        self.hello = status[0].hello

    def _revive(self) -> None:
        self.revived += 1

    def until(self, kind: type[Kind]) -> Kind:
        """Run hooks until the server gets such a message; the connection takes a moment."""
        for _ in range(500):
            self.engine.now_s += 1.1
            self.engine.wake()
            while self.server._socket.poll(20):
                message = self.server.next()
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__}")

    def follow(self) -> messages.Programs:
        """The server meets the engine, and asks for all it knows."""
        self.until(messages.EngineHello)
        self.server.send(messages.Resync())
        return self.until(messages.Programs)

    def wake_until(self, condition: Any) -> None:
        for _ in range(500):
            self.engine.now_s += 0.1
            self.engine.wake()
            if condition():
                return
            self.server._socket.poll(10)
        raise AssertionError("it never happened")


def pause_an_agent(rig: Rig, server: Server) -> None:
    """Its turn has ended, and the server knows it."""
    server.bind()
    rig.engine.run(turn("r1", prompt(30), session="agent"))
    rig.follow()
    server.all()


def events(found: list[Any]) -> list[messages.Event]:
    reports = [m.report if isinstance(m, messages.Answered) else m for m in found]
    return [event for r in reports if isinstance(r, messages.Report) for event in r.events]


def many(rig: Rig, n_programs: int) -> None:
    """So many programs pause."""
    for i in range(n_programs):
        rig.engine.run(turn(f"r{i}", prompt(8, i), session=f"agent-{i}", hints={"pin": False}))


def follow_in_pages(
    rig: Rig, n_programs: int, page_programs: int, monkeypatch: pytest.MonkeyPatch
) -> messages.Programs:
    """A server follows an engine with so many paused programs; the first page."""
    monkeypatch.setattr(engine_picture, "PAGE_PROGRAMS", page_programs)
    many(rig, n_programs)
    rig.server.bind()
    return rig.follow()


def names(pages: list[messages.Programs]) -> list[str]:
    """The programs that pages tell of."""
    return [state.program.name for page in pages for state in page.programs]
