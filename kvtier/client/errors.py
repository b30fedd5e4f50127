"""What a client raises, decoded from gRPC's status and the `google.rpc` details that come with it."""

# ruff: noqa: N818 - the canonical codes' names, as google.api_core.exceptions has them

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import grpc


class ClientConfigError(ValueError):
    """Target, token file or TLS files cannot be used; the message says what is accepted."""


class ControlError(Exception):
    """The control server did not do what was asked.

    Attributes:
        code: The canonical name, e.g. "NOT_FOUND".
        message: What the server says, or gRPC where no server answered.
        fields: What is wrong by field of the request (or by subject: a budget, a precondition).
        reason: Machine-readable, where the server gives one; else empty.
        metadata: Of the reason.
        retry_after_s: The earliest time at which the server wants the call again; None: it says nothing.
    """

    CODE: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        fields: Mapping[str, str] | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.code = code or self.CODE
        self.message = message
        self.fields = dict(fields or {})
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def __str__(self) -> str:
        # A server may have said in its message what it says of the fields.
        fields = [
            f"{name}: {text}" for name, text in self.fields.items() if text not in self.message
        ]
        return "; ".join([self.message, *fields])


class InvalidArgument(ControlError):
    """A field of the request has a value that is not accepted; see `fields`."""

    CODE = "INVALID_ARGUMENT"


class NotFound(ControlError):
    """No engine knows it, or it is another tenant's."""

    CODE = "NOT_FOUND"


class AlreadyExists(ControlError):
    """It is there already."""

    CODE = "ALREADY_EXISTS"


class Unauthenticated(ControlError):
    """The server wants a token and got none, or one that it does not know."""

    CODE = "UNAUTHENTICATED"


class PermissionDenied(ControlError):
    """The token does not allow it."""

    CODE = "PERMISSION_DENIED"


class FailedPrecondition(ControlError):
    """It cannot be done in the state that things are in."""

    CODE = "FAILED_PRECONDITION"


class ResourceExhausted(ControlError):
    """A limit of the server is reached: calls or watchers at a time, or a message's size."""

    CODE = "RESOURCE_EXHAUSTED"


class Unimplemented(ControlError):
    """The server does not know the call: it is older than this client."""

    CODE = "UNIMPLEMENTED"


class DeadlineExceeded(ControlError):
    """No answer within the timeout. The command may have been done or not."""

    CODE = "DEADLINE_EXCEEDED"


class Unavailable(ControlError):
    """No server answers at the target, or it goes away just now."""

    CODE = "UNAVAILABLE"


_BY_CODE: Final = {kind.CODE: kind for kind in ControlError.__subclasses__()}


def from_rpc_error(error: grpc.RpcError) -> ControlError:
    """Return what a failed call means.

    Details that cannot be read are left out: code and message say enough.
    """
    # Both kinds of channels raise errors with the methods of `grpc.Call`, which the base type lacks.
    call: Any = error
    code = call.code().name
    kind = _BY_CODE.get(code, ControlError)
    return kind(call.details() or code.lower().replace("_", " "), code=code, **_details(call))


def _details(call: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"fields": {}}
    try:
        status = rpc_status.from_call(call)
        for packed in status.details if status is not None else ():
            for kind, read in _READERS.items():
                detail = kind()
                if packed.Unpack(detail):
                    read(detail, found)
    except (DecodeError, ValueError):
        return {}
    return found


def _bad_request(detail: Any, found: dict[str, Any]) -> None:
    _add_fields(found, ((v.field, v.description) for v in detail.field_violations))


def _violations(detail: Any, found: dict[str, Any]) -> None:
    _add_fields(found, ((v.subject, v.description) for v in detail.violations))


def _add_fields(found: dict[str, Any], violations: Iterable[tuple[str, str]]) -> None:
    fields = found["fields"]
    for name, text in violations:
        fields[name] = f"{fields[name]}; {text}" if name in fields else text


def _error_info(detail: Any, found: dict[str, Any]) -> None:
    found.update(reason=detail.reason, metadata=dict(detail.metadata))


def _retry_info(detail: Any, found: dict[str, Any]) -> None:
    found["retry_after_s"] = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9


_READERS: Final = {
    error_details_pb2.BadRequest: _bad_request,
    error_details_pb2.PreconditionFailure: _violations,
    error_details_pb2.QuotaFailure: _violations,
    error_details_pb2.ErrorInfo: _error_info,
    error_details_pb2.RetryInfo: _retry_info,
}
