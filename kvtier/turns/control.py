"""The control server, as the scheduler half sees it: commands in, answers and reports out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvtier.link_messages import Answer, PolicyCommand

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.link_messages import Command
    from kvtier.turns.commands import Commands
    from kvtier.turns.live_policy import LivePolicy


class ControlLink(Protocol):
    """An engine's end of the link; see `kvtier.control.link`."""

    engine_id: str

    def commands(self, now_s: float, *, urgent: bool = False) -> list[Command]:
        """Commands that have come."""

    def answer(self, answers: list[Answer]) -> None:
        """Tell what became of commands."""

    def report(self, now_s: float, *, idle: bool, settled: bool = True) -> None:
        """Send what has happened, if it is time."""

    def busy(self) -> bool:
        """Whether an idle engine must run hooks on: there is more to send."""

    def close(self) -> None:
        """Say goodbye."""


class Control:
    """Applies each command and answers it."""

    def __init__(
        self,
        link: ControlLink,
        commands: Commands,
        live_policy: LivePolicy,
        wall_clock: Callable[[], float],
    ) -> None:
        self._link = link
        self._commands = commands
        self._live_policy = live_policy
        self._wall_clock = wall_clock

    def run(self, now_s: float, *, urgent: bool = False) -> None:
        """Take in what has come; called at every hook that begins something."""
        # Together: to send is the dearest part of a command.
        if answers := [self._answer(c, now_s) for c in self._link.commands(now_s, urgent=urgent)]:
            self._link.answer(answers)

    def report(self, now_s: float, *, idle: bool, settled: bool = True) -> None:
        """Tell what has happened, at once where nothing will run for a while."""
        self._link.report(now_s, idle=idle, settled=settled)

    def _answer(self, command: Command, now_s: float) -> Answer:
        result = self._commands.apply(command, now_s, self._wall_clock() - now_s)
        return Answer(
            id=command.id,
            engine_id=self._link.engine_id,
            outcome=result.outcome,
            reason=result.reason,
            detail=result.detail,
            policy=self._live_policy.state() if isinstance(command, PolicyCommand) else None,
        )
