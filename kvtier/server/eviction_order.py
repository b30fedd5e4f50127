"""Which program loses KV first where the CPU tier must make room.

What nobody has leased goes by its worth; what is leased, only for something worth more. Programs are many,
and room is made often: the order of both is kept (`cheapest_first`), not found anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import merge
from itertools import takewhile
from typing import TYPE_CHECKING

from kvtier.cheapest_first import CheapestFirst
from kvtier.due_times import DueTimes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvtier.backend import Activity

DISPLACE_MARGIN = 1.25
"""A leased program is displaced only by one worth this much more per byte: no thrash between equals."""
IDLE_SCALE_S = 10.0
"""Unused for so long, KV is worth half. The chance that a program returns in the next moment falls like one over
the time that it has been away, as gaps have heavy tails; and who waits in a queue for long is last in it."""
RUNNING_WORTH = 0.02
"""Part of its worth that a copy keeps while the program runs: its KV is in GPU memory then, and comes from
there when it pauses. Not nothing, as copying it again takes the link's time: some hundredths of what computing
takes, and beside it."""


@dataclass(slots=True)
class StoredProgram:
    """A program with KV in the tier: the keys of its chunks, in order, what they are worth, and who staged them."""

    keys: list[bytes] = field(default_factory=list)
    density: float = 0.0
    lease_until_s: float = 0.0
    used_s: float = 0.0
    slot_bytes: int = 1
    ranks: int = 1
    activity: Activity = "paused"
    active_on: str = ""
    owner: str = ""

    def worth(self, now_s: float) -> float:
        """Value per byte, while the program pauses the less the longer it does, seconds/byte."""
        match self.activity:
            case "running":
                return self.density * RUNNING_WORTH
            case "waiting":
                return self.density
        return self.density / (1.0 + max(0.0, now_s - self.used_s) / IDLE_SCALE_S)

    def is_leased(self, now_s: float) -> bool:
        """Whether it goes only for something of more worth."""
        return self.lease_until_s > now_s or self.activity == "waiting"


class EvictionOrder:
    """See the module's docstring.

    Args:
        programs: By namespace and name; changed by others, who say so.
    """

    def __init__(self, programs: Mapping[tuple[str, str], StoredProgram]) -> None:
        self._programs = programs
        self._leased: CheapestFirst[tuple[str, str]] = CheapestFirst()
        self._unleased: CheapestFirst[tuple[str, str]] = CheapestFirst()
        self._lease_ends: DueTimes[tuple[str, str]] = DueTimes()

    def place(self, ref: tuple[str, str], now_s: float) -> None:
        """What a program is worth has changed, or whether it is leased."""
        program = self._programs[ref]
        leased = program.is_leased(now_s)
        (self._leased if leased else self._unleased).add(ref)
        (self._unleased if leased else self._leased).discard(ref)
        if program.lease_until_s > now_s:
            self._lease_ends.set(ref, program.lease_until_s)

    def remove(self, ref: tuple[str, str]) -> None:
        """The program has gone."""
        self._leased.discard(ref)
        self._unleased.discard(ref)
        self._lease_ends.discard(ref)

    def victims(self, density: float, now_s: float) -> Iterator[tuple[str, str]]:
        """Programs that may lose KV to one of `density`, the cheapest first; some may go meanwhile."""
        for ref in self._lease_ends.take_due(now_s):
            self.place(ref, now_s)

        def worth(ref: tuple[str, str]) -> tuple[float, float]:
            program = self._programs[ref]
            return program.worth(now_s), program.used_s

        cheaper = takewhile(
            lambda ref: worth(ref)[0] * DISPLACE_MARGIN < density, self._leased.walk(worth, now_s)
        )
        return merge(cheaper, self._unleased.walk(worth, now_s), key=worth)
