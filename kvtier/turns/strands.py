"""The conversations of a program: each has a name of its own in the CPU tier.

A program may hold several conversations at a time (sub-agents, parallel requests of one session). The tier
keeps one chain of chunks a name: under one name, staging one conversation would give up the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtier.chunk_keys import ChunkChain

MAX_STRANDS = 8
"""Conversations of one program that are kept apart; the one that staged longest ago gives way."""


@dataclass(slots=True)
class _Strand:
    name: str
    head: ChunkChain


class Strands:
    """Names of all programs' conversations."""

    def __init__(self) -> None:
        # Those that staged last come last.
        self._strands: dict[str, list[_Strand]] = {}

    def __len__(self) -> int:
        return len(self._strands)

    def names(self, program: str) -> list[str]:
        """The program's names in the tier; its own is among them even if nothing was staged."""
        return [program, *(s.name for s in self._strands.get(program, ()) if s.name != program)]

    def find(self, program: str, chain: ChunkChain) -> str:
        """The name of the conversation that `chain` belongs to; the program's for an unknown one."""
        strand = self._continued(program, chain)
        return program if strand is None else strand.name

    def continued(self, program: str, chain: ChunkChain) -> str | None:
        """The name of the conversation that `chain` goes on with; None where it begins one."""
        strand = self._continued(program, chain)
        return None if strand is None else strand.name

    def take(self, program: str, chain: ChunkChain) -> str:
        """The name under which `chain` is to be staged: of the conversation it continues, or a new one."""
        strands = self._strands.setdefault(program, [])
        strand = self._continued(program, chain)
        if strand is not None:
            strands.remove(strand)
        elif len(strands) < MAX_STRANDS:
            taken = {s.name for s in strands}
            names = (program, *(f"{program}.{i}" for i in range(1, MAX_STRANDS)))
            strand = _Strand(next(name for name in names if name not in taken), chain)
        else:
            strand = strands.pop(0)
        strand.head = chain
        strands.append(strand)
        return strand.name

    def forget(self, program: str) -> None:
        """The program is over."""
        self._strands.pop(program, None)

    def clear(self) -> None:
        """Nothing is known of any program."""
        self._strands.clear()

    def _continued(self, program: str, chain: ChunkChain) -> _Strand | None:
        """The conversation that shares most with `chain`, if that is at least half of what it was.

        Less than all, because clients render outputs anew. Half, because conversations of one program
        may share a long system prompt.
        """
        best, most = None, 0
        for strand in self._strands.get(program, ()):
            common = strand.head.common_chunks(chain)
            if common > most and 2 * common >= min(len(strand.head), len(chain)):
                best, most = strand, common
        return best
