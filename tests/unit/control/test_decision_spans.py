"""Spans of decisions, as a collector gets them: over OTLP, from a server that an engine reports to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvtier import link_messages as link
from kvtier.config_sources import ConfigError
from kvtier.control import control_settings, decision_spans
from tests.unit.control.control_host import Host, program
from tests.unit.control.otlp_collector import Collector, values

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
AT_S = 1_700_000_000.25


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv(decision_spans.PROTOCOL_VARIABLE, "http/protobuf")
    made = Collector()
    yield made
    made.close()


def started(request_id: str, **fields: Any) -> link.TurnStarted:
    return link.TurnStarted(
        at_s=AT_S, program=program(), request_id=request_id, turn=1, prompt_tokens=9, **fields
    )


def decided(request_id: str, **fields: Any) -> link.Decided:
    return link.Decided(
        at_s=AT_S,
        program=program(tenant="acme"),
        request_id=request_id,
        event="pause",
        action="pin",
        reason="worth_it",
        **fields,
    )


def test_a_decision_is_a_span_in_its_requests_trace(tmp_path: Path, collector: Collector) -> None:
    with Host(tmp_path, otlp_endpoint=collector.endpoint) as host:
        engine = host.engine()
        engine.join()
        engine.report(
            started("r1", trace=HEADERS),
            decided(
                "r1",
                ttl_s=2.5,
                costs=[link.OptionCost("pin", 0.5), link.OptionCost("drop", 3.0)],
                inputs={"tool": "bash", "free_blocks": 7, "named": True, "gap_s": None},
            ),
            decided("nobody-knows"),
        )
    ours, other = collector.spans
    assert (ours.trace_id.hex(), ours.parent_span_id.hex()) == (TRACE, PARENT)
    assert ours.trace_state == "vendor=1"
    assert ours.name == "kvtier.pause"
    assert ours.start_time_unix_nano == ours.end_time_unix_nano == int(AT_S * 1e9)
    assert values(ours.attributes) == {
        "kvtier.engine_id": "engine-0",
        "kvtier.program": "agent",
        "kvtier.tenant": "acme",
        "kvtier.action": "pin",
        "kvtier.reason": "worth_it",
        "kvtier.ttl_s": 2.5,
        "kvtier.cost_s.pin": 0.5,
        "kvtier.cost_s.drop": 3.0,
        "kvtier.input.tool": "bash",
        "kvtier.input.free_blocks": 7,
        "kvtier.input.named": True,
        "gen_ai.request.id": "r1",
    }
    # A request without a trace has a span nevertheless, of a trace of its own.
    assert other.trace_id != ours.trace_id
    assert not other.parent_span_id
    assert all(r["service.name"] == "kvtier" for r in collector.resources)


@pytest.mark.parametrize("cause", ["ttl", "pressure", "handoff"])
def test_the_end_of_a_pin_is_a_span_in_the_trace_of_the_turn_that_it_kept(
    tmp_path: Path, collector: Collector, cause: str
) -> None:
    with Host(tmp_path, otlp_endpoint=collector.endpoint) as host:
        engine = host.engine()
        engine.join()
        engine.report(started("r1", trace=HEADERS), started("r2"))
        ended = link.PinEnded(
            at_s=AT_S, program=program(), request_id="r1", cause=cause, tokens=320
        )
        engine.report(ended)
    (span,) = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "kvtier.release"
    assert span.start_time_unix_nano == span.end_time_unix_nano == int(AT_S * 1e9)
    assert values(span.attributes) == {
        "kvtier.engine_id": "engine-0",
        "kvtier.program": "agent",
        "kvtier.action": "release",
        "kvtier.reason": cause,
        "kvtier.ttl_s": 0.0,
        "kvtier.input.tokens": 320,
        "gen_ai.request.id": "r1",
    }


def test_what_the_request_does_not_sample_is_not_sent_and_noise_is_no_trace(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "our-kvtier")
    with Host(tmp_path, otlp_endpoint=collector.endpoint) as host:
        engine = host.engine()
        engine.join()
        noise = {"traceparent": "00-zz-\x00", "tracestate": "=" * 1000}
        engine.report(started("r1", trace=UNSAMPLED), started("r2", trace=noise))
        engine.report(decided("r1"), decided("r2"))
    (span,) = collector.spans
    assert values(span.attributes)["gen_ai.request.id"] == "r2"
    assert [r["service.name"] for r in collector.resources] == ["our-kvtier"]


def test_the_oldest_traces_are_forgotten(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_spans, "MAX_TURNS", 2)
    with Host(tmp_path, otlp_endpoint=collector.endpoint) as host:
        engine = host.engine()
        engine.join()
        engine.report(*(started(f"r{i}", trace=HEADERS) for i in range(3)))
        engine.report(*(decided(f"r{i}") for i in range(3)))
    assert [span.trace_id.hex() == TRACE for span in collector.spans] == [False, True, True]


def test_a_collector_that_is_not_there_holds_up_neither_events_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decision_spans, "CLOSE_S", 0.05)
    with Host(tmp_path, otlp_endpoint="http://127.0.0.1:9") as host:
        engine = host.engine()
        engine.join()
        engine.report(decided("r1"))
        assert host.call(lambda: host.server.registry.history.last("acme", "agent", 1))
    # The server has ended while the exporter still tries.
    assert "could not be sent" in caplog.text


def test_an_unknown_protocol_leaves_the_server_serving_without_spans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(decision_spans.PROTOCOL_VARIABLE, "carrier-pigeon")
    with Host(tmp_path, otlp_endpoint="http://127.0.0.1:9") as host:
        host.engine().join()
    assert "accepted is grpc or http/protobuf" in caplog.text


def test_without_opentelemetry_the_setting_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = control_settings.Settings.load(
        {"kvtier": {"control_otlp_endpoint": "http://collector:4317"}}, {}
    )
    control_settings.check_files(settings)
    monkeypatch.setattr(control_settings, "_OPENTELEMETRY", ("opentelemetry.nothing.of.it",))
    with pytest.raises(ConfigError, match=r"control_otlp_endpoint=.*kvtier\[otel\]"):
        control_settings.check_files(settings)
