"""ASGI middleware for ``vllm serve --middleware kvtier.middleware.KVTierMiddleware``.

It fills in which program a request belongs to, so that agents need no change (`kvtier.frontend.clients`
says what is read), and runs the waker (`kvtier.control.waker`) for the life of the API process. Requests
to other routes, responses and whatever else passes are not looked at.

A body is read when the application asks for it, not before: a request that vLLM's API key check
refuses is never buffered, and a client that waits for "100 Continue" gets it when it would have.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Counter

from kvtier.frontend.bodies import Route, fill_in
from kvtier.frontend.clients import Repeats, read_headers
from kvtier.logs import join_vllms_log

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from kvtier.control.waker import Waker

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 64 * 2**20
ROUTES: Final = {
    "/v1/chat/completions": Route(session_id=True),
    "/v1/completions": Route(session_id=True),
    "/v1/responses": Route(session_id=True),
    "/v1/messages": Route(cache_marks=True),
    "/inference/v1/generate": Route(),
    "/cohere/v2/chat": Route(),
}
"""The routes whose requests are filled in."""

NAMED: Final = Counter(
    "kvtier_client_requests",
    "Generation requests by who named their program: a client itself, one of the signs that "
    "kvtier's middleware reads, or nobody.",
    ["source"],
)


class KVTierMiddleware:
    """See the module's docstring.

    Args:
        app: The application inside.
        max_body_bytes: Bodies above are passed on unread.
    """

    def __init__(self, app: App, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._repeats = Repeats()
        self._has_complained = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        if scope["type"] == "http" and self._is_read(scope):
            receive = _WholeBody(
                receive, lambda body: self._filled(scope, body), self._max_body_bytes
            ).receive
        await self._app(scope, receive, send)

    def _is_read(self, scope: Scope) -> bool:
        """Whether the body is one that vLLM would generate from, and not too large."""
        if scope["method"] != "POST" or _route(scope) not in ROUTES:
            return False
        is_json = False
        for name, value in scope["headers"]:
            if name == b"content-type":
                is_json = value.partition(b";")[0].strip().lower() == b"application/json"
            elif name == b"content-length" and not _is_at_most(value, self._max_body_bytes):
                return False
        return is_json

    def _filled(self, scope: Scope, body: bytes) -> bytes:
        """Return the body as vLLM is to read it, and see to its length in the headers."""
        try:
            headers = read_headers(scope["headers"])
            filled = fill_in(body, headers, self._repeats, ROUTES[_route(scope)])
        except Exception:
            # vLLM serves the request as it came, whatever kvtier gets wrong.
            if not self._has_complained:
                logger.exception("kvtier could not read a request (said once); it is passed on")
            self._has_complained = True
            return body
        if filled is None:
            return body
        NAMED.labels(filled.source).inc()
        if filled.body is None:
            return body
        scope["headers"] = [
            (name, b"%d" % len(filled.body) if name == b"content-length" else value)
            for name, value in scope["headers"]
        ]
        return filled.body

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the waker from the end of the start to the beginning of the shutdown."""
        join_vllms_log()
        waker = _waker(scope)
        if waker is None:
            await self._app(scope, receive, send)
            return

        async def on_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                waker.start()
            await send(message)

        async def on_receive() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await waker.stop()
            return message

        try:
            await self._app(scope, on_receive, on_send)
        finally:
            await waker.stop()


class _WholeBody:
    """The `receive` of one request: its whole body at once, filled in, then what comes after it."""

    def __init__(
        self, receive: Receive, fill_in: Callable[[bytes], bytes], max_body_bytes: int
    ) -> None:
        self._receive = receive
        self._fill_in = fill_in
        self._max_body_bytes = max_body_bytes
        self._messages: deque[Message] = deque()
        self._size = 0
        self._is_collected = False

    async def receive(self) -> Message:
        """Return the next message. A call that is cancelled loses nothing."""
        while not self._is_collected:
            self._take(await self._receive())
        return self._messages.popleft() if self._messages else await self._receive()

    def _take(self, message: Message) -> None:
        self._messages.append(message)
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size <= self._max_body_bytes:
                if message.get("more_body", False):
                    return
                body = b"".join(part.get("body", b"") for part in self._messages)
                filled = self._fill_in(body)
                if filled is not body:
                    self._messages.clear()
                    self._messages.append(
                        {"type": "http.request", "body": filled, "more_body": False}
                    )
        # Else it is too large, or the client is gone: what has come is passed on as it is.
        self._is_collected = True


def _route(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_at_most(value: bytes, limit: int) -> bool:
    # The length first: reading thousands of digits would raise.
    return len(value) <= len(str(limit)) and value.isdigit() and int(value) <= limit


def _waker(scope: Scope) -> Waker | None:
    """Return the waker of this application's engine; None where it has none, or cannot be woken."""
    state = getattr(scope.get("app"), "state", None)
    engine_client = getattr(state, "engine_client", None)
    if engine_client is None:
        return None
    try:
        from kvtier.control.waker import Waker  # noqa: PLC0415 - only where there is an engine

        return Waker.of_this_host(engine_client)
    except Exception:
        logger.exception("kvtier cannot wake an idle engine: commands wait for its next request")
        return None
