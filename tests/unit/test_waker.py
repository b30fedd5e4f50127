"""The waker: what it tells the control server, whom it wakes, and that vLLM never notices it."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import zmq
import zmq.asyncio

from kvtier import middleware
from kvtier.control import waker as waker_module
from kvtier.control.waker import REQUEST_PREFIX, Waker
from kvtier.link_messages import (
    ALL_RANKS,
    SOCKET_NAME,
    Resync,
    Wake,
    WakerHello,
    encoder,
    server_decoder,
)
from kvtier.middleware import KVTierMiddleware

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

WAIT_S = 30.0


def run(scenario: Coroutine[Any, Any, Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario, WAIT_S))


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: the name of a Unix socket has little room."""
    with tempfile.TemporaryDirectory(prefix="kvt") as path:
        yield Path(path)


class Engine:
    """Stands for vLLM's engine client."""

    def __init__(self, ranks: list[int] | None = None, error: Exception | None = None) -> None:
        self.calls: asyncio.Queue[tuple[str, Any, int | None]] = asyncio.Queue()
        self.error = error
        if ranks is not None:
            self.engine_core = SimpleNamespace(engine_ranks_managed=ranks)

    async def notify_kv_transfer_request_rejected(
        self,
        request_id: str,
        kv_transfer_params: dict[str, Any],
        *,
        data_parallel_rank: int | None = None,
    ) -> None:
        self.calls.put_nowait((request_id, kv_transfer_params, data_parallel_rank))
        if self.error is not None:
            raise self.error


class Server:
    """Stands for the control server."""

    def __init__(self, run_dir: Path) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        path = run_dir / SOCKET_NAME
        path.unlink(missing_ok=True)
        self._socket.bind(f"ipc://{path}")

    async def hello(self) -> tuple[bytes, WakerHello]:
        identity, frame = await self._socket.recv_multipart()
        hello = server_decoder.decode(frame)
        assert isinstance(hello, WakerHello)
        return identity, hello

    async def send(self, identity: bytes, *frames: bytes) -> None:
        for frame in frames:
            await self._socket.send_multipart([identity, frame])

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@asynccontextmanager
async def waking(run_dir: Path, engine: Any, hello_interval_s: float = 0.05) -> AsyncIterator[None]:
    waker = Waker(engine, f"ipc://{run_dir / SOCKET_NAME}", hello_interval_s=hello_interval_s)
    waker.start()
    waker.start()
    try:
        yield
    finally:
        await waker.stop()
        await waker.stop()


@asynccontextmanager
async def serving(run_dir: Path) -> AsyncIterator[Server]:
    server = Server(run_dir)
    try:
        yield server
    finally:
        server.close()


def wake(dp_rank: int) -> bytes:
    return encoder.encode(Wake(dp_rank=dp_rank))


def test_it_says_who_it_is_and_wakes_the_engine(run_dir: Path) -> None:
    async def scenario() -> None:
        engine = Engine()
        async with serving(run_dir) as server, waking(run_dir, engine):
            identity, hello = await server.hello()
            assert (hello.pid, hello.parent_pid) == (os.getpid(), os.getppid())
            await server.send(identity, wake(0))
            request_id, params, rank = await engine.calls.get()
            assert request_id.startswith(REQUEST_PREFIX)
            assert params == {"kvtier": {"wake": True}}
            # Without data parallelism vLLM takes no rank.
            assert rank is None

    run(scenario())


def test_every_wake_has_an_id_of_its_own(run_dir: Path) -> None:
    async def scenario() -> None:
        engine = Engine()
        async with serving(run_dir) as server, waking(run_dir, engine):
            identity, _ = await server.hello()
            ids = set()
            for _ in range(3):
                await server.send(identity, wake(0))
                ids.add((await engine.calls.get())[0])
            assert len(ids) == 3

    run(scenario())


@pytest.mark.parametrize(
    ("managed", "dp_rank", "index"), [([0, 1, 2], 2, 2), ([4, 5], 5, 1), ([3], 3, None)]
)
def test_a_rank_is_told_as_this_process_counts_engines(
    run_dir: Path, managed: list[int], dp_rank: int, index: int | None
) -> None:
    async def scenario() -> None:
        engine = Engine(managed)
        async with serving(run_dir) as server, waking(run_dir, engine):
            identity, _ = await server.hello()
            await server.send(identity, wake(dp_rank))
            assert (await engine.calls.get())[2] == index

    run(scenario())


@pytest.mark.parametrize(("managed", "indices"), [([4, 5, 6], {0, 1, 2}), ([0], {None})])
def test_all_engines_of_a_process_can_be_woken(
    run_dir: Path, managed: list[int], indices: set[int | None]
) -> None:
    async def scenario() -> None:
        engine = Engine(managed)
        async with serving(run_dir) as server, waking(run_dir, engine):
            identity, _ = await server.hello()
            await server.send(identity, wake(ALL_RANKS))
            assert {(await engine.calls.get())[2] for _ in managed} == indices

    run(scenario())


