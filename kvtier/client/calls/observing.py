"""Calls of the `ObservabilityService`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.client import decoding
from kvtier.client.calls.call import Call, Results, of_service
from kvtier.v1 import observability_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvtier.client.records import Decision, Event, Lost, Status

_observability = of_service("ObservabilityService")


def get_status() -> Call[observability_pb2.GetStatusResponse, Status]:
    """See `KVTierClient.get_status`."""
    request = observability_pb2.GetStatusRequest()
    return _observability(
        "GetStatus", request, observability_pb2.GetStatusResponse, decoding.status
    )


def explain_decision(
    name: str, tenant: str, limit: int
) -> Call[observability_pb2.ExplainDecisionResponse, tuple[Decision, ...]]:
    """See `KVTierClient.explain_decision`."""
    request = observability_pb2.ExplainDecisionRequest(name=name, tenant=tenant, limit=limit)
    return _observability(
        "ExplainDecision", request, observability_pb2.ExplainDecisionResponse, decoding.decisions
    )


def watch_events(
    kinds: Iterable[str], name: str, tenant: str
) -> Call[observability_pb2.WatchEventsResponse, Event | Lost | None]:
    """See `KVTierClient.watch`."""
    request = observability_pb2.WatchEventsRequest(kinds=kinds, name=name, tenant=tenant)
    return _observability(
        "WatchEvents",
        request,
        observability_pb2.WatchEventsResponse,
        decoding.watched,
        idempotent=False,
    )


def calibrate(engine_id: str) -> Call[observability_pb2.CalibrateResponse, Results]:
    """See `KVTierClient.calibrate`."""
    return _observability(
        "Calibrate",
        observability_pb2.CalibrateRequest(engine_id=engine_id),
        observability_pb2.CalibrateResponse,
        decoding.results,
        idempotent=False,
    )
