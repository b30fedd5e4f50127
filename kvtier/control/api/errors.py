"""Errors of the control API: a canonical code, a message for people and `google.rpc` details for programs.

Services raise `ApiError`; `call_gate` makes a status of it. Every error has an `ErrorInfo` with a reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import NoReturn

    from google.protobuf.message import Message
    from grpc import aio

DOMAIN: Final = "kvtier.v1"
RETRY_S: Final = 1


class ApiError(Exception):
    """A call that fails.

    Attributes:
        code: The canonical code.
        message: For people.
        details: Messages of `google.rpc`.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        reason: str,
        *details: Message,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata or {})
        self.details: tuple[Message, ...] = (info, *details)

    async def abort(self, context: aio.ServicerContext[object, object]) -> NoReturn:
        """End the call with this error."""
        packed = []
        for detail in self.details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        status = rpc_status.to_status(
            status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)
        )
        await context.abort(status.code, status.details, status.trailing_metadata)


def invalid_argument(violations: Iterable[tuple[str, str]]) -> ApiError:
    """Fields of the request and what is wrong with each."""
    violations = list(violations)
    detail = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
            for field, text in violations
        ]
    )
    message = "; ".join(f"{field}: {text}" if field else text for field, text in violations)
    return ApiError(grpc.StatusCode.INVALID_ARGUMENT, message, "BAD_FIELDS", detail)


def late_request(message: str) -> ApiError:
    """The call began, and its request did not come."""
    return ApiError(grpc.StatusCode.DEADLINE_EXCEEDED, message, "REQUEST_TOO_LATE")


def not_found(kind: str, name: str, message: str) -> ApiError:
    """There is no such thing, for this caller."""
    detail = error_details_pb2.ResourceInfo(resource_type=f"kvtier.v1.{kind}", resource_name=name)
    return ApiError(grpc.StatusCode.NOT_FOUND, message, f"{_upper(kind)}_NOT_FOUND", detail)


def program_not_found(name: str) -> ApiError:
    """No engine knows the program, or it is another tenant's."""
    return not_found("Program", name, f"no engine knows a program {name!r} of this tenant")


def engine_not_found(engine_id: str) -> ApiError:
    """No engine has this id."""
    return not_found("Engine", engine_id, f"there is no engine {engine_id!r}")


def _retry() -> Message:
    delay = duration_pb2.Duration(seconds=RETRY_S)
    return cast("Message", error_details_pb2.RetryInfo(retry_delay=delay))


def no_engine() -> ApiError:
    """No engine is connected: none runs, or this server has just started."""
    detail = _retry()
    message = "no engine is connected; one that runs connects within a step"
    return ApiError(grpc.StatusCode.UNAVAILABLE, message, "NO_ENGINE", detail)


def incompatible_engine(engine_id: str, version: str) -> ApiError:
    """The only engines that run speak another version of the link."""
    message = f"engine {engine_id} runs kvtier {version}, which this control server cannot steer"
    detail = error_details_pb2.PreconditionFailure(
        violations=[
            error_details_pb2.PreconditionFailure.Violation(
                type="LINK_VERSION", subject=engine_id, description=message
            )
        ]
    )
    return ApiError(grpc.StatusCode.FAILED_PRECONDITION, message, "INCOMPATIBLE_ENGINE", detail)


def stopping() -> ApiError:
    """The server ends; engines that run start another one."""
    detail = _retry()
    message = "the control server stops"
    return ApiError(grpc.StatusCode.UNAVAILABLE, message, "SERVER_STOPS", detail)


def exhausted(message: str, reason: str, subject: str, *, passes: bool = True) -> ApiError:
    """A limit is reached; `passes`: it may be no more in a while, without the caller's doing."""
    detail = error_details_pb2.QuotaFailure(
        violations=[error_details_pb2.QuotaFailure.Violation(subject=subject, description=message)]
    )
    retry = [_retry()] if passes else []
    return ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, reason, detail, *retry)


def unauthenticated(message: str) -> ApiError:
    """A token is missing or unknown."""
    return ApiError(grpc.StatusCode.UNAUTHENTICATED, message, "TOKEN_NEEDED")


def permission_denied(message: str) -> ApiError:
    """The token does not allow this."""
    return ApiError(grpc.StatusCode.PERMISSION_DENIED, message, "BOUND_TO_TENANT")


def internal() -> ApiError:
    """A bug; what it was is in the log and nowhere else."""
    message = "the control server failed; its log says more"
    return ApiError(grpc.StatusCode.INTERNAL, message, "INTERNAL")


def _upper(kind: str) -> str:
    """`TtlOverride` as `TTL_OVERRIDE`."""
    return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(kind)).upper()
