"""What the control server knows of one program in one engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from kvtier import link_messages as link

if TYPE_CHECKING:
    from kvtier.link_messages import ProgramKey

T = TypeVar("T")

MAX_REQUESTS: Final = 1024
"""Most requests, and most pins, remembered of one program; the oldest is forgotten."""

Activity = Literal["waiting", "running", "paused"]


@dataclass(slots=True)
class ProgramPicture:
    """One program, as its engine's events tell; times are Unix seconds.

    Events may be lost, doubled or late: any order of them leaves a picture, and the next `Programs` of
    the engine makes it right.
    """

    key: ProgramKey
    started_s: float
    last_active_s: float
    turns: int = 0
    context_tokens: int = 0
    cpu_tokens: int = 0
    waiting: dict[str, None] = field(default_factory=dict)
    running: dict[str, None] = field(default_factory=dict)
    pins: dict[str, tuple[int, float]] = field(default_factory=dict)
    _tool: str | None = None
    _predicted_return_s: float | None = None

    @classmethod
    def from_state(cls, state: link.ProgramState) -> ProgramPicture:
        """The picture of a program that an engine describes as a whole."""
        picture = cls(
            state.program,
            state.started_s,
            state.last_active_s,
            turns=state.turns,
            context_tokens=state.context_tokens,
            cpu_tokens=state.cpu_tokens,
            waiting=dict.fromkeys(state.waiting[-MAX_REQUESTS:]),
            running=dict.fromkeys(state.running[-MAX_REQUESTS:]),
            pins={p.request_id: (p.tokens, p.deadline_s) for p in state.pins[-MAX_REQUESTS:]},
        )
        picture._tool = state.tool
        picture._predicted_return_s = state.predicted_return_s
        return picture

    @property
    def activity(self) -> Activity:
        """What the program does now."""
        if self.running:
            return "running"
        return "waiting" if self.waiting else "paused"

    @property
    def tool(self) -> str | None:
        """The tool of the present pause."""
        return self._tool if self.activity == "paused" else None

    @property
    def predicted_return_s(self) -> float | None:
        """When the present pause is expected to end."""
        return self._predicted_return_s if self.activity == "paused" else None

    @property
    def pinned_tokens(self) -> int:
        """Tokens that pins keep in GPU memory; those that several pins share count for each."""
        return sum(tokens for tokens, _ in self.pins.values())

    def ttl_left_s(self, now_s: float) -> float | None:
        """Time until the last pin ends; None without a pin.

        0 where the deadline has passed and the engine has not run since to drop the pin.
        """
        if not self.pins:
            return None
        return max(0.0, max(deadline_s for _, deadline_s in self.pins.values()) - now_s)

    def apply(self, event: link.Event) -> None:
        """Follow an event of this program. Never raises."""
        match event:
            case link.TurnStarted():
                self.turns = event.turn
                self.last_active_s = event.at_s
                self._tool = self._predicted_return_s = None
                _remember(self.waiting, event.request_id, None)
            case link.TurnRunning():
                self.waiting.pop(event.request_id, None)
                _remember(self.running, event.request_id, None)
            case link.TurnEnded():
                self.waiting.pop(event.request_id, None)
                self.running.pop(event.request_id, None)
                self.last_active_s = event.at_s
                self.context_tokens = event.context_tokens
                self._tool, self._predicted_return_s = event.tool, None
                if event.predicted_gap_s is not None:
                    self._predicted_return_s = event.at_s + event.predicted_gap_s
            case link.Pinned():
                _remember(self.pins, event.request_id, (event.tokens, event.deadline_s))
            case link.PinEnded():
                self.pins.pop(event.request_id, None)
            case link.Staged():
                self.cpu_tokens = event.tokens
            case link.Decided() | link.Loaded() | link.ProgramGone():
                pass

    def tool_called(self, tool: str, returns_s: float | None) -> None:
        """Follow an announced tool call that the engine has accepted."""
        self._tool = tool
        if returns_s is not None:
            self._predicted_return_s = returns_s

    def tool_returned(self, now_s: float) -> None:
        """Follow an announced return that the engine has accepted."""
        self._predicted_return_s = now_s


def _remember(entries: dict[str, T], key: str, value: T) -> None:
    """Set an entry of a bounded dict."""
    if key not in entries and len(entries) >= MAX_REQUESTS:
        del entries[next(iter(entries))]
    entries[key] = value
