"""What the program table takes in, gives out and remembers: plain records."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_NAME_CHARS: Final = 256


class ProgramId(NamedTuple):
    """Identity of a program. Hashable, and stable while the program is known.

    ``tenant`` (vLLM's ``cache_salt``) is a part of it: two tenants with equal session ids are two
    programs. ``kind`` keeps a name that a client chose apart from a request id that stands for an
    anonymous program.
    """

    tenant: str | None
    kind: Literal["named", "anonymous"]
    name: str


def bounded_name(text: str) -> str:
    """Return ``text``, or a digest of it where it is longer than 256 characters.

    A digest, because cutting could make one name of two. Linear in the length of ``text``, as is
    vLLM's own hashing of the salt.
    """
    if len(text) <= MAX_NAME_CHARS:
        return text
    # surrogatepass: a lone surrogate from a JSON escape must not raise here.
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32)
    return f"blake2b:{digest.hexdigest()}"


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    """Bounds on what the table remembers.

    Attributes:
        forget_after_s: A program idle for longer than this is forgotten.
        max_programs: Idle programs beyond this many are forgotten, least recently active first.
        max_live_turns: Finished, not superseded turns kept per program (parallel sub-agents).
        max_past_turns: Superseded turns kept per program, so that a retry or a branch from an
            earlier turn is still recognised.
    """

    forget_after_s: float = 3600.0
    max_programs: int = 10_000
    max_live_turns: int = 64
    max_past_turns: int = 4

    def __post_init__(self) -> None:
        """Refuse bounds under which nothing could be remembered."""
        if not self.forget_after_s > 0:
            raise ValueError(f"forget_after_s must be positive, not {self.forget_after_s}")
        if self.max_programs < 1 or self.max_live_turns < 1 or self.max_past_turns < 0:
            raise ValueError("a program table needs room for one program and one turn")


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """A request as it arrives.

    Attributes:
        request_id: The engine's id; unique among the active requests.
        session_id: The request's session id; comes before every other sign of identity.
        program_hint: ``RequestHints.program``.
        tenant: The request's ``cache_salt``.
        block_hashes: Hashes of the prompt's full blocks; read during the call, not kept.
        ends_program: ``RequestHints.end``: after this turn the program is over.
    """

    request_id: str
    session_id: str | None = None
    program_hint: str | None = None
    tenant: str | None = None
    block_hashes: Sequence[bytes] = ()
    ends_program: bool = False


@dataclass(frozen=True, slots=True)
class TurnResult:
    """A turn as it ends.

    Attributes:
        request_id: The request.
        tool: The tool that the program runs next, if known.
        is_tool_call: Whether the turn ended with a tool call.
        context_tokens: Prompt plus output.
        service_tokens: Tokens that the engine computed for this turn.
        block_hashes: Hashes of the full blocks of prompt and output; read, not kept.
        reusable_blocks: How many of them a next turn can reuse (the KV of the last sampled token
            is never there).
    """

    request_id: str
    tool: str | None = None
    is_tool_call: bool = False
    context_tokens: int = 0
    service_tokens: int = 0
    block_hashes: Sequence[bytes] = ()
    reusable_blocks: int = 0

    def __post_init__(self) -> None:
        """Refuse an end that lies outside of the hashed blocks."""
        if not 0 <= self.reusable_blocks <= len(self.block_hashes):
            raise ValueError(
                f"reusable_blocks: {self.reusable_blocks} of {len(self.block_hashes)} hashes"
            )


@dataclass(frozen=True, slots=True)
class ObservedGap:
    """A pause that ended: from the end of a turn to the request that continues it, in seconds."""

    gap_s: float
    tool: str | None
    is_tool_call: bool
    ended_request_id: str


@dataclass(frozen=True, slots=True)
class CensoredGap:
    """A pause that had not ended after ``waited_s`` seconds, when the table stopped looking."""

    waited_s: float
    tool: str | None
    is_tool_call: bool
    ended_request_id: str


@dataclass(frozen=True, slots=True)
class TurnStart:
    """What the table knows about a turn that starts.

    Attributes:
        program: The program of the turn.
        is_new: No earlier turn of this program is known.
        matched_by: What identified it. "repeat": the request id is already an active turn.
        arrival_s: When the program's first turn arrived.
        turn_index: Turns of the program that started before this one.
        active_turns: Turns of the program in flight, this one included.
        continues: Request ids of the finished turns that this prompt extends; their KV can be
            handed over to this turn.
        gap: The pause that this turn ends; None for a first turn, for a second request after the
            same turn (a fork), and where it cannot be told which turn came back.
        expected_context_tokens: Largest context of the program so far; 0 if unknown.
    """

    program: ProgramId
    is_new: bool
    matched_by: Literal["session", "hint", "prefix", "new", "repeat"]
    arrival_s: float
    turn_index: int
    active_turns: int
    continues: tuple[str, ...]
    gap: ObservedGap | None
    expected_context_tokens: int


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What follows from the end of a turn.

    Attributes:
        program: The program of the turn.
        ended: The program is over and forgotten.
        superseded: Request ids of finished turns whose own GPU copy is needed no more: this turn
            contains them, or they were too many. When the program ended: all its turns, this one
            included.
        gaps: Pauses that the table stopped watching.
    """

    program: ProgramId
    ended: bool
    superseded: tuple[str, ...]
    gaps: tuple[CensoredGap, ...]


@dataclass(frozen=True, slots=True)
class ProgramGone:
    """A program that the table no longer knows: its finished turns and its open pauses."""

    program: ProgramId
    turns: tuple[str, ...]
    gaps: tuple[CensoredGap, ...]


@dataclass(frozen=True, slots=True)
class ProgramView:
    """A snapshot of one program. Times in seconds of the caller's clock."""

    program: ProgramId
    arrival_s: float
    last_activity_s: float
    turns: int
    active_requests: tuple[str, ...]
    finished_requests: tuple[str, ...]
    last_tool: str | None
    service_tokens: int
    max_context_tokens: int


class PrefixEnd(NamedTuple):
    """A place in a chain of block hashes: the first ``blocks`` blocks, by the last one's hash."""

    blocks: int
    end_hash: bytes

    def is_prefix_of(self, block_hashes: Sequence[bytes]) -> bool:
        """Whether a request with these hashes starts with the same blocks."""
        return self.blocks <= len(block_hashes) and block_hashes[self.blocks - 1] == self.end_hash


# eq=False: a turn is an object of its own, also if a client uses a request id again.
@dataclass(slots=True, eq=False)
class FinishedTurn:
    """A turn that ended, as the table keeps it.

    ``own_end`` and ``own_prompt`` are the ends that no other program can have by accident (they
    lie behind the first answer of the chain); ``prompt`` is the prompt's end without that promise.
    """

    request_id: str
    program: ProgramId
    finished_s: float
    tool: str | None
    is_tool_call: bool
    root_blocks: int
    prompt: PrefixEnd | None
    own_prompt: PrefixEnd | None
    own_end: PrefixEnd | None
    returned: bool = False
    superseded: bool = False

    def ends(self) -> set[PrefixEnd]:
        """Return the ends under which the turn is found by prefix."""
        return {end for end in (self.own_prompt, self.own_end) if end is not None}


@dataclass(slots=True)
class ActiveTurn:
    """A turn in flight."""

    prompt_blocks: int
    root_blocks: int
    continues: tuple[FinishedTurn, ...]
    ends_program: bool


@dataclass(slots=True)
class Program:
    """One program; turns are kept in the order in which they started or ended."""

    program_id: ProgramId
    arrival_s: float
    last_activity_s: float
    turns: int = 0
    ending: bool = False
    last_tool: str | None = None
    service_tokens: int = 0
    max_context_tokens: int = 0
    active: dict[str, ActiveTurn] = field(default_factory=dict)
    live: dict[FinishedTurn, None] = field(default_factory=dict)
    past: dict[FinishedTurn, None] = field(default_factory=dict)
