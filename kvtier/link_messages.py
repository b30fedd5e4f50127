"""Messages between engines and the host's control server.

The transport is ZeroMQ over a Unix socket in the run directory, which only the user can enter: the server
is the ROUTER, engines and wakers are DEALERs. A message is one msgpack frame: a tagged `msgspec.Struct`.

An engine says hello, again whenever it is asked to (`Resync`), and from then on reports what changes: the
server keeps its picture of the programs by these events and never asks an engine to answer a read. A
command reaches the engine at its next hook, and has exactly one `Answer`; those of one hook come together.
An engine without work runs no hooks: a waker, in vLLM's API process, makes it run one.

Times are Unix seconds (`_s`): the processes share a host, not a monotonic clock's origin.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

LINK_VERSION: Final = 4
SOCKET_NAME: Final = "kvtier.control.link.sock"

Outcome = Literal["accepted", "clipped", "deferred", "rejected", "missing"]
Mode = Literal["on", "shadow", "off"]
Admission = Literal["off", "program_fcfs", "working_set"]


class ProgramKey(msgspec.Struct, array_like=True, frozen=True):
    """Who a program is. `named` is False where it is known by its prefix alone."""

    tenant: str | None
    name: str
    named: bool = True


class _Message(msgspec.Struct, tag=True, frozen=True, kw_only=True, omit_defaults=True):
    """Base: maps on the wire, tagged by class name; unknown fields of a newer peer are ignored."""


# -- what happens in an engine ---------------------------------------------------------------------


class _Event(_Message, frozen=True, kw_only=True):
    at_s: float
    program: ProgramKey
    request_id: str = ""


class TurnStarted(_Event, frozen=True, kw_only=True):
    """A request has come; `turn` counts from 1, `gap_s` is the pause that it ends.

    `trace` has the request's trace headers, where vLLM traces.
    """

    turn: int
    prompt_tokens: int
    gap_s: float | None = None
    trace: dict[str, str] = {}


class TurnRunning(_Event, frozen=True, kw_only=True):
    """The request has its blocks: where its prompt's KV comes from, in tokens."""

    gpu_tokens: int
    cpu_tokens: int
    recomputed_tokens: int


class TurnEnded(_Event, frozen=True, kw_only=True):
    """The turn is over. `predicted_gap_s` is the median of the pauses after such turns."""

    context_tokens: int
    output_tokens: int
    tool: str | None = None
    predicted_gap_s: float | None = None
    aborted: bool = False


class OptionCost(msgspec.Struct, array_like=True, frozen=True):
    """Expected seconds that an option costs. `parts_s`, what they are made of, is empty so far."""

    option: str
    cost_s: float
    parts_s: dict[str, float] = {}


class Decided(_Event, frozen=True, kw_only=True):
    """A decision, with what it went by. `ttl_s` is 0 where nothing is pinned.

    Of a prefetch: what became of the question, and later `end`, with why as the reason. Engines send no `release`:
    the server makes it of `PinEnded`.
    """

    event: Literal["pause", "return", "prefetch", "release"]
    action: str
    reason: str
    ttl_s: float = 0.0
    costs: list[OptionCost] = []
    inputs: dict[str, str | float | int | bool | None] = {}


class Pinned(_Event, frozen=True, kw_only=True):
    """A pin began, or its deadline has changed; `request_id` names the turn that it keeps."""

    tokens: int
    deadline_s: float


class PinEnded(_Event, frozen=True, kw_only=True):
    """A pin ended; see `kvtier.gpu_pin.ReleaseCause`."""

    cause: str
    tokens: int


class Staged(_Event, frozen=True, kw_only=True):
    """The CPU tier has confirmed that it holds this many tokens of the program, all in all."""

    tokens: int


class Loaded(_Event, frozen=True, kw_only=True):
    """A load from the CPU tier has ended."""

    tokens: int
    duration_s: float
    ok: bool = True


class ProgramGone(_Event, frozen=True, kw_only=True):
    """The engine knows the program no longer."""


Event = (
    TurnStarted
    | TurnRunning
    | TurnEnded
    | Decided
    | Pinned
    | PinEnded
    | Staged
    | Loaded
    | ProgramGone
)


# -- from engines ----------------------------------------------------------------------------------


class TenantBudget(msgspec.Struct, frozen=True):
    """Pinned bytes times seconds that a tenant may use in each period."""

    tenant: str | None
    byte_seconds: int
    period_s: float


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    """What of the settings may change while the engine runs."""

    mode: Mode
    pin_budget_fraction: float
    max_ttl_s: float
    admission: Admission
    aging_s: float
    max_defer_s: float
    stage: bool
    tenant_budgets: list[TenantBudget] = []


class EngineHello(_Message, frozen=True, kw_only=True):
    """An engine and what does not change about it.

    `parent_pid` tells whose API process can wake it; `pid_start_s` is in seconds after the host's boot;
    `on_hosts_tier` is false where it was given another LMCache server than the one that kvtier keeps on the host.
    """

    link: int
    engine_id: str
    pid: int
    pid_start_s: float
    parent_pid: int
    dp_rank: int
    model: str
    started_s: float
    block_tokens: int
    block_bytes: int
    total_blocks: int
    versions: dict[str, str]
    policy: PolicyState
    on_hosts_tier: bool = True


class PinState(msgspec.Struct, array_like=True, frozen=True):
    """One pin of a program."""

    request_id: str
    tokens: int
    deadline_s: float


