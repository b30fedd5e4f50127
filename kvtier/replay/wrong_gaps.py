"""kvtier with predictions of tool times that are wrong on purpose: `kvtier:x10` and its like.

What is predicted is told with certainty, as the reference `oracle` is told the truth: the curve of a pause is a
step at the wrong time. Everything that asks for a prediction of a pause gets it: TTL, regret, what clients are told.
What is learnt meanwhile is learnt from true gaps; leases, the tier's values and admission go by that alone, which here
is the curve of all tools together. Pauses without a tool call are left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

from kvtier.ttl.gaps import MIN_GAP_S, SurvivalCurve

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.replay.agents import Chain

MODES: Final = ("shuffled", "x0.1", "x10", "adversarial")
"""`shuffled`: the gap of another pause of the workload. `adversarial`: a little less than the truth, so that a
pin that lasts until the predicted return ends just before the true one."""
_JUST_BEFORE: Final = 0.99
_PREFIX: Final = "gap-"


def teller(mode: str) -> Callable[[Any], None]:
    """What a policy's `prepare` is to be for wrong predictions of this kind.

    Raises:
        ValueError: There is no such kind.
    """
    if mode not in MODES:
        message = f"unknown wrong prediction {mode!r}; accepted: {', '.join(MODES)}"
        raise ValueError(message)

    def tell(sim: Any) -> None:
        predicted_s = _predictor(mode, sim.programs)

        def tool_of(chain: Chain) -> str | None:
            tool = chain.turn.tool
            return None if tool is None else f"{_PREFIX}{predicted_s(chain):.6f}-{tool}"

        sim.tool_of = tool_of
        _mislead(sim.half.policy.ttl)

    return tell


def _predictor(mode: str, programs: Any) -> Callable[[Chain], float]:
    if mode == "shuffled":
        gaps_s = sorted(turn.gap_s for p in programs for turn in p.all_turns() if turn.tool)
        # By name, so that it is the same in whatever order turns come.
        return lambda chain: gaps_s[crc32(chain.request_id.encode()) % len(gaps_s)]
    factor = {"x0.1": 0.1, "x10": 10.0, "adversarial": _JUST_BEFORE}[mode]
    return lambda chain: chain.turn.gap_s * factor


def _mislead(ttl: Any) -> None:
    """Predict what names of tools carry; learn under the names without it."""
    learnt, observe_gap, observe_censored = ttl.away, ttl.observe_gap, ttl.observe_censored

    def split(tool: str | None) -> tuple[float | None, str | None]:
        if tool is None or not tool.startswith(_PREFIX):
            return None, tool
        told, _, name = tool.removeprefix(_PREFIX).partition("-")
        return float(told), name

    def away(tool: str | None) -> SurvivalCurve:
        told_s, _ = split(tool)
        if told_s is None:
            curve: SurvivalCurve = learnt(tool)
            return curve
        return SurvivalCurve((max(MIN_GAP_S, told_s),), (0.0,))

    ttl.away = away
    ttl.observe_gap = lambda tool, gap_s: observe_gap(split(tool)[1], gap_s)
    ttl.observe_censored = lambda tool, waited_s: observe_censored(split(tool)[1], waited_s)
