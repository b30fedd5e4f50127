"""`kvtier.v1.ObservabilityService`: what kvtier does and why."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from kvtier import __version__
from kvtier import link_messages as link
from kvtier.control.api import as_proto, errors, watched_events
from kvtier.control.api.callers import current_caller
from kvtier.control.api.validation import Violations
from kvtier.control.event_hub import HubClosedError, Interest, TooManyWatchersError
from kvtier.v1 import observability_pb2, observability_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kvtier.control.api.state import ServerState

MAX_DECISIONS: Final = 64
DEFAULT_DECISIONS: Final = 8


class ObservabilityService(observability_pb2_grpc.ObservabilityServiceServicer):
    """See the module's docstring."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def GetStatus(  # noqa: N802 - gRPC's names
        self, request: observability_pb2.GetStatusRequest, context: Any
    ) -> observability_pb2.GetStatusResponse:
        """See the proto."""
        del request, context
        can_wake = self._state.link_server.can_wake
        return observability_pb2.GetStatusResponse(
            version=__version__,
            engines=[
                as_proto.engine_status(
                    engine,
                    wakeable=can_wake(engine.engine_id),
                    with_programs=current_caller().tenant is None,
                )
                for engine in self._state.registry.engines()
            ],
            started_at=as_proto.timestamp(self._state.started_s),
            watchers=len(self._state.hub),
        )

    async def ExplainDecision(  # noqa: N802
        self, request: observability_pb2.ExplainDecisionRequest, context: Any
    ) -> observability_pb2.ExplainDecisionResponse:
        """See the proto."""
        del context
        bad = Violations()
        tenant, name = bad.program(request.name, request.tenant)
        limit = bad.count("limit", request.limit, MAX_DECISIONS, DEFAULT_DECISIONS)
        bad.check()
        current_caller().needs_program(tenant, name)
        decisions = self._state.registry.history.last(tenant, name, limit)
        if not decisions:
            # A program that is there and was never decided on has an empty list.
            self._state.program(tenant, name)
        return observability_pb2.ExplainDecisionResponse(
            decisions=[as_proto.decision(engine_id, d) for engine_id, d in decisions]
        )

    async def WatchEvents(  # noqa: N802
        self, request: observability_pb2.WatchEventsRequest, context: Any
    ) -> AsyncIterator[observability_pb2.WatchEventsResponse]:
        """See the proto."""
        interest = _interest(request)
        try:
            with self._state.hub.watching(interest) as watcher:
                # From here on nothing is missed, which the client may wait to be told.
                await context.send_initial_metadata(())
                async with contextlib.aclosing(watcher.read()) as items:
                    async for item in items:
                        yield watched_events.of_lost(item) if isinstance(item, int) else item
        except TooManyWatchersError as error:
            raise errors.exhausted(str(error), "TOO_MANY_WATCHERS", "watchers") from error
        except HubClosedError:
            raise errors.stopping() from None

    async def Calibrate(  # noqa: N802
        self, request: observability_pb2.CalibrateRequest, context: Any
    ) -> observability_pb2.CalibrateResponse:
        """See the proto."""
        del context
        current_caller().needs_all("Calibrate")
        bad = Violations()
        engine_id = bad.name("engine_id", request.engine_id) if request.engine_id else ""
        bad.check()
        engines = self._state.engines(engine_id)
        answers = await self._state.ask_all(
            [(engine.engine_id, link.CalibrateCommand(id=0)) for engine in engines]
        )
        return observability_pb2.CalibrateResponse(
            results=[as_proto.command_result(answer) for answer in answers]
        )


def _interest(request: observability_pb2.WatchEventsRequest) -> Interest:
    """What a watcher wants to see, as far as it may."""
    bad = Violations()
    for index, kind in enumerate(request.kinds):
        if kind not in watched_events.KINDS:
            names = ", ".join(watched_events.KINDS)
            bad.add(f"kinds[{index}]", f"is {kind[:64]!r}; accepted are {names}")
            break
    name = bad.name("name", request.name) if request.name else None
    tenant = bad.tenant("tenant", request.tenant)
    bad.check()
    caller = current_caller()
    by_tenant = name is not None or tenant is not None
    if caller.tenant is not None:
        if by_tenant and not caller.sees(tenant):
            raise errors.program_not_found(request.name)
        tenant, by_tenant = caller.tenant, True
    return Interest(frozenset(request.kinds), name, tenant, by_tenant)
