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
from kvtier.control.api.errors import ApiError, exhausted, internal, invalid_argument

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from kvtier.control.control_metrics import ControlMetrics
    from kvtier.control.token_file import TokenFile

logger = logging.getLogger(__name__)

MAX_CALLS: Final = 256
"""Calls with one answer, at a time."""
MAX_STREAMS: Final = 96
"""Streams at a time: watchers of events (which have a limit of their own), reflection."""
MAX_HEALTH_STREAMS: Final = 64
"""Watchers of health at a time: whoever reaches the port can be one, and must not keep others out."""
_OPEN_TO_ALL: Final = "/grpc.health.v1.Health/"
"""Probes have no tokens; what they learn is whether kvtier serves."""

_Context = aio.ServicerContext[Any, Any]


class CallGate(aio.ServerInterceptor):
    """See the module's docstring.

    Args:
        tokens: Tokens that calls over TCP need; None: none.
        metrics: Count calls.
        max_calls: See `MAX_CALLS`.
        max_streams: See `MAX_STREAMS`.
        max_health_streams: See `MAX_HEALTH_STREAMS`.
    """

    def __init__(
        self,
        tokens: TokenFile | None,
        metrics: ControlMetrics,
        *,
        max_calls: int = MAX_CALLS,
        max_streams: int = MAX_STREAMS,
        max_health_streams: int = MAX_HEALTH_STREAMS,
    ) -> None:
        self._tokens = tokens
        self._metrics = metrics
        self._limits = {
            "calls": max_calls,
            "streams": max_streams,
            "watchers of health": max_health_streams,
        }
        self._running = dict.fromkeys(self._limits, 0)
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
            return grpc.unary_unary_rpc_method_handler(
                self._one_answer(method, handler.unary_unary, deserialize),
                response_serializer=serialize,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._many_answers(method, handler.unary_stream, deserialize),
                response_serializer=serialize,
            )
        assert handler.stream_stream is not None, f"{method}: no such kind of method is served"
        return grpc.stream_stream_rpc_method_handler(
            self._many_answers(method, handler.stream_stream, None),
            request_deserializer=deserialize,
            response_serializer=serialize,
        )

    def _one_answer(
        self, method: str, serve: Callable[..., Any], deserialize: Callable[[bytes], Any] | None
    ) -> Any:
        async def call(raw: bytes, context: _Context) -> Any:
            with self._admitted("calls"):
                self._authenticate(method, context)
                return await serve(_decoded(raw, deserialize), context)

        async def gated(raw: bytes, context: _Context) -> Any:
            async with self._told(method, context):
                return await call(raw, context)

        return gated

    def _many_answers(
        self, method: str, serve: Callable[..., Any], deserialize: Callable[[bytes], Any] | None
    ) -> Any:
        kind = "watchers of health" if method.startswith(_OPEN_TO_ALL) else "streams"

        async def gated(raw: Any, context: _Context) -> AsyncIterator[Any]:
            async with self._told(method, context):
                with self._admitted(kind):
                    self._authenticate(method, context)
                    async with contextlib.aclosing(
                        serve(_decoded(raw, deserialize), context)
                    ) as answers:
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
    def _admitted(self, kind: str) -> Iterator[None]:
        if self._running[kind] >= self._limits[kind]:
            message = f"{self._limits[kind]} {kind} are being served; try again later"
            raise exhausted(message, "TOO_MANY_CALLS", kind)
        self._running[kind] += 1
        try:
            yield
        finally:
            self._running[kind] -= 1

    def _authenticate(self, method: str, context: _Context) -> None:
        tokens = None if method.startswith(_OPEN_TO_ALL) else self._tokens
        grant = grant_of(context.peer(), context.invocation_metadata() or (), tokens)
        left_s = context.time_remaining()
        deadline_s = None if left_s is None else time.monotonic() + left_s
        set_caller(Caller(grant.tenant, deadline_s))


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
