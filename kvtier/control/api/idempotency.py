"""Calls that a client may repeat: done once, and answered alike."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from kvtier.control.api.errors import invalid_argument

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

T = TypeVar("T")

KEPT_S: Final = 600.0
MAX_CALLS: Final = 8192


@dataclass(frozen=True, slots=True, eq=False)
class _Call(Generic[T]):
    digest: bytes
    task: asyncio.Task[T]
    made_s: float


class RepeatableCalls(Generic[T]):
    """Answers by request id. One that failed is forgotten: its repetition is a new call.

    Args:
        clock: Monotonic time.
        max_calls: Most calls remembered; the oldest is forgotten.
    """

    def __init__(self, clock: Callable[[], float], *, max_calls: int = MAX_CALLS) -> None:
        self._clock = clock
        self._max_calls = max_calls
        self._calls: OrderedDict[tuple[str, ...], _Call[T]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many are remembered."""
        return len(self._calls)

    async def run(
        self, key: tuple[str, ...], content: bytes, do: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        """Do what is asked, unless it was done already: then return that answer.

        A caller that goes away does not stop what was begun, so that its repetition finds the answer.

        Args:
            key: Who calls what, and the request id.
            content: The request without its id.
            do: Does it.

        Raises:
            ApiError: INVALID_ARGUMENT where the id came with another content before; or what `do`
                raises.
        """
        self._forget_old()
        # What is kept must be short, however long the request is.
        digest = hashlib.sha256(content).digest()
        call = self._calls.get(key)
        if call is None:
            task = asyncio.create_task(do())
            call = self._calls[key] = _Call(digest, task, self._clock())
            task.add_done_callback(lambda done: self._done(key, done))
            if len(self._calls) > self._max_calls:
                self._calls.popitem(last=False)
        elif call.digest != digest:
            raise invalid_argument(
                [("request_id", "came before with another content; accepted is a new id")]
            )
        return await asyncio.shield(call.task)

    def _done(self, key: tuple[str, ...], task: asyncio.Task[T]) -> None:
        # Asking for the exception also tells asyncio that somebody knows.
        failed = task.cancelled() or task.exception() is not None
        call = self._calls.get(key)
        if failed and call is not None and call.task is task:
            del self._calls[key]

    def _forget_old(self) -> None:
        oldest_s = self._clock() - KEPT_S
        while self._calls:
            key, call = next(iter(self._calls.items()))
            if call.made_s > oldest_s:
                return
            del self._calls[key]
