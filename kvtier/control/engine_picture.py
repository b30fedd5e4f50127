"""What an engine's link knows of each program: enough to tell a control server that has just started."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtier.link_messages import PinState, ProgramKey, Programs, ProgramState

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE_PROGRAMS = 200
"""Programs in one message, of which a step sends one: to write 10,000 would hold up a step for long."""


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


class Pages:
    """Tells all programs a page at a time, each as it is then; what changes in between is told by events.

    Args:
        programs: By handle; changed by others.
    """

    def __init__(self, programs: Mapping[str, KnownProgram]) -> None:
        self._programs = programs
        self._handles: list[str] | None = None
        self._is_first = False

    @property
    def is_open(self) -> bool:
        """Whether there is a page to be told."""
        return self._handles is not None

    def begin(self) -> None:
        """Tell all, from the beginning."""
        self._handles, self._is_first = list(self._programs), True

    def stop(self) -> None:
        """Nobody listens any more."""
        self._handles = None

    def next(self, engine_id: str, offset_s: float) -> Programs:
        """The next page, at most `PAGE_PROGRAMS`; needs an open one."""
        handles = self._handles
        assert handles is not None
        states = [
            known.state(offset_s)
            for handle in handles[-PAGE_PROGRAMS:]
            if (known := self._programs.get(handle)) is not None
        ]
        del handles[-PAGE_PROGRAMS:]
        page = Programs(
            engine_id=engine_id, programs=states, first=self._is_first, last=not handles
        )
        self._is_first = False
        if page.last:
            self._handles = None
        return page
