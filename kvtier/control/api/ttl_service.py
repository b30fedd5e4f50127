"""`kvtier.v1.TtlService`: overrides of TTLs, which survive restarts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kvtier.control.api import as_proto, errors
from kvtier.control.api.callers import current_caller
from kvtier.control.api.page_tokens import BadPageTokenError, PageTokens
from kvtier.control.api.validation import Violations
from kvtier.control.override_book import (
    PROGRAM,
    TENANT,
    ScopeKey,
    TooManyOverridesError,
    scope_key,
    tenant_of,
)
from kvtier.link_messages import ProgramKey, TtlOverride
from kvtier.v1 import ttl_pb2, ttl_pb2_grpc

if TYPE_CHECKING:
    from kvtier.control.api.state import ServerState

logger = logging.getLogger(__name__)

_MODES = {number: name for name, number in as_proto.TTL_MODES.items()}


class TtlService(ttl_pb2_grpc.TtlServiceServicer):
    """See the module's docstring."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._tokens = PageTokens()

    async def SetTtlOverride(  # noqa: N802 - gRPC's names
        self, request: ttl_pb2.SetTtlOverrideRequest, context: Any
    ) -> ttl_pb2.SetTtlOverrideResponse:
        """See the proto."""
        del context
        override = self._override(request.override)
        _check_allowed(scope_key(override))
        try:
            self._state.book.set(override, limit_per_tenant=current_caller().tenant is not None)
        except TooManyOverridesError as error:
            raise errors.exhausted(
                str(error), "TOO_MANY_OVERRIDES", "overrides", passes=False
            ) from error
        logger.info("TTL override set: %s", override)
        saved = await self._state.saver.save()
        engines = await self._state.sync.spread(current_caller().left_s())
        return ttl_pb2.SetTtlOverrideResponse(
            override=as_proto.ttl_override(override), engines=engines, saved=saved
        )

    async def ListTtlOverrides(  # noqa: N802
        self, request: ttl_pb2.ListTtlOverridesRequest, context: Any
    ) -> ttl_pb2.ListTtlOverridesResponse:
        """See the proto."""
        del context
        bad = Violations()
        size = bad.page_size("page_size", request.page_size)
        bound = current_caller().tenant
        after: ScopeKey | None = None
        if request.page_token:
            try:
                rank, first, second = self._tokens.read(request.page_token, bound)
                after = rank, first, second
            except BadPageTokenError as error:
                bad.add("page_token", str(error))
        bad.check()
        rest = [
            override
            for override in self._state.book.all()
            if (after is None or scope_key(override) > after)
            and (bound is None or tenant_of(scope_key(override)) == bound)
        ]
        response = ttl_pb2.ListTtlOverridesResponse(
            overrides=[as_proto.ttl_override(override) for override in rest[:size]]
        )
        if len(rest) > size:
            # The order never changes, so where a page ends says where the next one begins.
            response.next_page_token = self._tokens.make(bound, scope_key(rest[size - 1]))
        return response

    async def DeleteTtlOverride(  # noqa: N802
        self, request: ttl_pb2.DeleteTtlOverrideRequest, context: Any
    ) -> ttl_pb2.DeleteTtlOverrideResponse:
        """See the proto."""
        del context
        bad = Violations()
        scope = self._scope("scope", request.scope, bad)
        bad.check()
        key = scope_key(scope)
        _check_allowed(key)
        if not self._state.book.delete(key):
            raise errors.not_found(
                "TtlOverride", str(request.scope).strip(), "there is no override of this scope"
            )
        logger.info("TTL override deleted: %s", scope)
        saved = await self._state.saver.save()
        engines = await self._state.sync.spread(current_caller().left_s())
        return ttl_pb2.DeleteTtlOverrideResponse(engines=engines, saved=saved)

    def _override(self, message: ttl_pb2.TtlOverride) -> TtlOverride:
        bad = Violations()
        scope = self._scope("override.scope", message.scope, bad)
        mode: Any = _MODES.get(message.mode)
        if mode is None:
            bad.add("override.mode", f"is {message.mode}; accepted is fixed, cap or floor")
        if not message.HasField("ttl"):
            bad.add("override.ttl", "is missing; accepted is 0 to 604800 s (7 days)")
        ttl_s = bad.seconds("override.ttl", message.ttl)
        expires_s = None
        if message.HasField("expires_at"):
            expires_s = bad.future("override.expires_at", message.expires_at, self._state.clock())
        bad.check()
        return TtlOverride(
            mode=mode,
            ttl_s=ttl_s,
            program=scope.program,
            tool=scope.tool,
            tenant=scope.tenant,
            expires_s=expires_s,
        )

    def _scope(self, field: str, scope: ttl_pb2.TtlScope, bad: Violations) -> TtlOverride:
        """An override of this scope and no other content."""
        empty = TtlOverride(mode="fixed", ttl_s=0.0)
        match scope.WhichOneof("scope"):
            case "program":
                program = scope.program
                tenant, name = bad.program(program.name, program.tenant, f"{field}.program.")
                key = ProgramKey(tenant, name, self._is_named(tenant, name))
                return TtlOverride(mode="fixed", ttl_s=0.0, program=key)
            case "tool":
                tool = bad.tool(f"{field}.tool", scope.tool)
                return TtlOverride(mode="fixed", ttl_s=0.0, tool=tool)
            case "tenant":
                tenant = bad.name(f"{field}.tenant", scope.tenant)
                return TtlOverride(mode="fixed", ttl_s=0.0, tenant=tenant)
            case "all" if scope.all:
                return empty
            case "all":
                bad.add(f"{field}.all", "is false; accepted is true")
                return empty
            case _:
                bad.add(field, "is missing; accepted is program, tool, tenant or all")
                return empty

    def _is_named(self, tenant: str | None, name: str) -> bool:
        """Whether clients call a program so; else the name is one that kvtier gave to a prefix."""
        found = self._state.registry.find(tenant, name)
        return not found or any(program.key.named for _, program in found)


def _check_allowed(key: ScopeKey) -> None:
    """Raises ApiError where the caller is bound to a tenant and the scope is not its own."""
    caller = current_caller()
    if caller.tenant is None:
        return
    if key[0] == PROGRAM:
        caller.needs_program(tenant_of(key), key[2])
    elif key[0] != TENANT or not caller.sees(tenant_of(key)):
        caller.needs_all("an override of this scope")
