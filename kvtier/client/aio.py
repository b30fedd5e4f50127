"""The client for asyncio."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio

from kvtier.client.base import ANNOUNCE_TIMEOUT_S, BaseClient
from kvtier.client.calls import observing, policies, programs, ttls
from kvtier.client.errors import ControlError, from_rpc_error
from kvtier.client.records import TtlMode
from kvtier.client.retries import Attempts
from kvtier.client.watching import AsyncWatch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable
    from datetime import datetime
    from types import TracebackType

    from kvtier.client.calls.call import Call, ResponseT, Results, ResultT
    from kvtier.client.records import (
        AppliedOverride,
        Decision,
        DeletedOverride,
        EnginePolicy,
        PolicyUpdate,
        Program,
        ProgramPage,
        Status,
        TenantBudget,
        TtlOverride,
        TtlOverridePage,
        TtlScope,
    )


class AsyncKVTierClient(BaseClient):
    """As `KVTierClient`, which describes the calls. Belongs to the event loop of its first call."""

    _channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        await self.close()

    async def close(self) -> None:
        """See `KVTierClient.close`."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    # -- programs ----------------------------------------------------------------------------------

    async def list_programs(
        self,
        *,
        states: Collection[str] = (),
        tenant: str | None = None,
        page_size: int = 0,
        page_token: str = "",
        timeout_s: float | None = None,
    ) -> ProgramPage:
        """See `KVTierClient.list_programs`."""
        call = programs.list_programs(states, tenant, page_size, page_token)
        return await self._call(call, timeout_s)

    async def iter_programs(
        self,
        *,
        states: Collection[str] = (),
        tenant: str | None = None,
        page_size: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Program]:
        """See `KVTierClient.iter_programs`."""
        token = ""
        while True:
            page = await self.list_programs(
                states=states,
                tenant=tenant,
                page_size=page_size,
                page_token=token,
                timeout_s=timeout_s,
            )
            for program in page.programs:
                yield program
            if not (token := page.next_page_token):
                return

    async def get_program(
        self, name: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> tuple[Program, ...]:
        """See `KVTierClient.get_program`."""
        return await self._call(programs.get_program(name, tenant), timeout_s)

    async def pin_program(
        self, name: str, ttl_s: float, *, tenant: str = "", timeout_s: float | None = None
    ) -> Results:
        """See `KVTierClient.pin_program`."""
        return await self._call(programs.pin_program(name, tenant, ttl_s), timeout_s)

    async def release_program(
        self, name: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> Results:
        """See `KVTierClient.release_program`."""
        return await self._call(programs.release_program(name, tenant), timeout_s)

    async def stage_program(
        self, name: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> Results:
        """See `KVTierClient.stage_program`."""
        return await self._call(programs.stage_program(name, tenant), timeout_s)

    async def prefetch_program(
        self, name: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> Results:
        """See `KVTierClient.prefetch_program`."""
        return await self._call(programs.prefetch_program(name, tenant), timeout_s)

    async def announce_tool_call(
        self,
        name: str,
        tool: str,
        *,
        expected_s: float | None = None,
        expected_p90_s: float | None = None,
        tenant: str = "",
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Results:
        """See `KVTierClient.announce_tool_call`."""
        call = programs.announce_tool_call(
            name, tenant, tool, expected_s, expected_p90_s, request_id
        )
        return await self._call(call, timeout_s)

    async def announce_tool_return(
        self,
        name: str,
        *,
        tenant: str = "",
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Results:
        """See `KVTierClient.announce_tool_return`."""
        call = programs.announce_tool_return(name, tenant, request_id)
        return await self._call(call, timeout_s)

    async def end_program(
        self, name: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> Results:
        """See `KVTierClient.end_program`."""
        return await self._call(programs.end_program(name, tenant), timeout_s)

    @asynccontextmanager
    async def tool_call(
        self,
        name: str,
        tool: str,
        *,
        expected_s: float | None = None,
        expected_p90_s: float | None = None,
        tenant: str = "",
    ) -> AsyncIterator[None]:
        """See `KVTierClient.tool_call`."""
        calls = partial(
            programs.announce_tool_call, name, tenant, tool, expected_s, expected_p90_s, None
        )
        returns = partial(programs.announce_tool_return, name, tenant, None)
        await self._announce("the call", name, calls)
        try:
            yield
        except Exception:
            await self._announce("the return", name, returns)
            raise
        await self._announce("the return", name, returns)

    async def _announce(self, what: str, name: str, make: Callable[[], Call[Any, Any]]) -> None:
        timeout_s = min(self._timeout_s, ANNOUNCE_TIMEOUT_S)
        try:
            await self._call(make(), timeout_s, retry=False)
        # A token file that has gone; an expected time that is not finite, a text, or too large.
        except (ControlError, ValueError, TypeError, OverflowError) as error:
            self._announced(what, name, error)
        else:
            self._announced(what, name, None)

    # -- TTLs --------------------------------------------------------------------------------------

    async def set_ttl_override(
        self,
        scope: TtlScope,
        ttl_s: float,
        *,
        mode: str = TtlMode.FIXED,
        expires_at: datetime | None = None,
        timeout_s: float | None = None,
    ) -> AppliedOverride:
        """See `KVTierClient.set_ttl_override`."""
        return await self._call(ttls.set_ttl_override(scope, ttl_s, mode, expires_at), timeout_s)

    async def list_ttl_overrides(
        self, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = None
    ) -> TtlOverridePage:
        """See `KVTierClient.list_ttl_overrides`."""
        return await self._call(ttls.list_ttl_overrides(page_size, page_token), timeout_s)

    async def iter_ttl_overrides(
        self, *, page_size: int = 0, timeout_s: float | None = None
    ) -> AsyncIterator[TtlOverride]:
        """See `KVTierClient.iter_ttl_overrides`."""
        token = ""
        while True:
            page = await self.list_ttl_overrides(
                page_size=page_size, page_token=token, timeout_s=timeout_s
            )
            for override in page.overrides:
                yield override
            if not (token := page.next_page_token):
                return

    async def delete_ttl_override(
        self, scope: TtlScope, *, timeout_s: float | None = None
    ) -> DeletedOverride:
        """See `KVTierClient.delete_ttl_override`."""
        return await self._call(ttls.delete_ttl_override(scope), timeout_s)

    # -- policy ------------------------------------------------------------------------------------

    async def get_policy(
        self, *, engine_id: str = "", timeout_s: float | None = None
    ) -> tuple[EnginePolicy, ...]:
        """See `KVTierClient.get_policy`."""
        return await self._call(policies.get_policy(engine_id), timeout_s)

    async def update_policy(
        self,
        *,
        engine_id: str = "",
        mode: str | None = None,
        pin_budget_fraction: float | None = None,
        max_ttl_s: float | None = None,
        admission: str | None = None,
        aging_s: float | None = None,
        max_defer_s: float | None = None,
        stage: bool | None = None,
        tenant_budgets: Iterable[TenantBudget] | None = None,
        timeout_s: float | None = None,
    ) -> PolicyUpdate:
        """See `KVTierClient.update_policy`."""
        call = policies.update_policy(
            engine_id,
            mode=mode,
            pin_budget_fraction=pin_budget_fraction,
            max_ttl_s=max_ttl_s,
            admission=admission,
            aging_s=aging_s,
            max_defer_s=max_defer_s,
            stage=stage,
            tenant_budgets=tenant_budgets,
        )
        return await self._call(call, timeout_s)

    # -- observability -----------------------------------------------------------------------------

    async def get_status(self, *, timeout_s: float | None = None) -> Status:
        """See `KVTierClient.get_status`."""
        return await self._call(observing.get_status(), timeout_s)

    async def explain_decision(
        self, name: str, *, tenant: str = "", limit: int = 0, timeout_s: float | None = None
    ) -> tuple[Decision, ...]:
        """See `KVTierClient.explain_decision`."""
        return await self._call(observing.explain_decision(name, tenant, limit), timeout_s)

    def watch(self, *, kinds: Iterable[str] = (), name: str = "", tenant: str = "") -> AsyncWatch:
        """See `KVTierClient.watch`."""
        call = observing.watch_events(kinds, name, tenant)
        method = self._opened().unary_stream(
            call.path,
            request_serializer=_serialize,
            response_deserializer=call.response.FromString,
        )
        return AsyncWatch(method(call.request, metadata=self.connection.metadata()))

    async def calibrate(self, *, engine_id: str = "", timeout_s: float | None = None) -> Results:
        """See `KVTierClient.calibrate`."""
        return await self._call(observing.calibrate(engine_id), timeout_s)

    # -- calls -------------------------------------------------------------------------------------

    def _opened(self) -> grpc.aio.Channel:
        if self._channel is None:
            credentials, options = self.connection.credentials(), self.connection.options()
            target = self.connection.target
            if credentials is None:
                self._channel = grpc.aio.insecure_channel(target, options)
            else:
                self._channel = grpc.aio.secure_channel(target, credentials, options)
        return self._channel

    async def _call(
        self, call: Call[ResponseT, ResultT], timeout_s: float | None, *, retry: bool = True
    ) -> ResultT:
        attempts = Attempts(
            self._timeout_s if timeout_s is None else timeout_s, retry=retry and call.idempotent
        )
        method = self._opened().unary_unary(
            call.path,
            request_serializer=_serialize,
            response_deserializer=call.response.FromString,
        )
        while True:
            try:
                response = await method(
                    call.request,
                    timeout=attempts.left_s(),
                    metadata=self.connection.metadata(),
                )
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
                delay_s = attempts.delay_after(failure)
                if delay_s is None:
                    raise failure from error
                await asyncio.sleep(delay_s)
            else:
                return call.decode(response)


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())
