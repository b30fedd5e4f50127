"""What one tenant or whoever reaches the port may take of the server at a time."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvtier.control.api import call_gate
from kvtier.control.event_hub import MAX_WATCHERS
from kvtier.v1 import observability_pb2
from tests.unit.control.control_host import Client, Host, Refused, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ALL = "open-token-0123456789"
ACME, ACME_TOO, OTHER = "acme-token-0123456789", "acme-token-9876543210", "other-token-012345678"
STATUS = observability_pb2.GetStatusRequest()
WATCH = observability_pb2.WatchEventsRequest()
GET_STATUS = "/kvtier.v1.ObservabilityService/GetStatus"
CHECK = "/grpc.health.v1.Health/Check"
QUARTER = call_gate.MAX_CALLS // 4


@pytest.fixture(autouse=True)
def _requests_may_be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_gate, "REQUEST_S", 300.0)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Host]:
    path = tmp_path / "tokens"
    path.write_text(f"{ALL}\n{ACME} acme\n{ACME_TOO} acme\n{OTHER} other corp\n")
    path.chmod(0o600)
    with Host(tmp_path, listen="127.0.0.1:0", tokens_file=str(path)) as host:
        yield host


def with_token(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


@contextlib.contextmanager
def silent_calls(host: Host, path: str, count: int, token: str) -> Iterator[None]:
    """Calls that the server has let in, and whose requests have not come."""
    come = threading.Event()

    def request() -> Iterator[bytes]:
        come.wait(60)
        yield b""

    def running() -> int:
        return host.call(lambda: sum(host.server._grpc.gate._running.values()))

    before = running()
    call = host.channel(host.listening.tcp_target).stream_unary(path)
    futures = [
        call.future(request(), timeout=300, metadata=with_token(token)) for _ in range(count)
    ]
    try:
        wait_until(lambda: running() == before + count, "the calls have been let in")
        yield
    finally:
        come.set()
    for future in futures:
        future.result()
    wait_until(lambda: running() == before, "the calls have ended")


def status_of(host: Host, token: str) -> Any:
    client = Client(host.channel(host.listening.tcp_target))
    return client.observability.GetStatus(STATUS, timeout=20, metadata=with_token(token))


def watch(host: Host, token: str) -> Any:
    """A watcher of events whom the server has let in."""
    client = Client(host.channel(host.listening.tcp_target))
    stream = client.observability.WatchEvents(WATCH, timeout=60, metadata=with_token(token))
    stream.initial_metadata()
    return stream


def is_told_to_come_later(refused: Refused) -> bool:
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.details["RetryInfo"].retry_delay.seconds > 0
    return refused.reason == "TOO_MANY_CALLS_OF_TENANT"


def test_the_calls_of_one_tenant_leave_room_for_those_of_others(guarded: Host) -> None:
    half = QUARTER // 2
    with (
        silent_calls(guarded, GET_STATUS, half, ACME),
        silent_calls(guarded, GET_STATUS, QUARTER - half, ACME_TOO),
    ):
        for token in (ACME, ACME_TOO):
            refused = Refused(lambda token=token: status_of(guarded, token))  # type: ignore[misc]
            assert is_told_to_come_later(refused)
        status_of(guarded, OTHER)
        status_of(guarded, ALL)
        guarded.client.observability.GetStatus(STATUS)
    status_of(guarded, ACME)
    assert not guarded.server._grpc.gate._held


def test_an_operators_token_has_no_share_to_keep_to(guarded: Host) -> None:
    with silent_calls(guarded, GET_STATUS, QUARTER, ALL):
        status_of(guarded, ALL)


def test_the_watchers_of_one_tenant_leave_room_for_those_of_others(guarded: Host) -> None:
    streams = [watch(guarded, (ACME, ACME_TOO)[i % 2]) for i in range(MAX_WATCHERS // 4)]
    assert is_told_to_come_later(Refused(lambda: next(watch(guarded, ACME))))
    theirs = watch(guarded, OTHER)
    # Who watches may call.
    status_of(guarded, ACME)
    streams.pop().cancel()
    wait_until(lambda: len(guarded.server.hub) == MAX_WATCHERS // 4, "the watcher is gone")
    streams.append(watch(guarded, ACME))
    wait_until(lambda: len(guarded.server.hub) == MAX_WATCHERS // 4 + 1, "there is room again")
    for stream in (*streams, theirs):
        stream.cancel()


def test_the_share_is_a_setting_and_one_call_is_always_let_in(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{ACME} acme\n")
    path.chmod(0o600)
    for share, calls, streams in ((0.0, 1, 1), (1.0, call_gate.MAX_CALLS, MAX_WATCHERS)):
        with Host(
            tmp_path, listen="127.0.0.1:0", tokens_file=str(path), tenant_share=share
        ) as host:
            status_of(host, ACME)
            assert host.server._grpc.gate._shares == {"calls": calls, "streams": streams}


def test_where_no_token_is_needed_nobody_has_a_share(host: Host) -> None:
    streams = []
    for _ in range(MAX_WATCHERS):
        streams.append(host.client.observability.WatchEvents(WATCH))
        streams[-1].initial_metadata()
    host.client.observability.GetStatus(STATUS)
    assert len(host.server.hub) == MAX_WATCHERS
    for stream in streams:
        stream.cancel()


def test_who_asks_for_health_without_a_token_keeps_out_no_call_with_one(guarded: Host) -> None:
    stub: Any = health_pb2_grpc.HealthStub(guarded.channel(guarded.listening.tcp_target))
    request = health_pb2.HealthCheckRequest()
    with silent_calls(guarded, CHECK, call_gate.MAX_HEALTH_CALLS, "nobody's"):
        refused = Refused(lambda: stub.Check(request))
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "TOO_MANY_CALLS",
        )
        guarded.call(lambda: guarded.server._grpc.gate._limits.update(calls=1))
        status_of(guarded, ACME)
    assert stub.Check(request).status == 1
