"""`kvtier.v1.ProgramService`: programs, and what clients and operators ask for them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from kvtier import link_messages as link
from kvtier.control.api import as_proto
from kvtier.control.api.callers import current_caller
from kvtier.control.api.idempotency import RepeatableCalls
from kvtier.control.api.listings import Listings
from kvtier.control.api.page_tokens import BadPageTokenError, PageTokens
from kvtier.control.api.validation import Violations
from kvtier.v1 import program_pb2, program_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvtier.control.api.listings import ListedProgram
    from kvtier.control.api.state import ServerState
    from kvtier.control.program_picture import ProgramPicture
    from kvtier.control.registry import EngineRecord
    from kvtier.link_messages import ProgramKey
    from kvtier.v1.outcome_pb2 import CommandResult

Results = list["CommandResult"]


class ProgramService(program_pb2_grpc.ProgramServiceServicer):
    """See the module's docstring.

    Args:
        state: What the services share.
        monotonic: Monotonic time.
    """

    def __init__(self, state: ServerState, monotonic: Callable[[], float]) -> None:
        self._state = state
        self._tokens = PageTokens()
        self.listings = Listings(monotonic)
        self._announced = RepeatableCalls[Results](monotonic)

    # -- reading -------------------------------------------------------------------------------------

    async def ListPrograms(  # noqa: N802 - gRPC's names
        self, request: program_pb2.ListProgramsRequest, context: Any
    ) -> program_pb2.ListProgramsResponse:
        """See the proto."""
        del context
        bad = Violations()
        size = bad.page_size("page_size", request.page_size)
        states = self._states(request, bad)
        tenants = self._tenants(request, bad)
        filters = [sorted(states), tenants]
        keys: list[ListedProgram] | None = None
        start, list_id = 0, b""
        if request.page_token:
            try:
                list_id, start = self._tokens.read(request.page_token, filters)
                keys = self.listings.get(list_id)
            except BadPageTokenError as error:
                bad.add("page_token", str(error))
            else:
                if keys is None:
                    bad.add("page_token", "is too old; accepted is a list that is begun anew")
        bad.check()
        self._state.engines()
        if keys is None:
            keys = self._sorted_keys(states, tenants)
        response = program_pb2.ListProgramsResponse(total_size=len(keys))
        now_s = self._state.clock()
        for position in range(start, len(keys)):
            if len(response.programs) == size:
                list_id = list_id or self.listings.keep(keys)
                response.next_page_token = self._tokens.make(filters, [list_id, position])
                break
            found = self._look_up(keys[position])
            # It may be gone by now, or in another state.
            if found is not None and _matches(found[1], states, tenants):
                response.programs.append(as_proto.program(*found, now_s))
        return response

    async def GetProgram(  # noqa: N802
        self, request: program_pb2.GetProgramRequest, context: Any
    ) -> program_pb2.GetProgramResponse:
        """See the proto."""
        del context
        bad = Violations()
        tenant, name = bad.program(request.name, request.tenant)
        bad.check()
        now_s = self._state.clock()
        found = self._state.program(tenant, name)
        return program_pb2.GetProgramResponse(
            programs=[as_proto.program(engine, program, now_s) for engine, program in found]
        )

    # -- commands ------------------------------------------------------------------------------------

    async def PinProgram(  # noqa: N802
        self, request: program_pb2.PinProgramRequest, context: Any
    ) -> program_pb2.PinProgramResponse:
        """See the proto."""
        del context
        bad = Violations()
        program = bad.program(request.name, request.tenant)
        ttl_s = bad.seconds("ttl", request.ttl, above_zero=True)
        bad.check()
        return program_pb2.PinProgramResponse(
            results=await self._command(
                *program, lambda key: link.PinCommand(id=0, program=key, ttl_s=ttl_s)
            )
        )

    async def ReleaseProgram(  # noqa: N802
        self, request: program_pb2.ReleaseProgramRequest, context: Any
    ) -> program_pb2.ReleaseProgramResponse:
        """See the proto."""
        del context
        return program_pb2.ReleaseProgramResponse(
            results=await self._command(
                *_program(request), lambda key: link.ReleaseCommand(id=0, program=key)
            )
        )

    async def StageProgram(  # noqa: N802
        self, request: program_pb2.StageProgramRequest, context: Any
    ) -> program_pb2.StageProgramResponse:
        """See the proto."""
        del context
        return program_pb2.StageProgramResponse(
            results=await self._command(
                *_program(request), lambda key: link.StageCommand(id=0, program=key)
            )
        )

    async def PrefetchProgram(  # noqa: N802
        self, request: program_pb2.PrefetchProgramRequest, context: Any
    ) -> program_pb2.PrefetchProgramResponse:
        """See the proto."""
        del context
        return program_pb2.PrefetchProgramResponse(
            results=await self._command(
                *_program(request), lambda key: link.PrefetchCommand(id=0, program=key)
            )
        )

    async def EndProgram(  # noqa: N802
        self, request: program_pb2.EndProgramRequest, context: Any
    ) -> program_pb2.EndProgramResponse:
        """See the proto."""
        del context
        return program_pb2.EndProgramResponse(
            results=await self._command(
                *_program(request), lambda key: link.EndCommand(id=0, program=key)
            )
        )

    # -- announcements -------------------------------------------------------------------------------

    async def AnnounceToolCall(  # noqa: N802
        self, request: program_pb2.AnnounceToolCallRequest, context: Any
    ) -> program_pb2.AnnounceToolCallResponse:
        """See the proto."""
        del context
        bad = Violations()
        program = bad.program(request.name, request.tenant)
        tool = bad.tool("tool", request.tool)
        bad.request_id("request_id", request.request_id)
        p50_s, p90_s = _expected(request, bad)
        bad.check()
        results = await self._once(
            "AnnounceToolCall",
            request,
            *program,
            lambda key: link.ToolCallCommand(
                id=0, program=key, tool=tool, p50_s=p50_s, p90_s=p90_s
            ),
        )
        return program_pb2.AnnounceToolCallResponse(results=results)

    async def AnnounceToolReturn(  # noqa: N802
        self, request: program_pb2.AnnounceToolReturnRequest, context: Any
    ) -> program_pb2.AnnounceToolReturnResponse:
        """See the proto."""
        del context
        bad = Violations()
        program = bad.program(request.name, request.tenant)
        bad.request_id("request_id", request.request_id)
        bad.check()
        results = await self._once(
            "AnnounceToolReturn",
            request,
            *program,
            lambda key: link.ToolReturnCommand(id=0, program=key),
        )
        return program_pb2.AnnounceToolReturnResponse(results=results)

    # -- internals -----------------------------------------------------------------------------------

    async def _command(
        self, tenant: str | None, name: str, make: Callable[[ProgramKey], link.Command]
    ) -> Results:
        """Send a command to every engine that knows the program."""
        found = self._state.program(tenant, name)
        commands = [(engine.engine_id, make(program.key)) for engine, program in found]
        return [as_proto.command_result(a) for a in await self._state.ask_all(commands)]

    async def _once(
        self,
        method: str,
        request: program_pb2.AnnounceToolCallRequest | program_pb2.AnnounceToolReturnRequest,
        tenant: str | None,
        name: str,
        make: Callable[[ProgramKey], link.Command],
    ) -> Results:
        """As `_command`, once for each request id."""
        if not request.request_id:
            return await self._command(tenant, name, make)
        content = copy.copy(request)
        content.ClearField("request_id")
        # What is not understood makes no other request of it.
        content.DiscardUnknownFields()
        return await self._announced.run(
            (method, current_caller().tenant or "", request.request_id),
            content.SerializeToString(deterministic=True),
            lambda: self._command(tenant, name, make),
        )

    def _states(self, request: program_pb2.ListProgramsRequest, bad: Violations) -> frozenset[str]:
        """The states that are asked for; empty: all."""
        names = {number: name for name, number in as_proto.STATES.items()}
        states = set()
        for index, state in enumerate(request.states):
            if state in names:
                states.add(names[state])
            else:
                bad.add(f"states[{index}]", f"is {state}; accepted is waiting, running or paused")
                break
        return frozenset(states)

    def _tenants(
        self, request: program_pb2.ListProgramsRequest, bad: Violations
    ) -> list[str | None] | None:
        """The tenants that are asked for and may be seen; None: all."""
        bound = current_caller().tenant
        if not request.HasField("tenant"):
            return None if bound is None else [bound]
        tenant = bad.tenant("tenant", request.tenant)
        return [tenant] if current_caller().sees(tenant) else []

    def _sorted_keys(
        self, states: frozenset[str], tenants: list[str | None] | None
    ) -> list[ListedProgram]:
        found = [
            (-program.last_active_s, engine.engine_id, program.key)
            for engine, program in self._state.registry.programs()
            if _matches(program, states, tenants)
        ]
        found.sort(key=_order)
        return [(engine_id, key) for _, engine_id, key in found]

    def _look_up(self, listed: ListedProgram) -> tuple[EngineRecord, ProgramPicture] | None:
        engine = self._state.registry.engine(listed[0])
        program = None if engine is None else engine.programs.get(listed[1])
        return None if engine is None or program is None else (engine, program)


def _order(listed: tuple[float, str, ProgramKey]) -> tuple[float, str, str, str]:
    negative_s, engine_id, key = listed
    return negative_s, engine_id, key.tenant or "", key.name


def _matches(
    program: ProgramPicture, states: frozenset[str], tenants: list[str | None] | None
) -> bool:
    if states and program.activity not in states:
        return False
    return tenants is None or program.key.tenant in tenants


def _program(request: Any) -> tuple[str | None, str]:
    """Tenant and name of a request that holds nothing else."""
    bad = Violations()
    program = bad.program(request.name, request.tenant)
    bad.check()
    return program


def _expected(
    request: program_pb2.AnnounceToolCallRequest, bad: Violations
) -> tuple[float | None, float | None]:
    """Median and 90th percentile of how long a tool is expected to run, seconds."""
    match request.WhichOneof("expected"):
        case "duration":
            return bad.seconds("duration", request.duration), None
        case "quantiles":
            found: Iterator[float | None] = (
                bad.seconds(f"quantiles.{name}", getattr(request.quantiles, name))
                if request.quantiles.HasField(name)
                else None
                for name in ("p50", "p90")
            )
            p50_s, p90_s = found
            if p50_s is None and p90_s is None:
                bad.add("quantiles", "is empty; accepted is p50, p90 or both")
            if p50_s is not None and p90_s is not None and p90_s < p50_s:
                bad.add("quantiles.p90", "is less than p50; accepted is at least p50")
            return p50_s, p90_s
        case _:
            return None, None
