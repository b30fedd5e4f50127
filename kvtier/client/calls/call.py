"""What one call of the control API is, and how values are written into its request."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from kvtier.client.records import CommandResult

if TYPE_CHECKING:
    from collections.abc import Callable
    from enum import StrEnum

ResponseT = TypeVar("ResponseT", bound=Message)
ResultT = TypeVar("ResultT")

_MAX_DURATION_S: Final = 315_576_000_000
"""Protobuf's limit of a `Duration`, about 10,000 years."""

Results = tuple[CommandResult, ...]


@dataclass(frozen=True, slots=True)
class Call(Generic[ResponseT, ResultT]):
    """One call: a request, the type of its response, and how that is read.

    Attributes:
        path: "/PACKAGE.SERVICE/METHOD".
        idempotent: Whether it may be sent again when nobody knows what became of it.
    """

    path: str
    request: Message
    response: type[ResponseT]
    decode: Callable[[ResponseT], ResultT]
    idempotent: bool


def of_service(service: str) -> Callable[..., Call[Any, Any]]:
    """Return what makes calls of a service: (method, request, response, decode, *, idempotent=True)."""

    def call(
        method: str,
        request: Message,
        response: type[Message],
        decode: Callable[[Any], Any],
        *,
        idempotent: bool = True,
    ) -> Call[Any, Any]:
        return Call(f"/kvtier.v1.{service}/{method}", request, response, decode, idempotent)

    return call


def duration(seconds: float, name: str) -> Duration:
    """Seconds as protobuf's `Duration`; one that is absurd is the server's to refuse.

    Raises:
        ValueError: it is no finite number, or beyond what a `Duration` can say.
    """
    if not math.isfinite(seconds) or abs(seconds) > _MAX_DURATION_S:
        raise ValueError(f"{name}={seconds!r}: accepted is a finite number of seconds")
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def enum_number(wrapper: Any, prefix: str, kind: type[StrEnum], value: str, name: str) -> Any:
    """A proto enum's number of a member of the client's enum.

    Raises:
        ValueError: there is no such member.
    """
    known = [str(member) for member in kind if member != "unknown"]
    if value not in known:
        raise ValueError(f"{name}={value!s}: accepted is {', '.join(known)}")
    return wrapper.Value(prefix + value.upper())
