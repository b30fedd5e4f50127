"""Which finished turn a prompt continues, and what that says about the pause before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.identity.program_records import (
    ActiveTurn,
    CensoredGap,
    FinishedTurn,
    ObservedGap,
    PrefixEnd,
    Program,
    ProgramId,
    TurnResult,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def finish_turn(
    program: ProgramId, active: ActiveTurn, result: TurnResult, now_s: float
) -> FinishedTurn:
    """Turn an active turn into a finished one, with the places where it can be found by prefix."""
    prompt, own_prompt, own_end = _ends_of(active, result.block_hashes, result.reusable_blocks)
    return FinishedTurn(
        request_id=result.request_id,
        program=program,
        finished_s=now_s,
        tool=result.tool,
        is_tool_call=result.is_tool_call,
        root_blocks=active.root_blocks,
        prompt=prompt,
        own_prompt=own_prompt,
        own_end=own_end,
    )


def _ends_of(
    active: ActiveTurn, block_hashes: Sequence[bytes], reusable_blocks: int
) -> tuple[PrefixEnd | None, PrefixEnd | None, PrefixEnd | None]:
    """Return the turn's prompt end, and its prompt end and reusable end where they are its own.

    The reusable end holds the answer, which the next prompt may render differently (a stripped
    thought, other spacing); the prompt end then still matches.
    """
    at_prompt = min(active.prompt_blocks, len(block_hashes))
    prompt = PrefixEnd(at_prompt, block_hashes[at_prompt - 1]) if at_prompt else None
    own_prompt = prompt if at_prompt > active.root_blocks else None
    own_end = None
    if reusable_blocks > active.root_blocks:
        own_end = PrefixEnd(reusable_blocks, block_hashes[reusable_blocks - 1])
    return prompt, own_prompt, own_end


def continued(program: Program, block_hashes: Sequence[bytes]) -> tuple[FinishedTurn, ...]:
    """Return the program's finished turns that this prompt extends, in order of their ends.

    Turns whose whole context is in the prompt; if there is none, the one newest turn whose prompt
    is (its answer was rendered differently). Not all of the latter: turns of a fork share a prompt.
    """
    whole = tuple(
        turn
        for turn in program.live
        if turn.own_end is not None and turn.own_end.is_prefix_of(block_hashes)
    )
    if whole:
        return whole
    for turn in reversed(program.live):
        if turn.own_prompt is not None and turn.own_prompt.is_prefix_of(block_hashes):
            return (turn,)
    return ()


def past_turn(program: Program, block_hashes: Sequence[bytes]) -> FinishedTurn | None:
    """Return the newest superseded turn that this prompt extends: a retry or a branch."""
    for turn in reversed(program.past):
        if any(end.is_prefix_of(block_hashes) for end in turn.ends()):
            return turn
    return None


def observe_gap(
    program: Program,
    continues: tuple[FinishedTurn, ...],
    block_hashes: Sequence[bytes],
    now_s: float,
) -> ObservedGap | None:
    """Return the pause that ends now, and mark its turn as returned.

    Without a turn that the prompt extends, the newest one counts if nothing else is running and
    its prompt does not contradict: a sub-agent that starts with another prompt is not the return
    of the tool that started it.
    """
    ended = continues[-1] if continues else None
    if ended is None and program.live and not program.active:
        newest = next(reversed(program.live))
        if newest.prompt is None or newest.prompt.is_prefix_of(block_hashes):
            ended = newest
    if ended is None or ended.returned:
        return None
    ended.returned = True
    return ObservedGap(
        gap_s=max(0.0, now_s - ended.finished_s),
        tool=ended.tool,
        is_tool_call=ended.is_tool_call,
        ended_request_id=ended.request_id,
    )


def open_gaps(turns: Iterable[FinishedTurn], now_s: float) -> list[CensoredGap]:
    """Return the pauses of these turns that nothing has ended yet."""
    return [
        CensoredGap(
            waited_s=max(0.0, now_s - turn.finished_s),
            tool=turn.tool,
            is_tool_call=turn.is_tool_call,
            ended_request_id=turn.request_id,
        )
        for turn in turns
        if not turn.returned
    ]
