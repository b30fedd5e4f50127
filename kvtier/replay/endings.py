"""`kvtier-ends`: kvtier whose clients say when a program is over, as some baselines are told.

Programs that end without a word keep their KV until others outlive it; see `end` in docs/clients.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtier.replay.agents import Chain


def tell(sim: Any) -> None:
    """Let the clients of a simulation of kvtier say when their programs are over."""
    sim.ends_with = is_last


def is_last(chain: Chain) -> bool:
    """Whether a program is over with the turn that comes next: nobody waits for it, nor it for sub-agents."""
    return chain.parent is None and chain.index + 1 == len(chain.turns) and not chain.turn.children
