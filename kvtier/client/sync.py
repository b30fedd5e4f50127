"""The client that waits for its answers."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import grpc

from kvtier.client.base import ANNOUNCE_TIMEOUT_S, BaseClient
from kvtier.client.calls import observing, policies, programs, ttls
from kvtier.client.errors import ControlError, from_rpc_error
from kvtier.client.records import TtlMode
from kvtier.client.retries import Attempts
from kvtier.client.watching import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
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


class KVTierClient(BaseClient):
    """kvtier's control API. Threads may share a client; forked processes may not.

    A program is named by `name` and `tenant` (vLLM's `cache_salt`; empty: requests without one). Every call
    takes `timeout_s`, by default the client's; it raises `ControlError`, or `ValueError` for what cannot
    even be sent. Calls that are idempotent are sent again, up to three times within the timeout, while the
    server is unavailable.
    """

    _channel: grpc.Channel | None = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection, and end all watches. Idempotent; a later call connects anew."""
        with self._opening:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    # -- programs ----------------------------------------------------------------------------------

    def list_programs(
        self,
        *,
        states: Collection[str] = (),
        tenant: str | None = None,
        page_size: int = 0,
        page_token: str = "",
        timeout_s: float | None = None,
    ) -> ProgramPage:
        """Return a page of programs, most recently active first.

        Args:
            states: Only of these ("waiting", "running", "paused"); empty: all.
            tenant: Only of this one; None: all.
            page_size: 1 to 1000; 0: the server's default.
            page_token: `next_page_token` of the page before, with the same filters.
            timeout_s: Seconds.
        """
        call = programs.list_programs(states, tenant, page_size, page_token)
        return self._call(call, timeout_s)

    def iter_programs(
        self,
        *,
        states: Collection[str] = (),
        tenant: str | None = None,
        page_size: int = 0,
        timeout_s: float | None = None,
    ) -> Iterator[Program]:
        """Go through all programs, page by page; `timeout_s` is for each page."""
        token = ""
        while True:
            page = self.list_programs(
                states=states,
                tenant=tenant,
                page_size=page_size,
                page_token=token,
                timeout_s=timeout_s,
            )
            yield from page.programs
            if not (token := page.next_page_token):
                return

    def get_program(
        self, name: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> tuple[Program, ...]:
        """Return a program, once for each engine that knows it. Raises `NotFound`."""
        return self._call(programs.get_program(name, tenant), timeout_s)

    def pin_program(
        self, name: str, ttl_s: float, *, tenant: str = "", timeout_s: float | None = None
    ) -> Results:
        """Keep a paused program's KV in GPU memory for `ttl_s` seconds from now."""
        return self._call(programs.pin_program(name, tenant, ttl_s), timeout_s)

    def release_program(
        self, name: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> Results:
        """Give up a paused program's KV in GPU memory; its copy in the CPU tier stays."""
        return self._call(programs.release_program(name, tenant), timeout_s)

    def stage_program(
        self, name: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> Results:
        """Copy a paused program's KV to the CPU tier."""
        return self._call(programs.stage_program(name, tenant), timeout_s)

    def prefetch_program(
        self, name: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> Results:
        """Load a paused program's KV from the CPU tier: it is about to return."""
        return self._call(programs.prefetch_program(name, tenant), timeout_s)

    def announce_tool_call(
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
        """Say which tool a program runs now.

        Args:
            name: Of the program.
            tool: Of the tool.
            expected_s: How long it is expected to run from now, seconds; the median, where
                `expected_p90_s` is given too.
            expected_p90_s: Nine of ten such calls are over by then, seconds.
            tenant: Of the program.
            request_id: A repeated call with the same id is done once. Default: a new one.
            timeout_s: Seconds.
        """
        call = programs.announce_tool_call(
            name, tenant, tool, expected_s, expected_p90_s, request_id
        )
        return self._call(call, timeout_s)

    def announce_tool_return(
        self,
        name: str,
        *,
        tenant: str = "",
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Results:
        """Say that a program's tool has returned or is about to: its KV is brought back."""
        call = programs.announce_tool_return(name, tenant, request_id)
        return self._call(call, timeout_s)

    def end_program(
        self, name: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> Results:
        """Say that a program is over: its KV is given up everywhere."""
        return self._call(programs.end_program(name, tenant), timeout_s)

    @contextmanager
    def tool_call(
        self,
        name: str,
        tool: str,
        *,
        expected_s: float | None = None,
        expected_p90_s: float | None = None,
        tenant: str = "",
    ) -> Iterator[None]:
        """Announce a tool call for the body, and its return after it.

        The body runs whatever the control server does: a failed announcement is logged, the first of
        several as a warning, and delays the agent by at most a second. Each is tried once. A tool that
        raises an `Exception` has returned; a body that is left by anything else (a `KeyboardInterrupt`,
        a cancelled task) ends without an announcement, as its agent does.
        """
        calls = partial(
            programs.announce_tool_call, name, tenant, tool, expected_s, expected_p90_s, None
        )
        returns = partial(programs.announce_tool_return, name, tenant, None)
        self._announce("the call", name, calls)
        try:
            yield
        except Exception:
            self._announce("the return", name, returns)
            raise
        self._announce("the return", name, returns)

    def _announce(self, what: str, name: str, make: Callable[[], Call[Any, Any]]) -> None:
        timeout_s = min(self._timeout_s, ANNOUNCE_TIMEOUT_S)
        try:
            self._call(make(), timeout_s, retry=False)
        # A token file that has gone; an expected time that is not finite, a text, or too large.
        except (ControlError, ValueError, TypeError, OverflowError) as error:
            self._announced(what, name, error)
        else:
            self._announced(what, name, None)

    # -- TTLs --------------------------------------------------------------------------------------

    def set_ttl_override(
        self,
        scope: TtlScope,
        ttl_s: float,
        *,
        mode: str = TtlMode.FIXED,
        expires_at: datetime | None = None,
        timeout_s: float | None = None,
    ) -> AppliedOverride:
        """Override the TTL that kvtier chooses for a scope's pauses, in place of an earlier override.

        Args:
            scope: Which pauses, e.g. `TtlScope.of_tool("bash")`.
            ttl_s: Seconds; 0 pins nothing.
            mode: "fixed": exactly so long; "cap": at most; "floor": at least.
            expires_at: When the override ends by itself, with a time zone; None: never.
            timeout_s: Seconds.
        """
        return self._call(ttls.set_ttl_override(scope, ttl_s, mode, expires_at), timeout_s)

    def list_ttl_overrides(
        self, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = None
    ) -> TtlOverridePage:
        """Return a page of the overrides that hold, the most specific first."""
        return self._call(ttls.list_ttl_overrides(page_size, page_token), timeout_s)

    def iter_ttl_overrides(
        self, *, page_size: int = 0, timeout_s: float | None = None
    ) -> Iterator[TtlOverride]:
        """Go through all overrides, page by page; `timeout_s` is for each page."""
        token = ""
        while True:
            page = self.list_ttl_overrides(
                page_size=page_size, page_token=token, timeout_s=timeout_s
            )
            yield from page.overrides
            if not (token := page.next_page_token):
                return

    def delete_ttl_override(
        self, scope: TtlScope, *, timeout_s: float | None = None
    ) -> DeletedOverride:
        """Delete the override of a scope. Raises `NotFound` where there is none."""
        return self._call(ttls.delete_ttl_override(scope), timeout_s)

    # -- policy ------------------------------------------------------------------------------------

    def get_policy(
        self, *, engine_id: str = "", timeout_s: float | None = None
    ) -> tuple[EnginePolicy, ...]:
        """Return the policy of one engine, or of all."""
        return self._call(policies.get_policy(engine_id), timeout_s)

    def update_policy(
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
        """Change what is not None, in one engine or in all, until the engine stops.

        The settings are those of the same names (`kvtier config --reference`); `tenant_budgets` replaces
        all budgets.
        """
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
        return self._call(call, timeout_s)

    # -- observability -----------------------------------------------------------------------------

    def get_status(self, *, timeout_s: float | None = None) -> Status:
        """Return the state of the control server and its engines."""
        return self._call(observing.get_status(), timeout_s)

    def explain_decision(
        self, name: str, *, tenant: str = "", limit: int = 0, timeout_s: float | None = None
    ) -> tuple[Decision, ...]:
        """Return the last decisions on a program, newest first; `limit` is 1 to 64, 0: 8."""
        return self._call(observing.explain_decision(name, tenant, limit), timeout_s)

    def watch(self, *, kinds: Iterable[str] = (), name: str = "", tenant: str = "") -> Watch:
        """Follow what happens from now on, for as long as wanted; see `Watch.wait_started`.

        Args:
            kinds: Only of these: "turn_started", "turn_running", "turn_ended", "decision", "pinned",
                "pin_ended", "staged", "loaded", "program_gone", "command", "engine"; empty: all.
            name: Only of this program.
            tenant: Of the program; without a name: only of this tenant's programs.
        """
        call = observing.watch_events(kinds, name, tenant)
        method = self._opened().unary_stream(
            call.path,
            request_serializer=_serialize,
            response_deserializer=call.response.FromString,
        )
        return Watch(method(call.request, metadata=self.connection.metadata()))

    def calibrate(self, *, engine_id: str = "", timeout_s: float | None = None) -> Results:
        """Let one engine, or all, measure the link anew at its next idle moment."""
        return self._call(observing.calibrate(engine_id), timeout_s)

    # -- calls -------------------------------------------------------------------------------------

    def _opened(self) -> grpc.Channel:
        with self._opening:
            if self._channel is None:
                credentials, options = self.connection.credentials(), self.connection.options()
                target = self.connection.target
                if credentials is None:
                    self._channel = grpc.insecure_channel(target, options)
                else:
                    self._channel = grpc.secure_channel(target, credentials, options)
            return self._channel

    def _call(
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
                response = method(
                    call.request,
                    timeout=attempts.left_s(),
                    metadata=self.connection.metadata(),
                )
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
                delay_s = attempts.delay_after(failure)
                if delay_s is None:
                    raise failure from error
                time.sleep(delay_s)
            else:
                return call.decode(response)


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())
