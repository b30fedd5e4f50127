"""`tool_call`: an agent goes on, whatever the control server does."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from kvtier.client import AsyncKVTierClient, KVTierClient
from tests.unit.scripted_control import Failure, ScriptedControl, on_unix_socket

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def server() -> Iterator[ScriptedControl]:
    with on_unix_socket() as server:
        yield server


@pytest.fixture
def client(server: ScriptedControl) -> Iterator[KVTierClient]:
    with KVTierClient(server.target) as client:
        yield client


def methods(server: ScriptedControl) -> list[str]:
    return [call.method for call in server.asked]


def test_call_and_return_are_announced(client: KVTierClient, server: ScriptedControl) -> None:
    with client.tool_call("p", "bash", expected_s=2, expected_p90_s=9, tenant="t"):
        assert methods(server) == ["AnnounceToolCall"]
    assert methods(server) == ["AnnounceToolCall", "AnnounceToolReturn"]
    called, returned = (call.request for call in server.asked)
    assert (called.name, called.tenant, called.tool) == ("p", "t", "bash")
    assert (called.quantiles.p50.seconds, called.quantiles.p90.seconds) == (2, 9)
    assert (returned.name, returned.tenant) == ("p", "t")
    assert returned.request_id not in {"", called.request_id}


def test_a_tool_that_fails_has_returned_too(client: KVTierClient, server: ScriptedControl) -> None:
    with pytest.raises(KeyError), client.tool_call("p", "bash"):
        raise KeyError
    assert methods(server) == ["AnnounceToolCall", "AnnounceToolReturn"]


def test_an_agent_that_is_stopped_does_not_return(
    client: KVTierClient, server: ScriptedControl
) -> None:
    with pytest.raises(KeyboardInterrupt), client.tool_call("p", "bash"):
        raise KeyboardInterrupt
    assert methods(server) == ["AnnounceToolCall"]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND])
def test_a_failed_announcement_is_logged_once_and_not_repeated(
    code: grpc.StatusCode,
    client: KVTierClient,
    server: ScriptedControl,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.script["AnnounceToolCall"] = server.script["AnnounceToolReturn"] = [Failure(code)]
    done = []
    with caplog.at_level(logging.DEBUG, "kvtier.client"):
        for _ in range(2):
            with client.tool_call("p", "bash"):
                done.append(1)
    assert done == [1, 1]
    assert len(server.asked) == 4
    assert [r.levelname for r in caplog.records] == ["WARNING", "DEBUG", "DEBUG", "DEBUG"]
    assert "the call of p was not announced, the agent goes on" in caplog.messages[0]
    assert "scripted" in caplog.messages[0]


def test_failures_are_a_warning_again_after_a_success(
    client: KVTierClient, server: ScriptedControl, caplog: pytest.LogCaptureFixture
) -> None:
    server.script["AnnounceToolCall"] = [Failure(grpc.StatusCode.INTERNAL)]
    for _ in range(2):
        with client.tool_call("p", "bash"):
            pass
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING"]


def test_neither_an_odd_number_nor_a_lost_token_stops_the_agent(
    server: ScriptedControl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with KVTierClient(server.target, token_file=tmp_path / "none") as client:
        with client.tool_call("p", "bash"):
            pass
        with client.tool_call("p", "bash", expected_s=float("nan")):
            pass
    assert "none: No such file" in caplog.text
    assert server.asked == []


@pytest.mark.parametrize(
    "call",
    [
        {"expected_s": "5"},
        {"expected_s": 1, "expected_p90_s": [9]},
        {"expected_s": 10**400},
        {"tool": 7},
        {"tenant": "\ud800"},
    ],
    ids=["text", "list", "huge", "tool", "surrogate"],
)
def test_values_of_wrong_types_do_not_stop_the_agent(
    call: dict[str, Any],
    client: KVTierClient,
    server: ScriptedControl,
    caplog: pytest.LogCaptureFixture,
) -> None:
    call = {"name": "p", "tool": "bash", **call}
    done = []
    with client.tool_call(**call):
        done.append("sync")

    async def run() -> None:
        async with AsyncKVTierClient(server.target) as other, other.tool_call(**call):
            done.append("async")

    asyncio.run(run())
    assert done == ["sync", "async"]
    assert "AnnounceToolCall" not in methods(server)
    assert caplog.text.count("the agent goes on") >= 2


def test_a_silent_server_holds_the_agent_up_for_a_second_at_most(
    client: KVTierClient, server: ScriptedControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.client.sync.ANNOUNCE_TIMEOUT_S", 0.05)
    over = threading.Event()
    server.script["AnnounceToolCall"] = [lambda _: over.wait()]
    with client.tool_call("p", "bash"):
        assert (server.asked[0].time_left_s or 1) < 1
    over.set()


def test_an_asynchronous_agent_goes_on_too(server: ScriptedControl) -> None:
    server.script["AnnounceToolCall"] = [Failure(grpc.StatusCode.UNAVAILABLE)]

    async def run() -> None:
        async with AsyncKVTierClient(server.target) as client:
            async with client.tool_call("p", "bash", expected_s=2):
                assert methods(server) == ["AnnounceToolCall"]
            with pytest.raises(KeyError):
                async with client.tool_call("p", "bash"):
                    raise KeyError

    asyncio.run(run())
    assert methods(server) == ["AnnounceToolCall", "AnnounceToolReturn"] * 2


def test_a_cancelled_task_ends_without_an_announcement(server: ScriptedControl) -> None:
    async def run() -> None:
        async with AsyncKVTierClient(server.target) as client:
            inside = asyncio.Event()

            async def agent() -> None:
                async with client.tool_call("p", "bash"):
                    inside.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(agent())
            await inside.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert methods(server) == ["AnnounceToolCall"]
