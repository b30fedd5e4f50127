"""What clients announce about the tools that their programs run: instead of what was learned of such tools."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from kvtier.ttl.gaps import MIN_GAP_S, SurvivalCurve, lognormal_curve

if TYPE_CHECKING:
    from collections.abc import Iterable

DEFAULT_SPREAD: Final = 3.0
"""p90 over p50 where only one duration was announced: tools' durations spread that much at least (the prior of
tool calls has 15)."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """A tool that a program runs, or will run after its turn.

    Attributes:
        tool: Its name.
        at_s: When that was said, monotonic.
        curve: How long it is expected to take from then on; None where nothing was said.
    """

    tool: str
    at_s: float
    curve: SurvivalCurve | None


@lru_cache(maxsize=256)
def announced_curve(p50_s: float | None, p90_s: float | None) -> SurvivalCurve | None:
    """A log-normal distribution with these quantiles; None without any.

    A median that is missing is taken to be a `DEFAULT_SPREAD`th of p90. A p90 that is missing or not above the median is taken to be `DEFAULT_SPREAD` times the median.
    """
    if p50_s is None:
        if p90_s is None:
            return None
        p50_s = p90_s / DEFAULT_SPREAD
    median_s = max(MIN_GAP_S, p50_s)
    if p90_s is None or p90_s <= median_s:
        p90_s = DEFAULT_SPREAD * median_s
    return lognormal_curve(median_s, p90_s)


class Announcements:
    """What was announced for turns, present and paused ones, of programs.

    By turn: a program may hold several conversations at a time, and a sub-agent's request ends no pause of
    the conversation that has started it.
    """

    def __init__(self) -> None:
        self._by_program: dict[str, dict[str, Announcement]] = {}

    def __len__(self) -> int:
        """Return the number of programs with an announcement."""
        return len(self._by_program)

    @property
    def n_turns(self) -> int:
        """Turns with an announcement."""
        return sum(map(len, self._by_program.values()))

    def announce(self, program: str, turns: Iterable[str], announcement: Announcement) -> None:
        """Note it for these turns, by their requests' ids; the last one counts."""
        noted = dict.fromkeys(turns, announcement)
        if noted:
            self._by_program.setdefault(program, {}).update(noted)

    def of(self, program: str, turn: str) -> Announcement | None:
        """What was announced for a turn of the program, or the pause after it."""
        return self._by_program.get(program, {}).get(turn) if self._by_program else None

    def forget(self, program: str) -> None:
        """The program is over."""
        if self._by_program:
            self._by_program.pop(program, None)

    def turns_over(self, program: str, turns: Iterable[str]) -> None:
        """The pauses after these turns are over."""
        noted = self._by_program.get(program) if self._by_program else None
        if noted is None:
            return
        for turn in turns:
            noted.pop(turn, None)
        if not noted:
            del self._by_program[program]
