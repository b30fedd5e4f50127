"""Which program a request belongs to, and what is known about that program.

A program is one run of an agent: a chain (or, with sub-agents, several chains) of requests with
tool pauses between them. vLLM sees requests only; the table puts them together by session id, by
the client's hint, or, for agents that send neither, by prefix: a prompt that extends a finished
turn continues it.

Matching by prefix must not join strangers who share a system prompt. Only the end of a turn
matches, and only where that end lies behind the first answer of its chain: with a short first
message and a short answer the last full block may still be all system prompt, and such an end is
not registered.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from kvtier.identity.prefix_index import PrefixIndex
from kvtier.identity.program_records import (
    ActiveTurn,
    CensoredGap,
    FinishedTurn,
    ObservedGap,
    Program,
    ProgramGone,
    ProgramId,
    ProgramLimits,
    ProgramView,
    TurnEnd,
    TurnRequest,
    TurnResult,
    TurnStart,
    bounded_name,
)
from kvtier.identity.program_turns import continued, finish_turn, observe_gap, open_gaps, past_turn

__all__ = [
    "CensoredGap",
    "ObservedGap",
    "ProgramGone",
    "ProgramId",
    "ProgramLimits",
    "ProgramTable",
    "ProgramView",
    "TurnEnd",
    "TurnRequest",
    "TurnResult",
    "TurnStart",
    "bounded_name",
]

_MatchedBy = Literal["session", "hint", "prefix", "new"]


class ProgramTable:
    """All programs that are in flight, paused, or were active not long ago.

    Every call costs a few dict operations plus at most ``max_live_turns`` comparisons; finding a
    program by prefix costs one lookup per distinct length of a registered turn. Memory is bounded
    by the active requests plus ``max_programs``, provided that ``forget`` is called now and then
    (it is free when nothing is due). Times are seconds of one clock that does not run backwards.
    """

    def __init__(self, limits: ProgramLimits | None = None) -> None:
        self.limits = limits or ProgramLimits()
        self._programs: dict[ProgramId, Program] = {}
        self._program_of_request: dict[str, Program] = {}
        # Programs without an active turn, least recently active first.
        self._idle: OrderedDict[ProgramId, Program] = OrderedDict()
        self._index: PrefixIndex[FinishedTurn] = PrefixIndex()
        self._anonymous = 0

    def __len__(self) -> int:
        """Return the number of known programs."""
        return len(self._programs)

    def __contains__(self, program: ProgramId) -> bool:
        """Whether the program is known."""
        return program in self._programs

    @property
    def indexed_ends(self) -> int:
        """Number of prefix ends under which turns can be found."""
        return len(self._index)

    def find(self, request: TurnRequest) -> ProgramId | None:
        """Return the known program that such a request would join, changing nothing."""
        program_id = _named(request)
        if program_id is not None:
            return program_id if program_id in self._programs else None
        turn = self._index.longest(_tenant(request), request.block_hashes)
        return turn.program if turn is not None else None

    def program_of(self, request_id: str) -> ProgramId | None:
        """Return the program of an active turn."""
        program = self._program_of_request.get(request_id)
        return program.program_id if program is not None else None

    def view(self, program: ProgramId) -> ProgramView | None:
        """Return a snapshot of one program, or None if it is not known."""
        known = self._programs.get(program)
        if known is None:
            return None
        return ProgramView(
            program=program,
            arrival_s=known.arrival_s,
            last_activity_s=known.last_activity_s,
            turns=known.turns,
            active_requests=tuple(known.active),
            finished_requests=tuple(turn.request_id for turn in known.live),
            last_tool=known.last_tool,
            service_tokens=known.service_tokens,
            max_context_tokens=known.max_context_tokens,
        )

    def turn_started(self, request: TurnRequest, now_s: float) -> TurnStart:
        """Take in a new request, arriving at ``now_s``."""
        request_id, block_hashes = request.request_id, request.block_hashes
        active_in = self._program_of_request.get(request_id)
        if active_in is not None:
            return _start(active_in, "repeat", is_new=False, continues=(), gap=None)
        program, matched_by, prefix_turn = self._identify(request, now_s)
        continues = continued(program, block_hashes)
        is_new = program.turns == 0
        gap = observe_gap(program, continues, block_hashes, now_s)
        root = continues[-1] if continues else prefix_turn or past_turn(program, block_hashes)
        turn = ActiveTurn(
            prompt_blocks=len(block_hashes),
            root_blocks=root.root_blocks if root is not None else len(block_hashes),
            continues=continues,
            ends_program=request.ends_program,
        )
        program.active[request_id] = turn
        program.turns += 1
        program.last_activity_s = now_s
        self._program_of_request[request_id] = program
        self._idle.pop(program.program_id, None)
        return _start(program, matched_by, is_new=is_new, continues=continues, gap=gap)

    def turn_finished(self, result: TurnResult, now_s: float) -> TurnEnd | None:
        """Take in the end of a turn at ``now_s``; its chain now pauses.

        Returns what follows, or None if the request is not an active turn.
        """
        program = self._program_of_request.pop(result.request_id, None)
        if program is None:
            return None
        active = program.active.pop(result.request_id)
        turn = finish_turn(program.program_id, active, result, now_s)
        program.last_activity_s = now_s
        program.last_tool = result.tool
        program.service_tokens += result.service_tokens
        program.max_context_tokens = max(program.max_context_tokens, result.context_tokens)
        program.ending |= active.ends_program
        program.live[turn] = None
        for end in turn.ends():
            self._index.add(program.program_id.tenant, *end, turn)
        if program.ending and not program.active:
            # No pause follows, and that is known: nothing to observe, not even as censored.
            turn.returned = True
            gone = self._drop(program, now_s)
            return TurnEnd(program.program_id, ended=True, superseded=gone.turns, gaps=gone.gaps)
        superseded = [done for done in active.continues if done in program.live]
        gaps: list[CensoredGap] = []
        for done in superseded:
            self._supersede(program, done)
        if len(program.live) > self.limits.max_live_turns:
            oldest = next(iter(program.live))
            gaps.extend(open_gaps([oldest], now_s))
            self._supersede(program, oldest)
            superseded.append(oldest)
        if not program.active:
            self._idle[program.program_id] = program
        return TurnEnd(
            program.program_id,
            ended=False,
            superseded=tuple(done.request_id for done in superseded),
            gaps=tuple(gaps),
        )

    def turn_aborted(self, request_id: str, now_s: float) -> ProgramGone | None:
        """Take back an active turn that left nothing behind.

        A retry finds the turn before it again. Returns the program if it went with its last turn:
        one that was to end, or an anonymous one without a finished turn, which nothing could find.
        """
        program = self._program_of_request.pop(request_id, None)
        if program is None:
            return None
        program.ending |= program.active.pop(request_id).ends_program
        program.last_activity_s = now_s
        if program.active:
            return None
        findable = program.program_id.kind == "named" or bool(program.live)
        if program.ending or not findable:
            return self._drop(program, now_s)
        self._idle[program.program_id] = program
        return None

    def name_tool(self, program: ProgramId, tool: str) -> None:
        """The program runs this tool now: its pauses that have not ended are pauses after such a call."""
        known = self._programs.get(program)
        if known is None:
            return
        known.last_tool = tool
        for turn in known.live:
            if not turn.returned:
                turn.tool, turn.is_tool_call = tool, True

    def end_program(self, program: ProgramId, now_s: float) -> ProgramGone | None:
        """Forget a program that is over: now, or with the last of its active turns.

        Returns what is to be released now; None if turns are active or the program is unknown.
        """
        known = self._programs.get(program)
        if known is None:
            return None
        if known.active:
            known.ending = True
            return None
        return self._drop(known, now_s)

    def forget(self, now_s: float) -> tuple[ProgramGone, ...]:
        """Forget programs that are idle for too long or too many; free when none is due."""
        gone: list[ProgramGone] = []
        while self._idle:
            program = next(iter(self._idle.values()))
            expired = now_s - program.last_activity_s > self.limits.forget_after_s
            if not expired and len(self._programs) <= self.limits.max_programs:
                break
            gone.append(self._drop(program, now_s))
        return tuple(gone)

    def _identify(
        self, request: TurnRequest, now_s: float
    ) -> tuple[Program, _MatchedBy, FinishedTurn | None]:
        matched_by: _MatchedBy
        program_id = _named(request)
        if program_id is not None:
            matched_by = "session" if request.session_id else "hint"
        else:
            turn = self._index.longest(_tenant(request), request.block_hashes)
            if turn is not None:
                return self._programs[turn.program], "prefix", turn
            # Request ids may come back after their request has ended; programs may not be joined.
            self._anonymous += 1
            name = f"{bounded_name(request.request_id)}#{self._anonymous}"
            program_id = ProgramId(_tenant(request), "anonymous", name)
            matched_by = "new"
        program = self._programs.get(program_id)
        if program is None:
            program = Program(program_id, arrival_s=now_s, last_activity_s=now_s)
            self._programs[program_id] = program
        return program, matched_by, None

    def _supersede(self, program: Program, turn: FinishedTurn) -> None:
        """Keep a turn for branches only, and no more than a few of them."""
        del program.live[turn]
        turn.superseded = True
        program.past[turn] = None
        if len(program.past) > self.limits.max_past_turns:
            oldest = next(iter(program.past))
            del program.past[oldest]
            self._unindex(oldest)

    def _unindex(self, turn: FinishedTurn) -> None:
        for end in turn.ends():
            self._index.remove(turn.program.tenant, *end, turn)

    def _drop(self, program: Program, now_s: float) -> ProgramGone:
        for turn in (*program.live, *program.past):
            self._unindex(turn)
        del self._programs[program.program_id]
        self._idle.pop(program.program_id, None)
        return ProgramGone(
            program.program_id,
            turns=tuple(turn.request_id for turn in program.live),
            gaps=tuple(open_gaps(program.live, now_s)),
        )


def _tenant(request: TurnRequest) -> str | None:
    return bounded_name(request.tenant) if request.tenant else None


def _named(request: TurnRequest) -> ProgramId | None:
    name = request.session_id or request.program_hint
    return ProgramId(_tenant(request), "named", bounded_name(name)) if name else None


def _start(
    program: Program,
    matched_by: Literal["session", "hint", "prefix", "new", "repeat"],
    *,
    is_new: bool,
    continues: tuple[FinishedTurn, ...],
    gap: ObservedGap | None,
) -> TurnStart:
    return TurnStart(
        program=program.program_id,
        is_new=is_new,
        matched_by=matched_by,
        arrival_s=program.arrival_s,
        turn_index=program.turns - 1,
        active_turns=len(program.active),
        continues=tuple(turn.request_id for turn in continues),
        gap=gap,
        expected_context_tokens=program.max_context_tokens,
    )
