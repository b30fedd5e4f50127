"""What a prefetch remembers: how far it is, and the pieces whose copies are under way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtier.block_ids import BlockIds
    from kvtier.turns.paused_turns import PausedTurn
    from kvtier.turns.reading import Found


# eq=False: pieces are compared by identity, as they know their prefetches.
@dataclass(slots=True, eq=False)
class Piece:
    """Blocks of one copy order.

    Attributes:
        prefetch: Whose it is.
        order_id: Names its copy order, and its hold.
        start: How many of the turn's blocks come before it.
        block_ids: The blocks that are written.
        hashes: vLLM's hashes of what is loaded into them.
        n_bytes: What one worker copies.
        copied: None until the copy has ended, then whether it succeeded.
    """

    prefetch: Prefetch
    order_id: int
    start: int
    block_ids: BlockIds
    hashes: list[bytes]
    n_bytes: int
    copied: bool | None = None

    @property
    def hold(self) -> str:
        """Name of the hold that keeps the blocks while they are written."""
        return f"prefetch:{self.order_id}"


@dataclass(slots=True, eq=False)
class Prefetch:
    """A paused turn on its way into GPU memory.

    Attributes:
        program: Its program.
        turn: The turn.
        begun_s: When it was asked for.
        deadline_s: Until when it is pinned then.
        miss_s: What a return without it costs more, seconds: without and with a staged copy.
        next_block: The blocks before this one are there or ordered.
        end_block: All blocks before this one are wanted.
        found: The tier's chunks, locked; None until it has answered.
        pieces: Under way, in token order.
        n_ready: Leading blocks that are pinned.
        is_pinned: Whether there was a pin, which others may have ended since.
        n_loaded: Blocks that were loaded and can be hit.
        stopped: Why nothing more is ordered; empty while it goes on.
        is_void: What is loaded must not be hit.
        is_broken: A piece failed: what comes behind it is of no use.
        is_ended: Nothing is under way any more.
        returned_s: When the program came back; None before.
        asked_until_s: See `PinnedTurn`.
    """

    program: str
    turn: PausedTurn
    begun_s: float
    deadline_s: float
    miss_s: tuple[float, float]
    next_block: int
    end_block: int
    found: Found | None = None
    pieces: deque[Piece] = field(default_factory=deque)
    n_ready: int = 0
    is_pinned: bool = False
    n_loaded: int = 0
    stopped: str = ""
    is_void: bool = False
    is_broken: bool = False
    is_ended: bool = False
    returned_s: float | None = None
    asked_until_s: float = 0.0

    @property
    def key(self) -> str:
        """Name of its pin: that of the turn, so that it ends when the turn's would."""
        return self.turn.request_id
