"""Client of kvtier's control API, for operators' scripts and agent frameworks.

    with KVTierClient() as client, client.tool_call("my-agent", "bash", expected_s=30):
        run_the_tool()

`KVTierClient` waits for answers, `AsyncKVTierClient` is its twin for asyncio. What they return are frozen
dataclasses with seconds as floats and aware datetimes; what they raise is a `ControlError` or, before
anything is sent, a `ClientConfigError` or `ValueError`. No part of an engine is imported.
"""

from kvtier.client.aio import AsyncKVTierClient
from kvtier.client.connection import Connection
from kvtier.client.errors import (
    AlreadyExists,
    ClientConfigError,
    ControlError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from kvtier.client.records import (
    Admission,
    AppliedOverride,
    CommandResult,
    CpuTier,
    Decision,
    DeletedOverride,
    EnginePolicy,
    EngineStatus,
    Event,
    GpuTier,
    Link,
    Lost,
    Mode,
    OptionCost,
    Outcome,
    Policy,
    PolicyUpdate,
    Program,
    ProgramPage,
    ProgramState,
    Queue,
    Status,
    TenantBudget,
    TtlMode,
    TtlOverride,
    TtlOverridePage,
    TtlScope,
)
from kvtier.client.sync import KVTierClient
from kvtier.client.watching import AsyncWatch, Watch

__all__ = [
    "Admission",
    "AlreadyExists",
    "AppliedOverride",
    "AsyncKVTierClient",
    "AsyncWatch",
    "ClientConfigError",
    "CommandResult",
    "Connection",
    "ControlError",
    "CpuTier",
    "DeadlineExceeded",
    "Decision",
    "DeletedOverride",
    "EnginePolicy",
    "EngineStatus",
    "Event",
    "FailedPrecondition",
    "GpuTier",
    "InvalidArgument",
    "KVTierClient",
    "Link",
    "Lost",
    "Mode",
    "NotFound",
    "OptionCost",
    "Outcome",
    "PermissionDenied",
    "Policy",
    "PolicyUpdate",
    "Program",
    "ProgramPage",
    "ProgramState",
    "Queue",
    "ResourceExhausted",
    "Status",
    "TenantBudget",
    "TtlMode",
    "TtlOverride",
    "TtlOverridePage",
    "TtlScope",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Watch",
]
