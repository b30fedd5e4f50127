"""Who may call: tokens, on which address."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvtier.control.api.grpc_server import MAX_RPCS
from kvtier.v1 import observability_pb2, program_pb2
from tests.unit.control.access_cases import OPEN, STATUS, over_tcp, with_token
from tests.unit.control.control_host import (
    Host,
    Refused,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "Bearer wrong-token-0123456789")],
        [("authorization", f"Basic {OPEN}")],
        [("authorization", OPEN)],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {OPEN}"), ("authorization", f"Bearer {OPEN}")],
        [("authorization", f"Bearer {OPEN[:-1]}")],
    ],
)
def test_without_a_token_or_with_a_wrong_one_no_call_is_served(
    guarded: Host, metadata: list[tuple[str, str]]
) -> None:
    client = over_tcp(guarded)
    calls = (
        lambda: client.observability.GetStatus(STATUS, metadata=metadata),
        lambda: client.programs.ListPrograms(
            program_pb2.ListProgramsRequest(page_size=-1), metadata=metadata
        ),
        lambda: next(
            client.observability.WatchEvents(
                observability_pb2.WatchEventsRequest(), metadata=metadata
            )
        ),
    )
    for call in calls:
        refused = Refused(call)
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "TOKEN_NEEDED",
        )
        assert OPEN[:-1] not in refused.message


def test_a_token_serves_on_tcp_and_none_is_needed_on_the_unix_socket(guarded: Host) -> None:
    over_tcp(guarded).observability.GetStatus(STATUS, **with_token(OPEN))
    lower = [("authorization", f"bearer {OPEN}")]
    over_tcp(guarded).observability.GetStatus(STATUS, metadata=lower)
    guarded.client.observability.GetStatus(STATUS)


def test_who_has_no_token_is_refused_before_a_request_has_come(guarded: Host) -> None:
    refused = threading.Event()

    def silent() -> Iterator[bytes]:
        refused.wait(60)
        yield b""

    channel = guarded.channel(guarded.listening.tcp_target)
    # The headers alone, as many as the server takes calls.
    path = "/kvtier.v1.ObservabilityService/GetStatus"
    strangers = [channel.stream_unary(path).future(silent(), timeout=20) for _ in range(MAX_RPCS)]
    try:
        codes = {stranger.code() for stranger in strangers}
        guarded.client.observability.GetStatus(STATUS, timeout=20)
    finally:
        refused.set()
    assert codes == {grpc.StatusCode.UNAUTHENTICATED}


def test_health_is_told_without_a_token_as_probes_have_none(guarded: Host) -> None:
    stub = health_pb2_grpc.HealthStub(guarded.channel(guarded.listening.tcp_target))
    assert stub.Check(health_pb2.HealthCheckRequest()).status == 1


def test_tokens_are_read_again_when_the_file_has_changed(
    guarded: Host, tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = over_tcp(guarded)
    client.observability.GetStatus(STATUS, **with_token(OPEN))
    new = "new-token-0123456789"
    tokens.write_text(f"{new}\n")
    client.observability.GetStatus(STATUS, **with_token(new))
    refused = Refused(lambda: client.observability.GetStatus(STATUS, **with_token(OPEN)))
    assert refused.code == grpc.StatusCode.UNAUTHENTICATED
    # A file that others may read is no secret any more.
    tokens.chmod(0o644)
    for _ in range(3):
        refused = Refused(lambda: client.observability.GetStatus(STATUS, **with_token(new)))
        assert refused.code == grpc.StatusCode.UNAUTHENTICATED
    assert caplog.text.count("no token is accepted") == 1
    assert new not in caplog.text
    tokens.chmod(0o640)
    client.observability.GetStatus(STATUS, **with_token(new))
    tokens.unlink()
    refused = Refused(lambda: client.observability.GetStatus(STATUS, **with_token(new)))
    assert refused.code == grpc.StatusCode.UNAUTHENTICATED
