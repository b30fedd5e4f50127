"""What happens in an engine, as events for the control server, and the picture of its programs that they make.

Without a server nothing is recorded but that picture. What does not fit is counted and dropped, and so is
what happens after a server has gone: whoever follows next is told how much it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from kvtier import link_messages as messages
from kvtier.control.engine_picture import KnownProgram
from kvtier.turns.happenings import Happenings
from kvtier.turns.request_view import trace_headers

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.gpu_pin import Pin
    from kvtier.programs import TurnStart
    from kvtier.turns.turn import Turn

MAX_EVENTS: Final = 4096
"""Most events between two reports."""


class EngineEvents(Happenings):
    """See the module's docstring.

    Args:
        block_tokens: Tokens in a GPU block.
        clock: Monotonic time.
    """

    def __init__(self, block_tokens: int, clock: Callable[[], float]) -> None:
        self._block_tokens = block_tokens
        self._clock = clock
        self._programs: dict[str, KnownProgram] = {}
        self._events: list[messages.Event] = []
        self._lost = 0
        self._is_followed = False
        self._was_followed = False
        self._offset_s = 0.0

    @property
    def is_followed(self) -> bool:
        """Whether a control server listens."""
        return self._is_followed

    def _take_events(self) -> tuple[list[messages.Event], int]:
        """What has happened since the last call, and how much of it, or before it, was lost."""
        events, self._events = self._events, []
        lost, self._lost = self._lost, 0
        return events, lost

    # -- what happens --------------------------------------------------------------------------------

    def turn_started(self, turn: Turn, start: TurnStart) -> None:
        """See `Happenings`."""
        known = self._programs.get(turn.program)
        if known is None:
            program = start.program
            tenant = None if program.tenant is None else _text(program.tenant)
            key = messages.ProgramKey(tenant, _text(program.name), program.kind == "named")
            known = KnownProgram(key, turn.arrived_s, turn.arrived_s)
            self._programs[turn.program] = known
        known.turns = start.turn_index + 1
        known.last_active_s = turn.arrived_s
        known.waiting.add(turn.request_id)
        known.tool = known.gap_s = None
        if self._wanted():
            self._tell(
                messages.TurnStarted(
                    at_s=turn.arrived_s + self._offset_s,
                    program=known.key,
                    request_id=turn.request_id,
                    turn=known.turns,
                    prompt_tokens=int(turn.request.num_tokens),
                    gap_s=start.gap.gap_s if start.gap is not None else None,
                    trace=trace_headers(turn.request),
                )
            )

    def turn_running(self, turn: Turn, gpu_tokens: int, cpu_tokens: int, now_s: float) -> None:
        """See `Happenings`."""
        known = self._programs.get(turn.program)
        if known is None:
            return
        known.waiting.discard(turn.request_id)
        known.running.add(turn.request_id)
        if self._wanted():
            total = int(turn.request.num_tokens)
            self._tell(
                messages.TurnRunning(
                    at_s=now_s + self._offset_s,
                    program=known.key,
                    request_id=turn.request_id,
                    gpu_tokens=gpu_tokens,
                    cpu_tokens=cpu_tokens,
                    recomputed_tokens=max(0, total - gpu_tokens - cpu_tokens),
                )
            )

    def turn_ended(
        self, turn: Turn, tool: str | None, gap_s: float | None, now_s: float, *, aborted: bool
    ) -> None:
        """See `Happenings`."""
        known = self._programs.get(turn.program)
        if known is None:
            return
        known.waiting.discard(turn.request_id)
        known.running.discard(turn.request_id)
        known.last_active_s = now_s
        known.context_tokens = int(turn.request.num_tokens)
        known.tool, known.gap_s = tool, gap_s
        if self._wanted():
            self._tell(
                messages.TurnEnded(
                    at_s=now_s + self._offset_s,
                    program=known.key,
                    request_id=turn.request_id,
                    context_tokens=known.context_tokens,
                    output_tokens=int(turn.request.num_output_tokens),
                    tool=tool,
                    predicted_gap_s=gap_s,
                    aborted=aborted,
                )
            )

    def tool_announced(self, program: str, tool: str, gap_s: float | None, now_s: float) -> None:
        """See `Happenings`. The server, which has passed it on, knows."""
        known = self._programs.get(program)
        if known is None:
            return
        known.tool = tool
        if gap_s is not None:
            known.gap_s = now_s - known.last_active_s + gap_s

    def decided(self, event: str, program: str, request_id: str, entry: dict[str, Any]) -> None:
        """See `Happenings`."""
        known = self._programs.get(program)
        if known is None:
            return
        at_s = self._clock() + self._offset_s
        if event == "release":
            known.pins.pop(request_id, None)
            if self._wanted():
                self._tell(
                    messages.PinEnded(
                        at_s=at_s,
                        program=known.key,
                        request_id=request_id,
                        cause=entry["cause"],
                        tokens=entry["blocks"] * self._block_tokens,
                    )
                )
        elif event in _DECISIONS and self._wanted():
            inputs = {k: v for k, v in entry.items() if k not in _OUTCOME}
            self._tell(
                messages.Decided(
                    at_s=at_s,
                    program=known.key,
                    request_id=request_id,
                    event=_DECISIONS[event],
                    action=entry["action"],
                    reason=entry["reason"],
                    ttl_s=entry.get("ttl_s", 0.0),
                    costs=[messages.OptionCost(k, v) for k, v in entry.get("costs", {}).items()],
                    inputs=inputs,
                )
            )

    def pinned(self, pin: Pin) -> None:
        """See `Happenings`."""
        known = self._programs.get(pin.program)
        if known is None:
            return
        tokens = len(pin.block_ids) * self._block_tokens
        known.pins[pin.key] = tokens, pin.deadline_s
        if self._wanted():
            self._tell(
                messages.Pinned(
                    at_s=self._clock() + self._offset_s,
                    program=known.key,
                    request_id=pin.key,
                    tokens=tokens,
                    deadline_s=pin.deadline_s + self._offset_s,
                )
            )

    def staged(self, program: str, tokens: int) -> None:
        """See `Happenings`."""
        known = self._programs.get(program)
        if known is None:
            return
        known.cpu_tokens = tokens
        if self._wanted():
            at_s = self._clock() + self._offset_s
            self._tell(messages.Staged(at_s=at_s, program=known.key, tokens=tokens))

    def loaded(
        self, program: str, request_id: str, tokens: int, duration_s: float, *, ok: bool
    ) -> None:
        """See `Happenings`."""
        known = self._programs.get(program)
        if known is not None and self._wanted():
            self._tell(
                messages.Loaded(
                    at_s=self._clock() + self._offset_s,
                    program=known.key,
                    request_id=request_id,
                    tokens=tokens,
                    duration_s=duration_s,
                    ok=ok,
                )
            )

    def program_gone(self, program: str) -> None:
        """See `Happenings`."""
        known = self._programs.pop(program, None)
        if known is not None and self._wanted():
            at_s = self._clock() + self._offset_s
            self._tell(messages.ProgramGone(at_s=at_s, program=known.key))

    def _wanted(self) -> bool:
        """Whether an event is to be told; asked once for each. It is lost where nobody listens any more."""
        if not self._is_followed and self._was_followed:
            self._lost += 1
        return self._is_followed

    def _tell(self, event: messages.Event) -> None:
        if len(self._events) < MAX_EVENTS:
            self._events.append(event)
        else:
            self._lost += 1


_DECISIONS: Final[dict[str, Literal["pause", "return", "prefetch"]]] = {
    "pause": "pause",
    "return": "return",
    "prefetch": "prefetch",
}
_OUTCOME: Final = frozenset({"action", "reason", "ttl_s", "costs"})
"""Of a decision's entry, what is no input."""


def _text(name: str) -> str:
    """A name as a message can hold it: without the lone surrogates that JSON escapes can make."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
