"""Decisions as OpenTelemetry spans, each in the trace of the request that it was made for.

The engine passes on a request's trace headers with the turn's start, and nothing else: spans are made here
from the events that come anyway, and a thread of OpenTelemetry's own sends them, so no step waits for a
collector. Who has not asked for spans does not need OpenTelemetry: only this module imports it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.resources import (
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvtier import __version__
from kvtier import link_messages as link
from kvtier.control.decision_history import release_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)

MAX_TURNS: Final = 8192
"""Most turns whose traces are remembered; of the oldest one a decision begins a trace of its own."""
CLOSE_S: Final = 3.0
"""How long the last spans may take when the server ends."""
PROTOCOL_VARIABLE: Final = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
"""As vLLM reads it."""
_NANOS: Final = 1_000_000_000


def exporter_to(endpoint: str) -> SpanExporter:
    """Return an exporter to an OTLP collector, over gRPC or as the environment says.

    Raises:
        ValueError: `PROTOCOL_VARIABLE` names a protocol that is not known.
    """
    match os.environ.get(PROTOCOL_VARIABLE, "grpc"):
        case "grpc":
            from opentelemetry.exporter.otlp.proto.grpc import trace_exporter  # noqa: PLC0415

            # The endpoint's scheme says whether with TLS.
            return trace_exporter.OTLPSpanExporter(endpoint=endpoint)
        case "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http import (  # noqa: PLC0415
                trace_exporter as http_exporter,
            )

            return http_exporter.OTLPSpanExporter(endpoint=endpoint)
        case protocol:
            raise ValueError(
                f"{PROTOCOL_VARIABLE}={protocol}: not known; accepted is grpc or http/protobuf"
            )


class DecisionSpans:
    """See the module's docstring.

    Args:
        exporter: Sends the spans.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        own = Resource.create({SERVICE_NAME: "kvtier", SERVICE_VERSION: __version__})
        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say wins.
        resource = own.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kvtier", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._traces: OrderedDict[tuple[str, str], dict[str, str]] = OrderedDict()

    def reported(self, engine_id: str, events: list[link.Event]) -> None:
        """Follow what an engine reports."""
        for event in events:
            match event:
                case link.TurnStarted() if event.trace:
                    self._traces[engine_id, event.request_id] = event.trace
                    if len(self._traces) > MAX_TURNS:
                        self._traces.popitem(last=False)
                case link.Decided():
                    self._span(engine_id, event)
                case link.PinEnded():
                    # In the trace of the turn that the pin has kept.
                    self._span(engine_id, release_of(event))
                case _:
                    pass

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        # A collector that does not answer is waited for much longer than this by the exporter.
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(CLOSE_S)
        if thread.is_alive():
            logger.warning("the last spans could not be sent")

    def _span(self, engine_id: str, event: link.Decided) -> None:
        trace = self._traces.get((engine_id, event.request_id), {})
        at_ns = int(event.at_s * _NANOS)
        span = self._tracer.start_span(
            f"kvtier.{event.event}",
            context=self._propagator.extract(trace),
            attributes=_attributes(engine_id, event),
            start_time=at_ns,
        )
        # A decision takes microseconds; what counts is when it was made, and why.
        span.end(at_ns)


def _attributes(engine_id: str, event: link.Decided) -> dict[str, str | bool | int | float]:
    found: dict[str, str | bool | int | float] = {
        "kvtier.engine_id": engine_id,
        "kvtier.program": event.program.name,
        "kvtier.action": event.action,
        "kvtier.reason": event.reason,
        "kvtier.ttl_s": event.ttl_s,
        # vLLM's name for it.
        "gen_ai.request.id": event.request_id,
    }
    if event.program.tenant is not None:
        found["kvtier.tenant"] = event.program.tenant
    for option in event.costs:
        found[f"kvtier.cost_s.{option.option}"] = option.cost_s
    for name, value in event.inputs.items():
        if value is not None:
            found[f"kvtier.input.{name}"] = value
    return found