class ProgramState(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine knows of a program, for a server that has missed the events."""

    program: ProgramKey
    started_s: float
    last_active_s: float
    turns: int
    context_tokens: int
    waiting: list[str] = []
    running: list[str] = []
    pins: list[PinState] = []
    cpu_tokens: int = 0
    tool: str | None = None
    predicted_return_s: float | None = None


class Programs(_Message, frozen=True, kw_only=True):
    """The programs of an engine, after `Resync`, in pages over several steps, with reports between them.

    They replace what was known before: what the pages from the first to the last one do not name, and no
    event since the first one, the engine does not know.
    """

    engine_id: str
    programs: list[ProgramState]
    first: bool
    last: bool = True


class Gauges(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's figures now."""

    mode: Mode
    free_blocks: int
    pinned_blocks: int
    budget_blocks: int
    programs: int
    running_requests: int
    waiting_requests: int
    waiting_tokens: int
    queue_delay_s: float
    tier_state: Literal["ready", "starting", "lost", "off"]
    tier_bytes: int
    staging_programs: int
    loading_requests: int
    to_cpu_bytes_per_s: float
    to_gpu_bytes_per_s: float
    calibrated_s: float | None = None
    tier_used_bytes: int | None = None


class Report(_Message, frozen=True, kw_only=True):
    """What has happened since the last report; `lost` events did not fit."""

    engine_id: str
    sent_s: float
    events: list[Event]
    gauges: Gauges
    lost: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of the command `id`."""

    id: int
    engine_id: str
    outcome: Outcome
    reason: str
    detail: str = ""
    policy: PolicyState | None = None


class Answered(_Message, frozen=True, kw_only=True):
    """What became of the commands that a hook has found, and what had happened until then."""

    engine_id: str
    answers: list[Answer]
    report: Report | None = None


class EngineBye(_Message, frozen=True, kw_only=True):
    """The engine shuts down."""

    engine_id: str


# -- wakers ----------------------------------------------------------------------------------------


class WakerHello(_Message, frozen=True, kw_only=True):
    """An API process that can wake the engines whose parent it is, or whose parent its own is."""

    link: int
    pid: int
    parent_pid: int


ALL_RANKS: Final = -1


class Wake(_Message, frozen=True, kw_only=True):
    """Make the engine of this data-parallel rank run a hook, or all engines with `ALL_RANKS`."""

    dp_rank: int


# -- to engines ------------------------------------------------------------------------------------


class Resync(_Message, frozen=True, kw_only=True):
    """Say hello and send all programs: the server does not know this engine (any more)."""


class _Command(_Message, frozen=True, kw_only=True):
    """`asked_s` is when it was asked for, from when its durations count; None from an older server."""

    id: int
    asked_s: float | None = None


class _ProgramCommand(_Command, frozen=True, kw_only=True):
    program: ProgramKey


class PinCommand(_ProgramCommand, frozen=True, kw_only=True):
    """Keep a paused program in GPU memory for `ttl_s` from `asked_s` on."""

    ttl_s: float


class ReleaseCommand(_ProgramCommand, frozen=True, kw_only=True):
    """Give up a paused program's KV in GPU memory."""


class StageCommand(_ProgramCommand, frozen=True, kw_only=True):
    """Copy a paused program to the CPU tier."""


class PrefetchCommand(_ProgramCommand, frozen=True, kw_only=True):
    """Load a paused program from the CPU tier."""


class ToolCallCommand(_ProgramCommand, frozen=True, kw_only=True):
    """The program runs this tool; expected to take so long, from `asked_s` on."""

    tool: str
    p50_s: float | None = None
    p90_s: float | None = None


class ToolReturnCommand(_ProgramCommand, frozen=True, kw_only=True):
    """The program's tool has returned, or is about to."""


class EndCommand(_ProgramCommand, frozen=True, kw_only=True):
    """The program is over."""


class TtlOverride(msgspec.Struct, frozen=True, kw_only=True):
    """One override: `program`, else `tool`, else `tenant` is set; none of them: all pauses."""

    mode: Literal["fixed", "cap", "floor"]
    ttl_s: float
    program: ProgramKey | None = None
    tool: str | None = None
    tenant: str | None = None
    expires_s: float | None = None


class OverridesCommand(_Command, frozen=True, kw_only=True):
    """All overrides that hold, in place of those before."""

    overrides: list[TtlOverride]


class PolicyCommand(_Command, frozen=True, kw_only=True):
    """Change what is not None."""

    mode: Mode | None = None
    pin_budget_fraction: float | None = None
    max_ttl_s: float | None = None
    admission: Admission | None = None
    aging_s: float | None = None
    max_defer_s: float | None = None
    stage: bool | None = None
    tenant_budgets: list[TenantBudget] | None = None


class CalibrateCommand(_Command, frozen=True, kw_only=True):
    """Measure the link anew."""


Command = (
    PinCommand
    | ReleaseCommand
    | StageCommand
    | PrefetchCommand
    | ToolCallCommand
    | ToolReturnCommand
    | EndCommand
    | OverridesCommand
    | PolicyCommand
    | CalibrateCommand
)

ToServer = EngineHello | Programs | Report | Answered | EngineBye | WakerHello
ToEngine = Resync | Command

encoder = msgspec.msgpack.Encoder()
server_decoder: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)
engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
waker_decoder: msgspec.msgpack.Decoder[Wake] = msgspec.msgpack.Decoder(Wake)
