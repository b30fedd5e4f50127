"""What the control API answers, as plain values: seconds (`_s`) are floats, datetimes are aware (UTC).

The fields are those of `proto/kvtier/v1`, where each is described; None stands for what is not set there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

# Each has UNKNOWN for what a newer server may say.


class ProgramState(StrEnum):
    """What a program does."""

    UNKNOWN = "unknown"
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"


class Outcome(StrEnum):
    """What became of a command."""

    UNKNOWN = "unknown"
    ACCEPTED = "accepted"
    CLIPPED = "clipped"
    DEFERRED = "deferred"
    REJECTED = "rejected"
    MISSING = "missing"


class TtlMode(StrEnum):
    """How an override bounds the TTL that kvtier chooses."""

    UNKNOWN = "unknown"
    FIXED = "fixed"
    CAP = "cap"
    FLOOR = "floor"


class Mode(StrEnum):
    """What kvtier does at all."""

    UNKNOWN = "unknown"
    ON = "on"
    SHADOW = "shadow"
    OFF = "off"


class Admission(StrEnum):
    """Order of waiting requests."""

    UNKNOWN = "unknown"
    OFF = "off"
    PROGRAM_FCFS = "program_fcfs"
    WORKING_SET = "working_set"


@dataclass(frozen=True, slots=True)
class CommandResult:
    """One engine's answer to a command."""

    outcome: Outcome
    reason: str
    detail: str
    engine_id: str

    @property
    def is_done(self) -> bool:
        """Whether it was done, in full or in part, or will be at the engine's next step."""
        return self.outcome in {Outcome.ACCEPTED, Outcome.CLIPPED, Outcome.DEFERRED}


# -- programs --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Program:
    """A program as one engine knows it; `tenant` is vLLM's `cache_salt`, empty without one."""

    name: str
    tenant: str
    named: bool
    state: ProgramState
    engine_id: str
    turns: int
    context_tokens: int
    gpu_pinned_tokens: int
    cpu_tokens: int
    tool: str | None
    started_at: datetime | None
    last_active_at: datetime | None
    predicted_return_at: datetime | None
    ttl_left_s: float | None


@dataclass(frozen=True, slots=True)
class ProgramPage:
    """A page of programs; the last one's `next_page_token` is empty."""

    programs: tuple[Program, ...]
    next_page_token: str
    total_size: int


# -- TTLs ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TtlScope:
    """Which pauses an override is for.

    Attributes:
        kind: Of what; `program` is the most specific one, `all` the least.
        name: Of the program or the tool; empty for the others.
        tenant: Of the program, or the tenant that is meant.
    """

    kind: Literal["program", "tool", "tenant", "all"]
    name: str = ""
    tenant: str = ""

    @classmethod
    def of_program(cls, name: str, tenant: str = "") -> TtlScope:
        """Pauses of one program."""
        return cls("program", name, tenant)

    @classmethod
    def of_tool(cls, tool: str) -> TtlScope:
        """Pauses after calls of a tool, of all tenants."""
        return cls("tool", tool)

    @classmethod
    def of_tenant(cls, tenant: str) -> TtlScope:
        """Pauses of a tenant's programs."""
        return cls("tenant", tenant=tenant)

    @classmethod
    def of_all(cls) -> TtlScope:
        """All pauses."""
        return cls("all")

    def __str__(self) -> str:
        match self.kind:
            case "program":
                return f"program {self.name}" + (f" of {self.tenant}" if self.tenant else "")
            case "tool":
                return f"tool {self.name}"
            case "tenant":
                return f"tenant {self.tenant}" if self.tenant else "requests without a tenant"
            case _:
                return self.kind


@dataclass(frozen=True, slots=True)
class TtlOverride:
    """An override that holds, until `expires_at` or for good."""

    scope: TtlScope
    mode: TtlMode
    ttl_s: float
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class AppliedOverride:
    """An override that was set.

    Attributes:
        override: As the server understood it.
        engines: That have it; later ones get it too.
        saved: False where it ends with the control server, whose state file cannot be written.
    """

    override: TtlOverride
    engines: int
    saved: bool


@dataclass(frozen=True, slots=True)
class DeletedOverride:
    """An override that was deleted.

    Attributes:
        engines: That do not have it any more.
        saved: False where it is back after a restart: the state file cannot be written.
    """

    engines: int
    saved: bool


@dataclass(frozen=True, slots=True)
class TtlOverridePage:
    """A page of overrides; the last one's `next_page_token` is empty."""

    overrides: tuple[TtlOverride, ...]
    next_page_token: str


# -- policy ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TenantBudget:
    """Pinned GPU memory that a tenant may use in each period: bytes times seconds."""

    tenant: str
    byte_seconds: int
    period_s: float


@dataclass(frozen=True, slots=True)
class Policy:
    """What of an engine's settings may change while it runs."""

    mode: Mode
    pin_budget_fraction: float
    max_ttl_s: float
    admission: Admission
    aging_s: float
    max_defer_s: float
    stage: bool
    tenant_budgets: tuple[TenantBudget, ...]


@dataclass(frozen=True, slots=True)
class EnginePolicy:
    """The policy of one engine."""

    engine_id: str
    policy: Policy


@dataclass(frozen=True, slots=True)
class PolicyUpdate:
    """The policies after an update, and what each engine said to it."""

    policies: tuple[EnginePolicy, ...]
    results: tuple[CommandResult, ...]


# -- observability ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GpuTier:
    """GPU memory for KV, bytes; pins may hold `budget_bytes` of it."""

    total_bytes: int
    free_bytes: int
    pinned_bytes: int
    budget_bytes: int
    programs: int


@dataclass(frozen=True, slots=True)
class CpuTier:
    """The CPU tier; `state` is ready, starting, lost or off.

    `used_bytes` is what the KV of all engines that share it takes; None where it is not known.
    """

    state: str
    total_bytes: int
    staging_programs: int
    loading_requests: int
    used_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """The way between the tiers; `calibrated_at` is None where nothing has been measured."""

    to_cpu_bytes_per_s: float
    to_gpu_bytes_per_s: float
    calibrated_at: datetime | None


@dataclass(frozen=True, slots=True)
class Queue:
    """Requests of an engine; `delay_s` is expected for one that arrives now."""

    running_requests: int
    waiting_requests: int
    waiting_tokens: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One engine (a data-parallel rank counts as one); the figures are of `reported_at`."""

    engine_id: str
    model: str
    pid: int
    mode: str
    started_at: datetime | None
    reported_at: datetime | None
    wakeable: bool
    gpu: GpuTier
    cpu: CpuTier
    link: Link
    queue: Queue
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Status:
    """The control server (`version` is its own) and the engines of its host."""

    version: str
    engines: tuple[EngineStatus, ...]
    started_at: datetime | None
    watchers: int


@dataclass(frozen=True, slots=True)
class OptionCost:
    """Expected seconds that an option costs. `parts_s`, what they are made of, is empty so far."""

    option: str
    cost_s: float
    parts_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a program's KV waits (`event` is pause) or comes from (return), and why.

    Or what became of a prefetch, or why a pin is no more (release).
    """

    engine_id: str
    request_id: str
    decided_at: datetime | None
    event: str
    action: str
    reason: str
    ttl_s: float | None
    costs: tuple[OptionCost, ...]
    inputs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; `decision` and `fields` say more where there is more to say."""

    kind: str
    engine_id: str
    happened_at: datetime | None
    name: str
    tenant: str
    request_id: str
    decision: Decision | None
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Lost:
    """So many events did not reach this watcher, because it read too slowly."""

    events: int
