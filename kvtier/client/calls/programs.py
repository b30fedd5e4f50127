"""Calls of the `ProgramService`."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from kvtier.client import decoding
from kvtier.client.calls.call import Call, Results, duration, enum_number, of_service
from kvtier.client.records import Program, ProgramPage, ProgramState
from kvtier.v1 import program_pb2

if TYPE_CHECKING:
    from collections.abc import Collection

_program = of_service("ProgramService")


def list_programs(
    states: Collection[str], tenant: str | None, page_size: int, page_token: str
) -> Call[program_pb2.ListProgramsResponse, ProgramPage]:
    """See `KVTierClient.list_programs`."""
    request = program_pb2.ListProgramsRequest(
        states=[_program_state(state) for state in states],
        tenant=tenant,
        page_size=page_size,
        page_token=page_token,
    )
    return _program(
        "ListPrograms", request, program_pb2.ListProgramsResponse, decoding.program_page
    )


def get_program(
    name: str, tenant: str
) -> Call[program_pb2.GetProgramResponse, tuple[Program, ...]]:
    """See `KVTierClient.get_program`."""
    request = program_pb2.GetProgramRequest(name=name, tenant=tenant)
    return _program("GetProgram", request, program_pb2.GetProgramResponse, decoding.programs)


def pin_program(
    name: str, tenant: str, ttl_s: float
) -> Call[program_pb2.PinProgramResponse, Results]:
    """See `KVTierClient.pin_program`."""
    request = program_pb2.PinProgramRequest(name=name, tenant=tenant, ttl=duration(ttl_s, "ttl_s"))
    return _program("PinProgram", request, program_pb2.PinProgramResponse, decoding.results)


def release_program(name: str, tenant: str) -> Call[program_pb2.ReleaseProgramResponse, Results]:
    """See `KVTierClient.release_program`."""
    return _program(
        "ReleaseProgram",
        program_pb2.ReleaseProgramRequest(name=name, tenant=tenant),
        program_pb2.ReleaseProgramResponse,
        decoding.results,
        idempotent=False,
    )


def stage_program(name: str, tenant: str) -> Call[program_pb2.StageProgramResponse, Results]:
    """See `KVTierClient.stage_program`."""
    return _program(
        "StageProgram",
        program_pb2.StageProgramRequest(name=name, tenant=tenant),
        program_pb2.StageProgramResponse,
        decoding.results,
        idempotent=False,
    )


def prefetch_program(name: str, tenant: str) -> Call[program_pb2.PrefetchProgramResponse, Results]:
    """See `KVTierClient.prefetch_program`."""
    return _program(
        "PrefetchProgram",
        program_pb2.PrefetchProgramRequest(name=name, tenant=tenant),
        program_pb2.PrefetchProgramResponse,
        decoding.results,
        idempotent=False,
    )


def announce_tool_call(
    name: str,
    tenant: str,
    tool: str,
    expected_s: float | None,
    expected_p90_s: float | None,
    request_id: str | None,
) -> Call[program_pb2.AnnounceToolCallResponse, Results]:
    """See `KVTierClient.announce_tool_call`."""
    request = program_pb2.AnnounceToolCallRequest(
        name=name, tenant=tenant, tool=tool, request_id=request_id or uuid.uuid4().hex
    )
    if expected_p90_s is not None:
        request.quantiles.p90.CopyFrom(duration(expected_p90_s, "expected_p90_s"))
        if expected_s is not None:
            request.quantiles.p50.CopyFrom(duration(expected_s, "expected_s"))
    elif expected_s is not None:
        request.duration.CopyFrom(duration(expected_s, "expected_s"))
    return _program(
        "AnnounceToolCall", request, program_pb2.AnnounceToolCallResponse, decoding.results
    )


def announce_tool_return(
    name: str, tenant: str, request_id: str | None
) -> Call[program_pb2.AnnounceToolReturnResponse, Results]:
    """See `KVTierClient.announce_tool_return`."""
    request = program_pb2.AnnounceToolReturnRequest(
        name=name, tenant=tenant, request_id=request_id or uuid.uuid4().hex
    )
    return _program(
        "AnnounceToolReturn", request, program_pb2.AnnounceToolReturnResponse, decoding.results
    )


def end_program(name: str, tenant: str) -> Call[program_pb2.EndProgramResponse, Results]:
    """See `KVTierClient.end_program`."""
    return _program(
        "EndProgram",
        program_pb2.EndProgramRequest(name=name, tenant=tenant),
        program_pb2.EndProgramResponse,
        decoding.results,
        idempotent=False,
    )


def _program_state(state: str) -> Any:
    return enum_number(program_pb2.ProgramState, "PROGRAM_STATE_", ProgramState, state, "states")
