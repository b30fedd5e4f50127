"""The client for asyncio does what its twin does."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from kvtier.client import AsyncKVTierClient, Lost, NotFound, TtlScope, Unavailable
from kvtier.client.retries import RETRIES
from kvtier.v1 import observability_pb2, program_pb2, ttl_pb2
from tests.unit.client_calls import CALLS
from tests.unit.scripted_control import Failure, ScriptedControl, on_unix_socket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE)
LOST = observability_pb2.WatchEventsResponse(lost=1)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.client.retries.FIRST_DELAY_S", 0.001)


@pytest.fixture
def server() -> Iterator[ScriptedControl]:
    with on_unix_socket() as server:
        yield server


def run(server: ScriptedControl, use: Callable[[AsyncKVTierClient], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with AsyncKVTierClient(server.target) as client:
            return await use(client)

    return asyncio.run(main())


@pytest.mark.parametrize("method", [name for name in CALLS if name != "WatchEvents"])
def test_each_call_reaches_its_method_and_is_repeated_if_it_may_be(
    method: str, server: ScriptedControl
) -> None:
    call: Any
    call, idempotent = CALLS[method]
    run(server, call)
    server.script[method] = [UNAVAILABLE]
    with pytest.raises(Unavailable):
        run(server, call)
    assert [c.method for c in server.asked] == [method] * (2 + RETRIES if idempotent else 2)


def test_a_client_may_be_made_before_the_loop_runs(server: ScriptedControl) -> None:
    client = AsyncKVTierClient(server.target)

    async def use() -> None:
        await client.get_status()
        await client.close()

    asyncio.run(use())


def test_errors_are_decoded(server: ScriptedControl) -> None:
    server.script["GetProgram"] = [Failure(grpc.StatusCode.NOT_FOUND, "no such program")]
    with pytest.raises(NotFound, match="no such program"):
        run(server, lambda c: c.get_program("p"))


def test_pages_are_followed_to_the_last(server: ScriptedControl) -> None:
    server.script["ListPrograms"] = [
        program_pb2.ListProgramsResponse(programs=[{"name": "p"}], next_page_token="n"),
        program_pb2.ListProgramsResponse(programs=[{"name": "q"}]),
    ]
    tool = ttl_pb2.TtlOverride(scope=ttl_pb2.TtlScope(tool="bash"))
    server.script["ListTtlOverrides"] = [
        ttl_pb2.ListTtlOverridesResponse(overrides=[tool], next_page_token="n"),
        ttl_pb2.ListTtlOverridesResponse(overrides=[tool]),
    ]

    async def use(client: AsyncKVTierClient) -> None:
        assert [p.name async for p in client.iter_programs(states=["paused"])] == ["p", "q"]
        scopes = [o.scope async for o in client.iter_ttl_overrides()]
        assert scopes == [TtlScope.of_tool("bash")] * 2

    run(server, use)
    assert [c.request.page_token for c in server.asked] == ["", "n", "", "n"]


def test_a_watch_yields_what_comes_until_it_is_closed(server: ScriptedControl) -> None:
    empty = observability_pb2.WatchEventsResponse()
    server.script["WatchEvents"] = [[LOST, empty, LOST]]

    async def use(client: AsyncKVTierClient) -> list[Any]:
        seen = []
        async with client.watch(kinds=["decision"]) as watch:
            async for item in watch:
                seen.append(item)
                if len(seen) == 2:
                    # Closed while it waits for more.
                    asyncio.get_running_loop().call_soon(watch.close)
        return seen

    assert run(server, use) == [Lost(1), Lost(1)]
    assert server.watch_ended.wait(10)


def test_a_watch_says_when_it_has_started(server: ScriptedControl) -> None:
    may_start = threading.Event()
    server.script["WatchEvents"] = [lambda _: may_start.wait() and []]

    async def use(client: AsyncKVTierClient) -> None:
        watch = client.watch()
        threading.Timer(0.05, may_start.set).start()
        await watch.wait_started()
        assert may_start.is_set()
        server.script["WatchEvents"] = [[UNAVAILABLE]]
        failing = client.watch()
        await failing.wait_started()
        with pytest.raises(Unavailable):
            await anext(failing)

    run(server, use)


def test_a_watch_fails_when_the_server_goes_away(server: ScriptedControl) -> None:
    server.script["WatchEvents"] = [[LOST, UNAVAILABLE]]

    async def use(client: AsyncKVTierClient) -> None:
        watch = client.watch()
        assert await anext(watch) == Lost(1)
        with pytest.raises(Unavailable):
            await anext(watch)

    run(server, use)


def test_a_cancelled_watcher_is_cancelled(server: ScriptedControl) -> None:
    server.script["WatchEvents"] = [[LOST]]

    async def use(client: AsyncKVTierClient) -> None:
        watch = client.watch()
        assert await anext(watch) == Lost(1)
        task = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(server, use)
