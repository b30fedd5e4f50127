"""Program-level attained service: the bookkeeping of Autellix (arXiv 2502.13965, algorithm 1 and section 4.2).

A call enters the queue of the service that earlier calls of its program have attained, and sinks as it attains more
itself: queue ``i`` holds ``[bound[i-1], bound[i])``. When a call ends, its program has attained ``max(before,
inherited + t)``: the sum for calls one after the other, the longest branch of parallel ones. So that none starves, a
call goes to the first queue when ``(W_p + W_c) / (T_p + T_c) >= beta``, over waiting and service of its program's
earlier calls and its own; its own are counted anew from there.

Service is the time of the steps that a call was part of. Neither the bounds nor beta are published.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

BOUNDS_S: Final = tuple(2.0**i for i in range(7))
"""Upper bounds of all queues but the last: quanta that double, as multilevel queues usually have."""
BETA: Final = 4.0
"""Of those tried the best over several machines: with 1 or less nearly every call is promoted all the time, and
calls do little but preempt each other; from 4 up it makes no difference."""


@dataclass(slots=True)
class ProgramService:
    """What a program's calls that have ended have attained.

    Attributes:
        attained_s: Its place for further calls.
        waited_s: W_p.
        served_s: T_p.
    """

    attained_s: float = 0.0
    waited_s: float = 0.0
    served_s: float = 0.0


@dataclass(slots=True)
class Call:
    """A call under way.

    Attributes:
        program: Whose it is.
        inherited_s: What its program had attained when it came.
        since_s: When it came, or was promoted.
        served_s: T_c, since then.
        served_before_s: Its service before that.
        is_promoted: Whether it has been promoted.
    """

    program: ProgramService
    inherited_s: float
    since_s: float
    served_s: float = 0.0
    served_before_s: float = 0.0
    is_promoted: bool = False

    def level(self, bounds_s: tuple[float, ...]) -> int:
        """Its queue; 0 goes first."""
        attained_s = self.served_s if self.is_promoted else self.inherited_s + self.served_s
        return bisect_right(bounds_s, attained_s)

    def waited_s(self, now_s: float) -> float:
        """W_c."""
        return max(0.0, now_s - self.since_s - self.served_s)

    def starves(self, now_s: float, beta: float) -> bool:
        """Whether it is to be promoted."""
        waited_s = self.program.waited_s + self.waited_s(now_s)
        return waited_s >= beta * (self.program.served_s + self.served_s)

    def promote(self, now_s: float) -> None:
        """To the first queue."""
        self.served_before_s += self.served_s
        self.since_s, self.served_s, self.is_promoted = now_s, 0.0, True

    def end(self, now_s: float) -> None:
        """Tell its program."""
        program = self.program
        program.waited_s += self.waited_s(now_s)
        program.served_s += self.served_s
        attained_s = self.inherited_s + self.served_before_s + self.served_s
        program.attained_s = max(program.attained_s, attained_s)