def test_a_rank_of_another_process_is_not_woken(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        engine = Engine([0, 1])
        async with serving(run_dir) as server, waking(run_dir, engine):
            identity, _ = await server.hello()
            await server.send(identity, wake(7), wake(1))
            assert (await engine.calls.get())[2] == 1
            assert engine.calls.empty()

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert "rank 7 is not among [0, 1]" in caplog.text


def test_many_wakes_at_a_time_become_few(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand commands a second must not become a thousand requests."""
    monkeypatch.setattr(waker_module, "WAKE_INTERVAL_S", 0.1)

    async def scenario() -> None:
        engine = Engine([0, 1, 2])
        async with serving(run_dir) as server, waking(run_dir, engine):
            identity, _ = await server.hello()
            for _ in range(200):
                await server.send(identity, wake(0), wake(1))
                # The waker gets its turn after each.
                await asyncio.sleep(0.001)
            await server.send(identity, wake(2))
            ranks = []
            while 2 not in ranks:
                ranks.append((await engine.calls.get())[2])
            assert {0, 1} <= set(ranks)
            assert len(ranks) < 100

    run(scenario())


def test_a_server_that_starts_anew_learns_of_it(run_dir: Path) -> None:
    async def scenario() -> None:
        engine = Engine()
        async with waking(run_dir, engine):
            for _ in range(2):
                async with serving(run_dir) as server:
                    identity, _ = await server.hello()
                    await server.send(identity, wake(0))
                    await engine.calls.get()

    run(scenario())


def test_hellos_are_repeated_while_wakes_come(run_dir: Path) -> None:
    async def scenario() -> None:
        engine = Engine()
        async with serving(run_dir) as server, waking(run_dir, engine):
            for _ in range(3):
                identity, _ = await server.hello()
                await server.send(identity, wake(0))
                await engine.calls.get()

    run(scenario())


def test_an_engine_that_cannot_be_woken_is_told_once(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        engine = Engine(error=RuntimeError("dead"))
        async with serving(run_dir) as server, waking(run_dir, engine):
            identity, _ = await server.hello()
            for _ in range(3):
                await server.send(identity, wake(0))
                await engine.calls.get()

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert [record.getMessage() for record in caplog.records] == [
        "kvtier: an engine could not be woken: dead (said once)"
    ]


@pytest.mark.parametrize(
    "garbage", [b"", b"\xff", encoder.encode(Resync()), b"\x81\xa4type\xa4Wake"]
)
def test_what_it_does_not_understand_is_ignored(run_dir: Path, garbage: bytes) -> None:
    async def scenario() -> None:
        engine = Engine()
        async with serving(run_dir) as server, waking(run_dir, engine):
            identity, _ = await server.hello()
            await server.send(identity, garbage, wake(0))
            await engine.calls.get()

    run(scenario())


def test_a_path_that_no_socket_can_have_ends_the_waker_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        waker = Waker(Engine(), f"ipc://{tmp_path}/{'x' * 120}")
        waker.start()
        assert waker._task is not None
        await waker._task
        await waker.stop()

    with caplog.at_level(logging.ERROR):
        run(scenario())
    assert "kvtier's waker has ended" in caplog.text


# -- in the life of an application -----------------------------------------------------------------


class App:
    """Starts and shuts down as an ASGI application does."""

    def __init__(self, engine: Any = None, *, fails: bool = False) -> None:
        self.state = SimpleNamespace(**({} if engine is None else {"engine_client": engine}))
        self.fails = fails

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "lifespan.startup"
        if self.fails:
            await send({"type": "lifespan.startup.failed"})
            raise RuntimeError("no start")
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        self.tasks_at_shutdown = [task.get_name() for task in asyncio.all_tasks()]
        await send({"type": "lifespan.shutdown.complete"})


async def lifespan(app: App, during: Coroutine[Any, Any, None] | None = None) -> list[str]:
    sent: list[str] = []
    started = asyncio.Event()
    over = asyncio.Event()
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        message = next(messages)
        if message["type"] == "lifespan.shutdown":
            await over.wait()
        return message

    async def send(message: Any) -> None:
        sent.append(message["type"])
        started.set()

    scope = {"type": "lifespan", "app": app}
    task = asyncio.ensure_future(KVTierMiddleware(app)(scope, receive, send))
    await started.wait()
    if during is not None:
        await during
    over.set()
    await task
    return sent


COMPLETE = ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_the_waker_lives_from_start_to_shutdown(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTIER_RUN_DIR", str(run_dir))

    async def scenario() -> None:
        engine = Engine()
        app = App(engine)

        async def during() -> None:
            async with serving(run_dir) as server:
                identity, _ = await server.hello()
                await server.send(identity, wake(0))
                await engine.calls.get()

        assert await lifespan(app, during()) == COMPLETE
        # vLLM takes its engine away at the shutdown.
        assert "kvtier-waker" not in app.tasks_at_shutdown

    run(scenario())


def test_what_kvtier_says_joins_vllms_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's process may let warnings of others fall."""
    joined: list[int] = []
    monkeypatch.setattr(middleware, "join_vllms_log", lambda: joined.append(1))
    run(lifespan(App()))
    assert joined == [1]


def test_without_an_engine_there_is_no_waker() -> None:
    async def scenario() -> None:
        async def during() -> None:
            assert "kvtier-waker" not in {task.get_name() for task in asyncio.all_tasks()}

        assert await lifespan(App(), during()) == COMPLETE

    run(scenario())


def test_an_unsafe_run_directory_means_no_waker_and_vllm_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVTIER_RUN_DIR", str(tmp_path / "file"))

    async def scenario() -> None:
        assert await lifespan(App(Engine())) == COMPLETE

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert "kvtier cannot wake an idle engine" in caplog.text
    assert "set KVTIER_RUN_DIR to a private directory" in caplog.text


def test_an_application_that_does_not_start_leaves_no_waker(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTIER_RUN_DIR", str(run_dir))

    async def scenario() -> None:
        with pytest.raises(RuntimeError, match="no start"):
            await lifespan(App(Engine(), fails=True))
        assert "kvtier-waker" not in {task.get_name() for task in asyncio.all_tasks()}

    run(scenario())
