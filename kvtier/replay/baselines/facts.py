"""What a server is told, or can see, about the request of an agent: its program, tool, and whether it is the last.

The papers have the client send this (Continuum: `job_id`, `this_func_call`, `is_last_step`; ThunderAgent and
Autellix: a program id). How long a tool will take is not among it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kvtier.replay.workload import Program, Turn


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """One request.

    Attributes:
        program: Its program's name, the session id.
        chain: The chain of turns that it belongs to: the program's own or that of a sub-agent. Papers know one
            chain a program only; where there are several, each is served as a job of its own, in its program's place.
        index: Which turn of the chain it is.
        tool: The tool that it calls at its end.
        ends_chain: No turn of the chain follows.
        ends_program: No turn of the program follows.
    """

    program: str
    chain: str
    index: int
    tool: str | None
    ends_chain: bool
    ends_program: bool


def facts_by_request(programs: Iterable[Program]) -> dict[str, RequestFacts]:
    """The facts about each request of a workload, by the ids that `agents` gives them."""
    return {
        request_id: facts
        for program in programs
        for request_id, facts in _chain(program.name, program.name, program.turns, is_own=True)
    }


def _chain(
    program: str, name: str, turns: Sequence[Turn], *, is_own: bool
) -> Iterator[tuple[str, RequestFacts]]:
    for index, turn in enumerate(turns):
        request_id = f"{name}.{index}"
        last = index + 1 == len(turns)
        # The program's last turn may start sub-agents; then it is their end that ends the program.
        ends_program = last and is_own and not turn.children
        yield request_id, RequestFacts(program, name, index, turn.tool, last, ends_program)
        for number, child in enumerate(turn.children):
            yield from _chain(program, f"{request_id}/{number}", child.turns, is_own=False)
