"""Cuts recorded programs to what is replayed of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtier.replay.workload import Child, Limits, Program, Turn


def apply(program: Program, limits: Limits) -> Program | None:
    """The program within the limits; None if too few turns are left of it.

    A chain ends where its first turn over a limit would be; sub-agents of the turns before stay, cut in the
    same way. Sub-agents of which nothing is left go. `max_programs` is not of one program, and not looked at.
    """
    turns = _kept(program.turns, limits)
    if len(turns) < max(1, limits.min_turns):
        return None
    return replace(program, turns=turns)


def _kept(turns: Sequence[Turn], limits: Limits) -> tuple[Turn, ...]:
    kept = []
    for turn in turns[: limits.max_turns]:
        if limits.max_input_tokens is not None and turn.prompt_tokens > limits.max_input_tokens:
            break
        kept.append(_limited(turn, limits))
    return tuple(kept)


def _limited(turn: Turn, limits: Limits) -> Turn:
    gap_s = turn.gap_s * limits.time_scale
    children = (_limited_child(child, limits) for child in turn.children)
    return replace(
        turn,
        output_tokens=min(turn.output_tokens, limits.max_output_tokens),
        gap_s=min(max(gap_s, limits.min_gap_s), limits.max_gap_s),
        children=tuple(child for child in children if child.turns),
    )


def _limited_child(child: Child, limits: Limits) -> Child:
    # The client's time before a sub-agent begins scales with its other times, but may be 0.
    delay_s = min(child.delay_s * limits.time_scale, limits.max_gap_s)
    return replace(child, delay_s=delay_s, turns=_kept(child.turns, limits))
