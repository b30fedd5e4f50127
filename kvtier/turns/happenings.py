"""What happens in the scheduler half, told to whoever follows it.

This base class tells nobody: an engine without a control server. `kvtier.control.link` has the one that
reports to it. Methods are called from the scheduler's thread, several times a turn, so they must be quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtier.gpu_pin import Pin
    from kvtier.programs import TurnStart
    from kvtier.turns.turn import Turn


class Happenings:
    """See the module's docstring. Times are monotonic, in seconds; programs are handles."""

    def turn_started(self, turn: Turn, start: TurnStart) -> None:
        """A request has come."""

    def turn_running(self, turn: Turn, gpu_tokens: int, cpu_tokens: int, now_s: float) -> None:
        """A request has its blocks; so many of its prompt's tokens have their KV already, or are loaded."""

    def turn_ended(
        self, turn: Turn, tool: str | None, gap_s: float | None, now_s: float, *, aborted: bool
    ) -> None:
        """A turn is over; half of the pauses after such turns are shorter than `gap_s`."""

    def decided(self, event: str, program: str, request_id: str, entry: dict[str, Any]) -> None:
        """A decision, or the end of a pin: what the decision log gets, see `DecisionLog.write`."""

    def tool_announced(self, program: str, tool: str, gap_s: float | None, now_s: float) -> None:
        """The client has said which tool a paused program runs, and how long it stays away from now on."""

    def pinned(self, pin: Pin) -> None:
        """A pin began, or its deadline has changed."""

    def staged(self, program: str, tokens: int) -> None:
        """The CPU tier has confirmed that it holds so many tokens of the program."""

    def loaded(
        self, program: str, request_id: str, tokens: int, duration_s: float, *, ok: bool
    ) -> None:
        """A load from the CPU tier has ended."""

    def program_gone(self, program: str) -> None:
        """The engine knows the program no longer."""
