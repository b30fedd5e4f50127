"""The reference `oracle`: kvtier told at each pause how long it will last, and which is the last one.

The truth travels in the name of the tool, and the gap curve of such a name is a step at that time; the last turn
of a program or sub-agent calls none, and nobody returns after it. Everything else is kvtier as it is. A pause in which sub-agents run is told as if they took no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kvtier.ttl.gaps import MIN_GAP_S, SurvivalCurve

if TYPE_CHECKING:
    from kvtier.replay.agents import Chain

_PREFIX: Final = "gap-"
_NEVER: Final = SurvivalCurve((), (), tail_alpha=0.0)


def tell(sim: Any) -> None:
    """Let a simulation of kvtier know the gaps."""
    sim.tool_of = _tool_of
    sim.half.policy.ttl.away = _away
    # Nothing is learnt from how many turns a program has had: it is known which is the last one.
    sim.half.policy.ttl.return_share = lambda *_: 1.0


def _tool_of(chain: Chain) -> str | None:
    if chain.index + 1 == len(chain.turns):
        return None
    return f"{_PREFIX}{chain.turn.gap_s!r}"


def _away(tool: str | None) -> SurvivalCurve:
    if tool is None:
        return _NEVER
    return SurvivalCurve((max(MIN_GAP_S, float(tool.removeprefix(_PREFIX))),), (0.0,))
