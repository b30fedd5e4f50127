"""Live progress of the demo: which arm, what it does, programs and turns done, time left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from rich.console import Console

    from kvtier.demo.arms import Arm
    from kvtier.demo.driver import TurnRecord


class DemoProgress:
    """A bar per arm; where the output is no terminal, a line per step instead."""

    def __init__(self, console: Console, arms: Sequence[Arm], programs: int, turns: int) -> None:
        """Prepare bars for ``arms``, each with ``turns`` requests of ``programs`` programs."""
        self._console = console
        self._programs = programs
        self._done = 0
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("turns"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[Arm, TaskID] = {
            arm: self._progress.add_task(arm.label, total=turns, start=False, state="waiting")
            for arm in arms
        }

    def __enter__(self) -> Self:
        """Show the bars."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bars as they are."""
        self._progress.stop()

    def starting(self, arm: Arm, what: str) -> None:
        """A server of ``arm`` is being started."""
        self._line(arm, f"starting {what}")

    def waiting(self, arm: Arm, what: str, waited_s: float) -> None:
        """``what`` is not ready after ``waited_s`` seconds."""
        self._progress.update(self._bars[arm], state=f"starting {what}, {waited_s:.0f} s")

    def running(self, arm: Arm) -> None:
        """The programs of ``arm`` start."""
        self._done = 0
        self._progress.start_task(self._bars[arm])
        self._line(arm, f"running {self._programs} programs")

    def turn(self, arm: Arm, record: TurnRecord, *, last: bool) -> None:
        """A turn ended, the program's ``last`` one perhaps."""
        self._progress.advance(self._bars[arm])
        state = f"{self._done} of {self._programs} programs done"
        if last:
            self._done += 1
            state = f"{self._done} of {self._programs} programs done"
            if self._progress.disable:
                self._line(arm, f"{state}, {record.program} after {record.end_s:.1f} s")
        self._progress.update(self._bars[arm], state=state)

    def finished(self, arm: Arm, mean_jct_s: float) -> None:
        """All programs of ``arm`` are done."""
        self._progress.stop_task(self._bars[arm])
        self._line(arm, f"mean job completion {mean_jct_s:.1f} s")

    def _line(self, arm: Arm, state: str) -> None:
        self._progress.update(self._bars[arm], state=state)
        if self._progress.disable:
            self._console.print(f"{arm.label}: {state}", highlight=False, markup=False)
