"""What an engine's link knows of each program: enough to tell a control server that has just started."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtier.link_messages import PinState, ProgramKey, ProgramState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE_PROGRAMS = 500
"""Programs in one message."""


@dataclass(slots=True)
class KnownProgram:
    """One program; times are monotonic."""

    key: ProgramKey
    started_s: float
    last_active_s: float
    turns: int = 0
    context_tokens: int = 0
    waiting: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    pins: dict[str, tuple[int, float]] = field(default_factory=dict)
    cpu_tokens: int = 0
    tool: str | None = None
    gap_s: float | None = None

    def state(self, offset_s: float) -> ProgramState:
        """As a message, with times moved by `offset_s`."""
        paused = not self.waiting and not self.running
        returns_s = None
        if paused and self.gap_s is not None:
            returns_s = self.last_active_s + self.gap_s + offset_s
        return ProgramState(
            program=self.key,
            started_s=self.started_s + offset_s,
            last_active_s=self.last_active_s + offset_s,
            turns=self.turns,
            context_tokens=self.context_tokens,
            waiting=sorted(self.waiting),
            running=sorted(self.running),
            pins=[PinState(name, n, until + offset_s) for name, (n, until) in self.pins.items()],
            cpu_tokens=self.cpu_tokens,
            tool=self.tool if paused else None,
            predicted_return_s=returns_s,
        )


def pages(
    programs: Iterable[KnownProgram], offset_s: float
) -> Iterator[tuple[bool, list[ProgramState]]]:
    """All programs in messages of a bounded size, the first one marked; one at least."""
    page: list[ProgramState] = []
    first = True
    for program in programs:
        page.append(program.state(offset_s))
        if len(page) == PAGE_PROGRAMS:
            yield first, page
            first, page = False, []
    if page or first:
        yield first, page
