"""An order of requests by program that never changes, for vLLM's own queue.

`admission` has the better order, which changes as requests wait; a queue that is sorted once can
not follow it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable


def rank_s(program_arrival_s: float, arrival_s: float, aging_s: float) -> float:
    """Return the time by which a request is ordered: its program's arrival, but aged.

    Static, yet it ages: a request with ``arrival_s = t`` ranks before every request that arrives
    after ``t + aging_s``, whatever the program of the latter. 0 turns aging off.
    """
    if aging_s == 0:
        return min(arrival_s, program_arrival_s)
    return min(arrival_s, max(program_arrival_s, arrival_s - aging_s))


class ProgramArrivals:
    """When each program's first request arrived, for the ``max_programs`` last active ones.

    For schedulers, which see requests come but not end. Times in seconds of any one clock.
    """

    def __init__(self, max_programs: int = 10_000) -> None:
        self._max_programs = max_programs
        self._first_s: OrderedDict[Hashable, float] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of remembered programs."""
        return len(self._first_s)

    def first_arrival_s(self, program: Hashable, arrival_s: float) -> float:
        """Return the program's first arrival; ``arrival_s`` if this is it."""
        first_s = self._first_s.setdefault(program, arrival_s)
        self._first_s.move_to_end(program)
        if len(self._first_s) > self._max_programs:
            self._first_s.popitem(last=False)
        return first_s
