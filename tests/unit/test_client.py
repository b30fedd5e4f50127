"""The client: what it sends, what it makes of the answers, and when it asks again."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from kvtier import client as front
from kvtier.client import (
    AsyncKVTierClient,
    Connection,
    ControlError,
    DeadlineExceeded,
    InvalidArgument,
    KVTierClient,
    Lost,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from kvtier.client.retries import FIRST_DELAY_S, RETRIES, Attempts
from kvtier.v1 import observability_pb2, program_pb2
from tests.unit.client_calls import CALLS
from tests.unit.scripted_control import SERVICES, Failure, ScriptedControl, on_unix_socket, time_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.client.retries.FIRST_DELAY_S", 0.001)


@pytest.fixture
def server() -> Iterator[ScriptedControl]:
    with on_unix_socket() as server:
        yield server


@pytest.fixture
def client(server: ScriptedControl) -> Iterator[KVTierClient]:
    with KVTierClient(server.target) as client:
        yield client


# -- every call ------------------------------------------------------------------------------------


def test_there_is_a_call_for_every_method_of_the_api() -> None:
    assert set(CALLS) == {m.name for service in SERVICES.values() for m in service.methods}


@pytest.mark.parametrize("method", [name for name in CALLS if name != "WatchEvents"])
def test_each_call_reaches_its_method(
    method: str, client: KVTierClient, server: ScriptedControl
) -> None:
    CALLS[method][0](client)
    assert [call.method for call in server.asked] == [method]


def test_threads_that_call_first_at_the_same_time_share_a_channel(
    client: KVTierClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[grpc.Channel] = []
    second = threading.Thread(target=client.get_status)
    insecure_channel = grpc.insecure_channel

    def slowly(*given: Any) -> grpc.Channel:
        if threading.current_thread() is not second:
            # The second one calls while the first one opens, and waits for that.
            second.start()
            second.join(0.3)
        opened.append(insecure_channel(*given))
        return opened[-1]

    monkeypatch.setattr(grpc, "insecure_channel", slowly)
    client.get_status()
    second.join(20)
    assert len(opened) == 1


@pytest.mark.parametrize("method", list(CALLS))
def test_only_what_is_idempotent_is_sent_again(
    method: str, client: KVTierClient, server: ScriptedControl
) -> None:
    call, idempotent = CALLS[method]
    server.script[method] = [[UNAVAILABLE]] if method == "WatchEvents" else [UNAVAILABLE]
    with pytest.raises(Unavailable, match="scripted"):
        call(client)
    assert len(server.requests(method)) == (1 + RETRIES if idempotent else 1)


def test_both_clients_have_the_same_calls() -> None:
    def calls(kind: type) -> dict[str, list[inspect.Parameter]]:
        # Annotations differ where one is an iterator and the other an asynchronous one.
        return {
            name: [p.replace(annotation=None) for p in inspect.signature(f).parameters.values()]
            for name, f in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert calls(KVTierClient) == calls(AsyncKVTierClient)


def test_the_front_offers_every_record_and_error() -> None:
    defined = {
        name
        for module in ("records", "errors")
        for name, value in vars(sys.modules[f"kvtier.client.{module}"]).items()
        if inspect.isclass(value) and value.__module__ == f"kvtier.client.{module}"
    }
    assert defined <= set(front.__all__)


def test_no_engine_is_imported() -> None:
    code = "import sys, kvtier.client; print([m for m in ('vllm', 'torch') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert shown.stdout.strip() == "[]"


# -- retries and timeouts --------------------------------------------------------------------------


def test_a_call_succeeds_when_the_server_is_there_again(
    client: KVTierClient, server: ScriptedControl
) -> None:
    answer = observability_pb2.GetStatusResponse(version="7")
    server.script["GetStatus"] = [UNAVAILABLE, UNAVAILABLE, answer]
    assert client.get_status().version == "7"


def test_retries_outlast_the_longest_wait_before_a_channel_connects_again() -> None:
    backoff_s = dict(Connection.resolve("/x").options())["grpc.max_reconnect_backoff_ms"] / 1000
    # Half of a wait may be left out at random; gRPC's own wait may be a fifth longer.
    assert sum(0.5 * FIRST_DELAY_S * 2**n for n in range(RETRIES)) > 1.2 * backoff_s


def test_a_client_does_not_wait_because_another_one_has_failed() -> None:
    with on_unix_socket() as server:
        server.stop()
        with KVTierClient(server.target) as failed, KVTierClient(server.target) as fresh:
            with pytest.raises(Unavailable):
                failed.get_status()
            again = ScriptedControl(server.target)
            fresh.calibrate()
            again.stop()


def test_a_client_outlives_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.client.retries.FIRST_DELAY_S", 0.1)
    with on_unix_socket() as server, KVTierClient(server.target) as client:
        client.get_status()
        server.stop()
        with pytest.raises(Unavailable):
            client.get_status()
        again = ScriptedControl(server.target)
        client.get_status()
        again.stop()


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN]
)
def test_other_failures_are_final(
    code: grpc.StatusCode, client: KVTierClient, server: ScriptedControl
) -> None:
    server.script["GetStatus"] = [Failure(code)]
    with pytest.raises(ControlError):
        client.get_status()
    assert len(server.asked) == 1


def test_a_repeated_announcement_has_the_same_id_and_the_next_one_another(
    client: KVTierClient, server: ScriptedControl
) -> None:
    done = program_pb2.AnnounceToolCallResponse()
    server.script["AnnounceToolCall"] = [UNAVAILABLE, UNAVAILABLE, done]
    client.announce_tool_call("p", "bash")
    client.announce_tool_call("p", "bash")
    first, *repeated, other = [r.request_id for r in server.requests("AnnounceToolCall")]
    assert repeated == [first, first]
    assert first
    assert other not in {"", first}


def test_the_retries_of_a_call_share_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])
    attempts = Attempts(5.0, retry=True)
    assert attempts.left_s() == 5.0
    now_s[0] += 4.0
    assert attempts.left_s() == 1.0
    assert attempts.delay_after(Unavailable("no")) is not None
    now_s[0] += 4.0
    assert attempts.left_s() == 0.0
    assert attempts.delay_after(Unavailable("no")) is None


def test_each_wait_is_about_twice_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.client.retries.FIRST_DELAY_S", 0.1)
    attempts = Attempts(5.0, retry=True)
    waits = [attempts.delay_after(Unavailable("no")) or 0.0 for _ in range(RETRIES)]
    assert all(
        0.5 * longest <= w <= longest for w, longest in zip(waits, (0.1, 0.2, 0.4), strict=True)
    )
    assert attempts.delay_after(Unavailable("no")) is None


def test_no_try_begins_after_the_timeout(client: KVTierClient, server: ScriptedControl) -> None:
    wait = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=60))
    server.script["GetStatus"] = [Failure(grpc.StatusCode.UNAVAILABLE, details=[wait])]
    with pytest.raises(Unavailable) as caught:
        client.get_status()
    assert caught.value.retry_after_s == 60
    assert len(server.asked) == 1


def test_the_timeout_is_the_clients_or_the_calls(server: ScriptedControl) -> None:
    with KVTierClient(server.target, timeout_s=9000) as client:
        client.get_status()
        client.get_status(timeout_s=900)
    with KVTierClient(server.target) as client:
        client.get_status()
    first, second, default = (call.time_left_s or 0.0 for call in server.asked)
    assert first > 1000 > second > 100
    assert default < 6


def test_a_silent_server_is_a_deadline_exceeded(
    client: KVTierClient, server: ScriptedControl
) -> None:
    over = threading.Event()
    server.script["GetStatus"] = [lambda _: over.wait()]
    with pytest.raises(DeadlineExceeded):
        client.get_status(timeout_s=0.05)
    over.set()


# -- errors ----------------------------------------------------------------------------------------


def test_an_errors_details_are_decoded(client: KVTierClient, server: ScriptedControl) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation
    server.script["PinProgram"] = [
        Failure(
            grpc.StatusCode.INVALID_ARGUMENT,
            "two fields are wrong",
            [
                error_details_pb2.BadRequest(
                    field_violations=[
                        violation(field="ttl", description="at most 7 days"),
                        violation(field="name", description="must not be empty"),
                        violation(field="name", description="must be text"),
                    ]
                ),
                error_details_pb2.ErrorInfo(reason="BAD", domain="kvtier", metadata={"a": "b"}),
            ],
        )
    ]
    with pytest.raises(InvalidArgument) as caught:
        client.pin_program("", 1e9)
    error = caught.value
    assert error.code == "INVALID_ARGUMENT"
    assert error.message == "two fields are wrong"
    assert error.fields == {"ttl": "at most 7 days", "name": "must not be empty; must be text"}
    assert (error.reason, error.metadata) == ("BAD", {"a": "b"})
    assert str(error) == (
        "two fields are wrong; ttl: at most 7 days; name: must not be empty; must be text"
    )


def test_what_the_message_says_already_is_not_said_again(
    client: KVTierClient, server: ScriptedControl
) -> None:
    detail = error_details_pb2.BadRequest(
        field_violations=[{"field": "ttl", "description": "at most 7 days"}]
    )
    message = "ttl: at most 7 days"
    server.script["PinProgram"] = [Failure(grpc.StatusCode.INVALID_ARGUMENT, message, [detail])]
    with pytest.raises(InvalidArgument) as caught:
        client.pin_program("p", 1e9)
    assert str(caught.value) == message
    assert caught.value.fields == {"ttl": "at most 7 days"}


def test_preconditions_and_quotas_are_fields_by_subject(
    client: KVTierClient, server: ScriptedControl
) -> None:
    server.script["PinProgram"] = [
        Failure(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            details=[
                error_details_pb2.QuotaFailure(violations=[{"subject": "a", "description": "b"}]),
                error_details_pb2.PreconditionFailure(
                    violations=[{"subject": "c", "description": "d"}]
                ),
            ],
        )
    ]
    with pytest.raises(front.ResourceExhausted) as caught:
        client.pin_program("p", 1)
    assert caught.value.fields == {"a": "b", "c": "d"}


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_code_has_its_error(
    code: grpc.StatusCode, client: KVTierClient, server: ScriptedControl
) -> None:
    if code is grpc.StatusCode.OK:
        return
    server.script["ReleaseProgram"] = [Failure(code, "no")]
    with pytest.raises(ControlError, match="no") as caught:
        client.release_program("p")
    assert caught.value.code == code.name
    named = getattr(front, code.name.title().replace("_", ""), ControlError)
    assert type(caught.value) is named


def test_details_that_nobody_can_read_are_left_out(
    client: KVTierClient, server: ScriptedControl
) -> None:
    failure = Failure(grpc.StatusCode.NOT_FOUND, "no such program")
    status = failure.status()
    garbage = status._replace(trailing_metadata=(("grpc-status-details-bin", b"\xff\xff"),))
    failure.status = lambda: garbage  # type: ignore[method-assign]
    server.script["GetProgram"] = [failure]
    with pytest.raises(NotFound, match="no such program") as caught:
        client.get_program("p")
    assert caught.value.fields == {}


# -- token -----------------------------------------------------------------------------------------


def test_the_token_is_read_at_each_call(server: ScriptedControl, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one\n")
    with KVTierClient(server.target, token_file=file) as client:
        client.get_status()
        file.write_text("two")
        client.get_status()
    assert [c.metadata["authorization"] for c in server.asked] == ["Bearer one", "Bearer two"]


def test_a_wrong_token_is_told(server: ScriptedControl, client: KVTierClient) -> None:
    server.script["GetStatus"] = [Failure(grpc.StatusCode.UNAUTHENTICATED, "a token is needed")]
    with pytest.raises(Unauthenticated, match="a token is needed"):
        client.get_status()


# -- watching --------------------------------------------------------------------------------------


def test_a_watch_yields_events_and_what_was_lost(
    client: KVTierClient, server: ScriptedControl
) -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    event = observability_pb2.Event(
        kind="decision", engine_id="e0", happened_at=time_of(at), name="p", tenant="t",
        request_id="r", decision=observability_pb2.Decision(action="pin"), fields={"a": "b"},
    )  # fmt: skip
    server.script["WatchEvents"] = [
        [
            observability_pb2.WatchEventsResponse(event=event),
            observability_pb2.WatchEventsResponse(),  # of a newer server
            observability_pb2.WatchEventsResponse(lost=3),
        ]
    ]
    with client.watch(kinds=["decision"], name="p", tenant="t") as watch:
        first, second = next(watch), next(watch)
    assert isinstance(first, front.Event)
    assert (first.kind, first.happened_at, first.name, first.fields) == (
        "decision", at, "p", {"a": "b"},
    )  # fmt: skip
    assert first.decision is not None
    assert first.decision.action == "pin"
    assert second == Lost(3)
    assert server.requests("WatchEvents") == [
        observability_pb2.WatchEventsRequest(kinds=["decision"], name="p", tenant="t")
    ]
    assert server.watch_ended.wait(10)


def test_a_watch_says_when_it_has_started(client: KVTierClient, server: ScriptedControl) -> None:
    may_start = threading.Event()
    server.script["WatchEvents"] = [lambda _: may_start.wait() and []]
    watch = client.watch()
    threading.Timer(0.05, may_start.set).start()
    watch.wait_started()
    assert may_start.is_set()
    server.script["WatchEvents"] = [[UNAVAILABLE]]
    failing = client.watch()
    failing.wait_started()
    with pytest.raises(Unavailable):
        next(failing)


def test_a_watch_ends_when_another_thread_closes_it(
    client: KVTierClient, server: ScriptedControl
) -> None:
    server.script["WatchEvents"] = [[observability_pb2.WatchEventsResponse(lost=1)]]
    watch = client.watch()
    assert next(watch) == Lost(1)
    closer = threading.Thread(target=watch.close)
    closer.start()
    assert list(watch) == []
    closer.join()


def test_a_watch_fails_when_the_server_goes_away(
    client: KVTierClient, server: ScriptedControl
) -> None:
    lost = observability_pb2.WatchEventsResponse(lost=1)
    server.script["WatchEvents"] = [[lost, UNAVAILABLE]]
    watch = client.watch()
    assert next(watch) == Lost(1)
    with pytest.raises(Unavailable):
        next(watch)
    assert len(server.asked) == 1
