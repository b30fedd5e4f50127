"""Who calls, what that allows, and how long there is for an answer."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvtier.control.api.errors import permission_denied, program_not_found, unauthenticated
from kvtier.control.token_file import Grant

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvtier.control.token_file import TokenFile

ANSWER_MARGIN_S: Final = 0.05
"""Left of a caller's deadline for the answer's way back."""
_SCHEME: Final = "bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        tenant: The only one whose programs it sees and touches; None: all.
        deadline_s: When it stops to wait, on the monotonic clock; None: never.
    """

    tenant: str | None = None
    deadline_s: float | None = None

    def left_s(self) -> float | None:
        """Time in which an answer still reaches the caller, seconds; None: any."""
        if self.deadline_s is None:
            return None
        return max(0.0, self.deadline_s - time.monotonic() - ANSWER_MARGIN_S)

    def sees(self, tenant: str | None) -> bool:
        """Whether programs of this tenant (None: without one) are this caller's business."""
        return self.tenant is None or tenant == self.tenant

    def needs_program(self, tenant: str | None, name: str) -> None:
        """Raises ApiError: NOT_FOUND for another tenant's program, as if there were none."""
        if not self.sees(tenant):
            raise program_not_found(name)

    def needs_all(self, what: str) -> None:
        """Raises ApiError: PERMISSION_DENIED for a caller that is bound to a tenant."""
        if self.tenant is not None:
            raise permission_denied(f"{what}: not allowed with a token that is bound to a tenant")


_caller: ContextVar[Caller] = ContextVar("kvtier_caller")


def current_caller() -> Caller:
    """Return who makes the call that is being served."""
    return _caller.get()


def set_caller(caller: Caller) -> None:
    """Say who makes the call that the current task serves."""
    _caller.set(caller)


def grant_of(
    peer: str, metadata: Iterable[tuple[str, str | bytes]], tokens: TokenFile | None
) -> Grant:
    """Return what a call may do.

    Args:
        peer: Where it comes from, as gRPC says: the Unix socket needs no token, since only the user
            can reach it.
        metadata: Of the call.
        tokens: Those that are accepted; None: none is asked for.

    Raises:
        ApiError: UNAUTHENTICATED.
    """
    if tokens is None or peer.startswith("unix:"):
        return Grant()
    given = [value for key, value in metadata if key == "authorization"]
    if not given:
        raise unauthenticated("a token is needed: send the metadata `authorization: Bearer TOKEN`")
    value = given[0]
    if len(given) > 1 or not isinstance(value, str) or not value.lower().startswith(_SCHEME):
        raise unauthenticated("accepted is one metadata entry `authorization: Bearer TOKEN`")
    grant = tokens.grant(value[len(_SCHEME) :].strip())
    if grant is None:
        raise unauthenticated("the token is not accepted")
    return grant
