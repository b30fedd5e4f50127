"""Following events: a stream of what happens, until it is closed or the server ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

import grpc

from kvtier.client.decoding import watched
from kvtier.client.errors import from_rpc_error

if TYPE_CHECKING:
    from types import TracebackType

    from kvtier.client.records import Event, Lost


class Watch:
    """Iterates over events from its creation on; `close` ends it, from another thread too.

    Never reconnects by itself: what happened meanwhile would be missing without a word. Raises
    `ControlError` where the stream fails, `Unavailable` where the server goes away.
    """

    def __init__(self, stream: Any) -> None:
        """Iterate over a server stream of grpc."""
        self._stream = stream
        self._closed = False

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> Event | Lost:
        """Wait for the next event, or the number of those that were lost."""
        while True:
            try:
                item = watched(next(self._stream))
            except grpc.RpcError as error:
                if self._closed:
                    raise StopIteration from None
                raise from_rpc_error(error) from error
            if item is not None:
                return item

    def wait_started(self) -> None:
        """Return when the server follows: what happens from then on is seen.

        A stream that has failed is over, too; the next event is then its failure.
        """
        self._stream.initial_metadata()

    def close(self) -> None:
        """End the stream. Idempotent."""
        self._closed = True
        self._stream.cancel()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the stream."""
        self.close()


class AsyncWatch:
    """As `Watch`, for `async for` and `async with`."""

    def __init__(self, stream: Any) -> None:
        """Iterate over a server stream of grpc.aio."""
        self._stream = stream
        self._closed = False

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Event | Lost:
        """Wait for the next event, or the number of those that were lost."""
        while True:
            try:
                message = await self._stream.read()
            except grpc.RpcError as error:
                if self._closed:
                    raise StopAsyncIteration from None
                raise from_rpc_error(error) from error
            except asyncio.CancelledError:
                # A closed stream looks like a cancelled task.
                task = asyncio.current_task()
                if self._closed and (task is None or not task.cancelling()):
                    raise StopAsyncIteration from None
                raise
            if message is grpc.aio.EOF:
                raise StopAsyncIteration
            item = watched(message)
            if item is not None:
                return item

    async def wait_started(self) -> None:
        """See `Watch.wait_started`."""
        await self._stream.initial_metadata()

    def close(self) -> None:
        """End the stream. Idempotent."""
        self._closed = True
        self._stream.cancel()

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the stream."""
        self.close()
