"""What clients announce about the tools that their programs run: instead of what was learned of such tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvtier.ttl.gaps import MIN_GAP_S, SurvivalCurve, lognormal_curve

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
    """The announcements for the present turns and pauses of programs."""

    def __init__(self) -> None:
        self._by_program: dict[str, Announcement] = {}

    def __len__(self) -> int:
        return len(self._by_program)

    def announce(self, program: str, announcement: Announcement) -> None:
        """The last one counts."""
        self._by_program[program] = announcement

    def of(self, program: str) -> Announcement | None:
        """What was announced for the program's present turn or pause."""
        return self._by_program.get(program)

    def forget(self, program: str) -> None:
        """The pause is over, or the program is."""
        if self._by_program:
            self._by_program.pop(program, None)
