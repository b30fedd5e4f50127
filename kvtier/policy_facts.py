"""What `kvtier.policy` is told and what it answers: the operator's settings, the facts of a pause, the choice at a return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kvtier.cost_model import TtlBound
    from kvtier.ttl.gaps import SurvivalCurve

RunReload = Literal["auto", "always", "never", "first_k"]


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """What the operator sets.

    Attributes:
        max_ttl_s: No pin lasts longer.
        fixed_ttl_s: Instead of choosing: this TTL for every pause.
        reload: `auto` by cost; the others force the choice.
        reload_first_chunks: For `first_k`: how many chunks.
        lease_s: A staged copy keeps its value in the tier for at most so long.
        stage: Whether pauses are staged at all.
    """

    max_ttl_s: float = 600.0
    fixed_ttl_s: float | None = None
    reload: RunReload = "auto"
    reload_first_chunks: int = 0
    lease_s: float = 600.0
    stage: bool = True


@dataclass(frozen=True, slots=True)
class ReturnChoice:
    """How much to load: `reload_tokens` from the prompt's start, a multiple of the chunk."""

    source: str
    reload_tokens: int
    reason: str
    predicted_load_s: float


@dataclass(frozen=True, slots=True)
class PauseFacts:
    """The state of the engine at the end of a turn; see `PauseState` for the meanings.

    Attributes:
        hint_ttl_s: The TTL that the client asks for.
        override: What an operator says.
        ttl_limit_s: What the tenant's budget allows.
        announced: The distribution of this gap, where the client has announced one.
        return_share: See `TtlController.return_share`; of no account where the gap is announced.
    """

    now_s: float
    context_tokens: int
    reusable_blocks: int
    prompt_tokens: int
    tool: str | None
    is_tool_call: bool
    staged_tokens: int
    tier_available: bool
    tierable: bool
    free_unhashed_blocks: int
    free_blocks: int
    total_blocks: int
    pinned_blocks: int
    budget_left_blocks: int
    waiting_requests: int
    waiting_blocks: int
    waiting_tokens: int
    running_requests: int
    load_backlog_tokens: int
    hint_ttl_s: float | None
    override: TtlBound | None = None
    ttl_limit_s: float = math.inf
    announced: SurvivalCurve | None = None
    return_share: float = 1.0
