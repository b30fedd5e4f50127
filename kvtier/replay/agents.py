"""Agents in virtual time: which request comes when, given when the others end."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtier.replay.text import ChainText, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvtier.replay.workload import Program, Turn


@dataclass(slots=True, eq=False)
class Chain:
    """A chain of turns under way: a program's own, or a sub-agent's.

    Attributes:
        program: Whose it is.
        name: Unique.
        text: Its prompts.
        turns: What it consists of.
        parent: The chain that waits for this one; None for the program's own.
        index: The turn that runs, or comes next.
        open_children: Sub-agents that the current turn has started and that have not ended.
    """

    program: Program
    name: str
    text: ChainText
    turns: Sequence[Turn]
    parent: Chain | None = None
    index: int = 0
    open_children: int = 0

    @property
    def turn(self) -> Turn:
        """The turn that runs, or comes next."""
        return self.turns[self.index]

    @property
    def request_id(self) -> str:
        """Id of that turn's request."""
        return f"{self.name}.{self.index}"


@dataclass(slots=True)
class Agents:
    """All programs of a workload.

    Args:
        programs: The workload.
        block_tokens: Tokens of a block.
        concurrency: Most programs at a time; the next begins when one has ended. None: as they arrive.

    Attributes:
        ended_s: When each program's last turn ended, by name.
        arrived_s: When each program's first request came.
    """

    programs: Sequence[Program]
    block_tokens: int
    concurrency: int | None = None
    ended_s: dict[str, float] = field(default_factory=dict)
    arrived_s: dict[str, float] = field(default_factory=dict)
    _vocabulary: Vocabulary = field(default_factory=Vocabulary)
    _due: list[tuple[float, int, Chain]] = field(default_factory=list)
    _held_back: list[Program] = field(default_factory=list)
    _n_due: int = 0

    def __post_init__(self) -> None:
        """Let the programs come."""
        ordered = sorted(self.programs, key=lambda program: program.arrival_s)
        at_once = len(ordered) if self.concurrency is None else self.concurrency
        for program in ordered[:at_once]:
            self._begin(program, 0.0 if self.concurrency is not None else program.arrival_s)
        self._held_back = ordered[at_once:][::-1]

    @property
    def next_s(self) -> float:
        """When the next request comes; infinite where none is due."""
        return self._due[0][0] if self._due else float("inf")

    @property
    def done(self) -> bool:
        """Whether every program has ended."""
        return len(self.ended_s) == len(self.programs)

    def due(self, now_s: float) -> Iterator[tuple[float, Chain]]:
        """Requests whose time has come, and when that was."""
        while self._due and self._due[0][0] <= now_s:
            at_s, _, chain = heapq.heappop(self._due)
            yield at_s, chain

    def turn_ended(self, chain: Chain, now_s: float) -> None:
        """A chain's turn is over: its sub-agents begin, or its gap."""
        turn = chain.turn
        last = chain.index + 1 == len(chain.turns)
        for number, child in enumerate(turn.children):
            name = f"{chain.request_id}/{number}"
            scope = chain.program.scope or chain.program.name
            text = ChainText(self._vocabulary, scope, child.turns, self.block_tokens, name)
            chain.open_children += 1
            self._push(
                now_s + child.delay_s, Chain(chain.program, name, text, child.turns, parent=chain)
            )
        if not turn.children:
            self._gap_begins(chain, now_s, last=last)

    # -- internals ---------------------------------------------------------------------------------

    def _begin(self, program: Program, at_s: float) -> None:
        scope = program.scope or program.name
        text = ChainText(self._vocabulary, scope, program.turns, self.block_tokens, program.name)
        self.arrived_s[program.name] = at_s
        self._push(at_s, Chain(program, program.name, text, program.turns))

    def _gap_begins(self, chain: Chain, now_s: float, *, last: bool) -> None:
        if not last:
            gap_s = chain.turn.gap_s
            chain.index += 1
            self._push(now_s + gap_s, chain)
            return
        parent = chain.parent
        if parent is None:
            self.ended_s[chain.program.name] = now_s
            if self._held_back:
                self._begin(self._held_back.pop(), now_s)
            return
        parent.open_children -= 1
        if not parent.open_children:
            self._gap_begins(parent, now_s, last=parent.index + 1 == len(parent.turns))

    def _push(self, at_s: float, chain: Chain) -> None:
        self._n_due += 1
        heapq.heappush(self._due, (at_s, self._n_due, chain))
