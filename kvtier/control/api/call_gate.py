"""What every call passes on its way to a service: limits, token, decoding, errors, metrics.

Services see decoded requests of callers that may call, and raise `ApiError`; all that gRPC would otherwise
answer in its own way (a request that is no message, a bug) becomes a canonical status with details here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from kvtier.control.api.callers import Caller, grant_of, set_caller
from kvtier.control.api.errors import (
    ApiError,
    exhausted,
    internal,
    invalid_argument,
    late_request,
)
from kvtier.control.event_hub import MAX_WATCHERS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from kvtier.control.control_metrics import ControlMetrics
    from kvtier.control.token_file import TokenFile

logger = logging.getLogger(__name__)

MAX_CALLS: Final = 256
"""Calls with one answer, at a time; those count too whose requests are awaited."""
MAX_STREAMS: Final = 96
"""Streams at a time: watchers of events (which have a limit of their own), reflection."""
MAX_HEALTH_CALLS: Final = 64
"""Calls of health at a time: whoever reaches the port can make them, and must not keep others out."""
MAX_HEALTH_STREAMS: Final = 64
"""Watchers of health at a time, likewise."""
REQUEST_S: Final = 10.0
"""Within which a request must have come."""
ENDED_S: Final = 0.1
"""Within which the end of a call is known behind the end of its requests."""
_OPEN_TO_ALL: Final = "/grpc.health.v1.Health/"
"""Probes have no tokens; what they learn is whether kvtier serves."""

_Context = aio.ServicerContext[Any, Any]


class CallGate(aio.ServerInterceptor):
    """See the module's docstring.

    Args:
        tokens: Tokens that calls over TCP need; None: none.
        metrics: Count calls.
        tenant_share: Of the calls and of the watchers, that the tokens of one tenant may have.
    """

    def __init__(
        self,
        tokens: TokenFile | None,
        metrics: ControlMetrics,
        *,
        tenant_share: float,
    ) -> None:
        self._tokens = tokens
        self._metrics = metrics
        self._limits = {
            "calls": MAX_CALLS,
            "streams": MAX_STREAMS,
            "calls of health": MAX_HEALTH_CALLS,
            "watchers of health": MAX_HEALTH_STREAMS,
        }
        self._shares = {
            "calls": max(1, int(tenant_share * MAX_CALLS)),
            # Nearly all streams are watchers of events, of which fewer are served.
            "streams": max(1, int(tenant_share * min(MAX_STREAMS, MAX_WATCHERS))),
        }
        self._running = dict.fromkeys(self._limits, 0)
        self._held: dict[tuple[str, str], int] = {}
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler of a method with the gate before it; None where there is no such method."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        # gRPC looks the handler up by the method: it is the same for all calls.
        if handler is not None and method not in self._handlers:
            self._handlers[method] = self._gated(method, handler)
        return self._handlers.get(method, handler)

    def _gated(
        self, method: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        serialize, deserialize = handler.response_serializer, handler.request_deserializer
        if handler.unary_unary is not None:
            # As a stream: of a method with one request gRPC asks only when that has come, and who may not call
            # must not be waited for.
            return grpc.stream_unary_rpc_method_handler(
                self._one_answer(method, handler.unary_unary, deserialize),
                response_serializer=serialize,
            )
        if handler.unary_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._many_answers(method, _with_request(handler.unary_stream, deserialize)),
                response_serializer=serialize,
            )
        assert handler.stream_stream is not None, f"{method}: no such kind of method is served"
        return grpc.stream_stream_rpc_method_handler(
            self._many_answers(method, handler.stream_stream),
            request_deserializer=deserialize,
            response_serializer=serialize,
        )

    def _one_answer(
        self, method: str, serve: Callable[..., Any], deserialize: Callable[[bytes], Any] | None
    ) -> Any:
        kind = "calls of health" if method.startswith(_OPEN_TO_ALL) else "calls"

        async def call(messages: AsyncIterator[bytes], context: _Context) -> Any:
            with self._admitted(kind, self._authenticate(method, context)):
                return await serve(_decoded(await _first(messages), deserialize), context)

        async def gated(messages: AsyncIterator[bytes], context: _Context) -> Any:
            async with self._told(method, context):
                return await call(messages, context)

        return gated

    def _many_answers(self, method: str, serve: Callable[..., Any]) -> Any:
        kind = "watchers of health" if method.startswith(_OPEN_TO_ALL) else "streams"

        async def gated(messages: Any, context: _Context) -> AsyncIterator[Any]:
            async with self._told(method, context):
                with self._admitted(kind, self._authenticate(method, context)):
                    async with contextlib.aclosing(serve(messages, context)) as answers:
                        async for answer in answers:
                            yield answer

        return gated

    @contextlib.asynccontextmanager
    async def _told(self, method: str, context: _Context) -> AsyncIterator[None]:
        """Give a failure its status, and count the call, before the client hears of its end."""
        started_s = time.monotonic()

        def count(code: str) -> None:
            self._metrics.call(method.removeprefix("/"), code, time.monotonic() - started_s)

        try:
            yield
        except ApiError as error:
            count(error.code.name)
            await error.abort(context)
        except (asyncio.CancelledError, GeneratorExit):
            left_s = context.time_remaining()
            count("DEADLINE_EXCEEDED" if left_s is not None and left_s <= 0 else "CANCELLED")
            raise
        except aio.AbortError:
            count(_code_name(context))
            raise
        except Exception:
            logger.exception("%s failed", method)
            count("INTERNAL")
            await internal().abort(context)
        else:
            count("OK")

    @contextlib.contextmanager
    def _admitted(self, kind: str, tenant: str | None) -> Iterator[None]:
        """Hold one of the server's places, and one of the tenant's share."""
        if self._running[kind] >= self._limits[kind]:
            message = f"{self._limits[kind]} {kind} are being served; try again later"
            raise exhausted(message, "TOO_MANY_CALLS", kind)
        with self._share(kind, tenant):
            self._running[kind] += 1
            try:
                yield
            finally:
                self._running[kind] -= 1

    @contextlib.contextmanager
    def _share(self, kind: str, tenant: str | None) -> Iterator[None]:
        if tenant is None:
            # An operator's, or there are no tokens.
            yield
            return
        held, share = self._held.get((kind, tenant), 0), self._shares[kind]
        if held >= share:
            message = f"{share} {kind} of this tenant are being served; try again later"
            raise exhausted(message, "TOO_MANY_CALLS_OF_TENANT", kind)
        self._held[kind, tenant] = held + 1
        try:
            yield
        finally:
            self._held[kind, tenant] -= 1
            if not self._held[kind, tenant]:
                # Tenants come and go.
                del self._held[kind, tenant]

    def _authenticate(self, method: str, context: _Context) -> str | None:
        """Set the caller; returns the tenant that he is bound to."""
        tokens = None if method.startswith(_OPEN_TO_ALL) else self._tokens
        grant = grant_of(context.peer(), context.invocation_metadata() or (), tokens)
        left_s = context.time_remaining()
        deadline_s = None if left_s is None else time.monotonic() + left_s
        set_caller(Caller(grant.tenant, deadline_s))
        return grant.tenant


def _with_request(
    serve: Callable[..., Any], deserialize: Callable[[bytes], Any] | None
) -> Callable[..., Any]:
    async def served(messages: AsyncIterator[bytes], context: _Context) -> AsyncIterator[Any]:
        request = _decoded(await _first(messages), deserialize)
        async with contextlib.aclosing(serve(request, context)) as answers:
            async for answer in answers:
                yield answer

    return served


async def _first(messages: AsyncIterator[bytes]) -> bytes:
    """The request of a method that has one. It follows the call's headers at once."""
    try:
        async with asyncio.timeout(REQUEST_S):
            async for message in messages:
                return message
    except TimeoutError:
        raise late_request(f"no request has come within {REQUEST_S:g} s") from None
    # A call that is cancelled, too late or too long ends its requests, too, and the handler is ended a moment later.
    await asyncio.sleep(ENDED_S)
    raise invalid_argument([("", "the request is missing")])


def _decoded(raw: Any, deserialize: Callable[[bytes], Any] | None) -> Any:
    if deserialize is None:
        return raw
    try:
        return deserialize(raw)
    except DecodeError:
        raise invalid_argument([("", "the request is no message of this method")]) from None


def _code_name(context: _Context) -> str:
    code: Any = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"
