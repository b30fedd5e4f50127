"""An engine's end of the link to the host's control server.

Runs on the scheduler's thread and never waits: one non-blocking ZeroMQ socket, looked at a few hundred
times a second at most. Without a server nothing is recorded but the picture of the programs, and sends
cost nothing. What does not fit is counted and dropped: following kvtier must not slow the engine down.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import zmq

from kvtier import link_messages as messages
from kvtier.control.engine_picture import KnownProgram, pages
from kvtier.turns.happenings import Happenings

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.gpu_pin import Pin
    from kvtier.programs import TurnStart
    from kvtier.turns.turn import Turn

logger = logging.getLogger(__name__)

POLL_INTERVAL_S: Final = 0.005
REPORT_INTERVAL_S: Final = 0.1
GAUGES_INTERVAL_S: Final = 1.0
HELLO_INTERVAL_S: Final = 1.0
REVIVE_INTERVAL_S: Final = 30.0
MAX_EVENTS: Final = 4096
"""Most events between two reports."""
MAX_COMMANDS: Final = 64
"""Most messages taken in at a time; the rest waits in the socket."""
MAX_QUEUED: Final = 64
"""Messages that wait for a server that does not read."""


class EngineLink(Happenings):
    """See the module's docstring.

    Args:
        endpoint: Of the control server's link socket.
        engine_id: The engine's name.
        hello: Returns the hello of now; called when there is a scheduler half.
        read_gauges: Returns the figures of now.
        block_tokens: Tokens in a GPU block.
        clock: Monotonic time.
        revive: Sees to it that there is a control server; returns at once. None: nobody does.
        wall_clock: Unix time.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        engine_id: str,
        hello: Callable[[], messages.EngineHello],
        read_gauges: Callable[[], messages.Gauges],
        block_tokens: int,
        clock: Callable[[], float],
        revive: Callable[[], None] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._hello = hello
        self._read_gauges = read_gauges
        self._block_tokens = block_tokens
        self._clock = clock
        self._wall_clock = wall_clock
        self._revive = revive
        self.engine_id = engine_id
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # Never queue for a server that is not there.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        # Nor keep much for one that hangs.
        self._socket.setsockopt(zmq.SNDHWM, MAX_QUEUED)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 200)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self._socket.connect(endpoint)
        self._programs: dict[str, KnownProgram] = {}
        self._events: list[messages.Event] = []
        self._lost = 0
        self._is_followed = False
        self._offset_s = 0.0
        self._next_poll_s = self._next_hello_s = float("-inf")
        self._next_report_s = self._next_gauges_s = float("-inf")
        # It is being started when the engine is.
        self._next_revive_s = float("-inf")

    # -- the server ----------------------------------------------------------------------------------

    @property
    def is_followed(self) -> bool:
        """Whether a control server listens."""
        return self._is_followed

    def commands(self, now_s: float, *, urgent: bool = False) -> list[messages.Command]:
        """Commands that have come. Looks for them every few milliseconds, or now when it is `urgent`."""
        if now_s < self._next_poll_s and not urgent:
            return []
        self._next_poll_s = now_s + POLL_INTERVAL_S
        if not self._is_followed and now_s >= self._next_hello_s:
            self._next_hello_s = now_s + HELLO_INTERVAL_S
            if not self._send(self._hello()):
                self._call_back(now_s)
        found: list[messages.Command] = []
        for _ in range(MAX_COMMANDS):
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = messages.engine_decoder.decode(frame)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                logger.warning("a message of the control server is ignored: %s", error)
                continue
            if isinstance(message, messages.Resync):
                self._send(self._hello())
                self._start_following()
                continue
            if not self._is_followed:
                self._start_following()
            found.append(message)
        return found

    def answer(self, answer: messages.Answer) -> None:
        """Tell the server what became of a command, after all that happened before."""
        self.report(self._clock(), idle=True)
        self._send(answer)

    def report(self, now_s: float, *, idle: bool) -> None:
        """Send what has happened, if it is time: at once where the engine is about to go idle."""
        if not self._is_followed:
            return
        due = now_s >= self._next_gauges_s or (
            bool(self._events) and (idle or now_s >= self._next_report_s)
        )
        if not due:
            return
        self._next_report_s = now_s + REPORT_INTERVAL_S
        self._next_gauges_s = now_s + GAUGES_INTERVAL_S
        self._offset_s = self._wall_clock() - now_s
        events, self._events = self._events, []
        lost, self._lost = self._lost, 0
        self._send(
            messages.Report(
                engine_id=self.engine_id,
                sent_s=self._wall_clock(),
                events=events,
                gauges=self._read_gauges(),
                lost=lost,
            )
        )
        if lost:
            # The server's picture has holes now.
            self._send_programs()

    def close(self) -> None:
        """Say goodbye."""
        self._send(messages.EngineBye(engine_id=self.engine_id))
        self._socket.close(linger=100)
        self._context.term()

    def _call_back(self, now_s: float) -> None:
        """Nobody listens: see to it that there is a server, now and then."""
        if now_s < self._next_revive_s:
            return
        is_first = self._next_revive_s == float("-inf")
        self._next_revive_s = now_s + REVIVE_INTERVAL_S
        if is_first or self._revive is None:
            return
        try:
            self._revive()
        except Exception:
            # A host without processes to spare, say: the engine goes on unobserved.
            logger.exception("the control server could not be started again")

    def _start_following(self) -> None:
        self._is_followed = True
        self._events.clear()
        self._offset_s = self._wall_clock() - self._clock()
        self._next_gauges_s = float("-inf")
        self._send_programs()

    def _send_programs(self) -> None:
        for first, page in pages(self._programs.values(), self._offset_s):
            self._send(messages.Programs(engine_id=self.engine_id, programs=page, first=first))

    def _send(self, message: messages.ToServer) -> bool:
        """Send, or find that nobody listens (any more)."""
        try:
            self._socket.send(messages.encoder.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if not isinstance(error, zmq.Again):
                logger.warning("nothing can be told to the control server: %s", error)
            self._is_followed = False
            self._events.clear()
            return False
        return True

    # -- what happens --------------------------------------------------------------------------------

    def turn_started(self, turn: Turn, start: TurnStart) -> None:
        """See `Happenings`."""
        known = self._programs.get(turn.program)
        if known is None:
            program = start.program
            key = messages.ProgramKey(program.tenant, program.name, program.kind == "named")
            known = KnownProgram(key, turn.arrived_s, turn.arrived_s)
            self._programs[turn.program] = known
        known.turns = start.turn_index + 1
        known.last_active_s = turn.arrived_s
        known.waiting.add(turn.request_id)
        known.tool = known.gap_s = None
        if self._is_followed:
            self._tell(
                messages.TurnStarted(
                    at_s=turn.arrived_s + self._offset_s,
                    program=known.key,
                    request_id=turn.request_id,
                    turn=known.turns,
                    prompt_tokens=int(turn.request.num_tokens),
                    gap_s=start.gap.gap_s if start.gap is not None else None,
                )
            )

    def turn_running(self, turn: Turn, gpu_tokens: int, cpu_tokens: int, now_s: float) -> None:
        """See `Happenings`."""
        known = self._programs.get(turn.program)
        if known is None:
            return
        known.waiting.discard(turn.request_id)
        known.running.add(turn.request_id)
        if self._is_followed:
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
        if self._is_followed:
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
            if self._is_followed:
                self._tell(
                    messages.PinEnded(
                        at_s=at_s,
                        program=known.key,
                        request_id=request_id,
                        cause=entry["cause"],
                        tokens=entry["blocks"] * self._block_tokens,
                    )
                )
        elif self._is_followed and event in _DECISIONS:
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
                    costs=[messages.OptionCost(k, v) for k, v in entry["costs"].items()],
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
        if self._is_followed:
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
        if self._is_followed:
            at_s = self._clock() + self._offset_s
            self._tell(messages.Staged(at_s=at_s, program=known.key, tokens=tokens))

    def loaded(
        self, program: str, request_id: str, tokens: int, duration_s: float, *, ok: bool
    ) -> None:
        """See `Happenings`."""
        known = self._programs.get(program)
        if known is not None and self._is_followed:
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
        if known is not None and self._is_followed:
            at_s = self._clock() + self._offset_s
            self._tell(messages.ProgramGone(at_s=at_s, program=known.key))

    def _tell(self, event: messages.Event) -> None:
        if len(self._events) < MAX_EVENTS:
            self._events.append(event)
        else:
            self._lost += 1


_DECISIONS: Final[dict[str, Literal["pause", "return"]]] = {"pause": "pause", "return": "return"}
_OUTCOME: Final = frozenset({"action", "reason", "ttl_s", "costs"})
"""Of a decision's entry, what is no input."""
