"""ThunderAgent's rule: which programs may send requests, by how many tokens of KV they stand for.

After its public code (arXiv 2602.13692; ThunderAgent-org/ThunderAgent a7eef77, `scheduler/router.py` and
`backend/state.py`). Every 5 s, for one engine::

    used = sum of the tokens of active programs + 100 * their number

First, paused programs resume, as many as fit together into what is left: those whose request waits, then new
ones, then those that use tools, each group from the smallest up. Then, while more is used than there is, programs
are paused: those that use tools, from the smallest up, and when there are none, programs with a request in the
engine are marked, from the smallest up, to be paused when it ends. In between, a new program begins at once only if
none waits and it fits.

Two departures. In the public code the last loop does not see what it has marked, and goes on until all are; here
what is marked counts as gone, which its comments say is meant, and `capacity_overflow` there does. And where all
programs are paused and none fits, the first resumes, instead of none for half an hour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

BUFFER_TOKENS: Final = 100


@dataclass(slots=True, eq=False)
class ProgramState:
    """One program.

    Attributes:
        name: Unique.
        tokens: Of its contexts.
        n_requests: Its requests that are in the engine, or wait to be sent.
        n_turns: Requests that it has made.
        is_paused: Its requests are held back.
        is_marked: It is to be paused when its requests have ended.
        waits_since_s: Since when a request is held back.
    """

    name: str
    tokens: int = 0
    n_requests: int = 0
    n_turns: int = 0
    is_paused: bool = False
    is_marked: bool = False
    waits_since_s: float = float("inf")

    @property
    def required_tokens(self) -> int:
        """What it takes to have it active."""
        return self.tokens + BUFFER_TOKENS


def left_tokens(capacity_tokens: int, programs: Iterable[ProgramState]) -> int:
    """What active programs leave; negative where they need more than there is."""
    return capacity_tokens - sum(one.required_tokens for one in programs if not one.is_paused)


def to_resume(capacity_tokens: int, programs: Iterable[ProgramState]) -> list[ProgramState]:
    """Paused programs that may go on."""
    known = list(programs)
    left = left_tokens(capacity_tokens, known)
    paused = sorted((one for one in known if one.is_paused), key=_resume_order)
    chosen = []
    if left > BUFFER_TOKENS:
        for one in paused:
            if one.required_tokens <= left:
                left -= one.required_tokens
                chosen.append(one)
    if not chosen and len(paused) == len(known):
        return paused[:1]
    return chosen


def to_pause(capacity_tokens: int, programs: Iterable[ProgramState]) -> list[ProgramState]:
    """Active programs to be paused, now or, with a request in the engine, when it has ended."""
    known = list(programs)
    left = left_tokens(capacity_tokens, (one for one in known if not one.is_marked))
    chosen = []
    active = (one for one in known if not one.is_paused and not one.is_marked)
    for one in sorted(active, key=lambda one: (one.n_requests > 0, one.tokens, one.name)):
        if left >= 0:
            break
        left += one.required_tokens
        chosen.append(one)
    return chosen


def may_begin(capacity_tokens: int, program: ProgramState, others: Iterable[ProgramState]) -> bool:
    """Whether a new program may send its first request at once."""
    known = list(others)
    if any(one.is_paused for one in known):
        return False
    return program.required_tokens <= left_tokens(capacity_tokens, known)


def _resume_order(one: ProgramState) -> tuple[bool, bool, int, str]:
    # A new program has a request too.
    return one.n_requests == 0, one.n_turns == 1, one.tokens, one.name
