"""An engine's end of the link to the host's control server.

Runs on the scheduler's thread and never waits: one non-blocking ZeroMQ socket, looked at a few hundred
times a second at most. Without a server nothing is recorded but the picture of the programs, and sends
cost nothing. What does not fit is counted and dropped: following kvtier must not slow the engine down. What is lost
with a server that goes, or that takes nothing for a while, is told to the one that follows next.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import msgspec
import zmq

from kvtier import link_messages as messages
from kvtier.control.engine_events import EngineEvents
from kvtier.control.engine_picture import Pages

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

POLL_INTERVAL_S: Final = 0.005
REPORT_INTERVAL_S: Final = 0.1
GAUGES_INTERVAL_S: Final = 1.0
HELLO_INTERVAL_S: Final = 1.0
REVIVE_INTERVAL_S: Final = 30.0
MAX_COMMANDS: Final = 64
"""Most messages taken in at a time; the rest waits in the socket."""
PATIENCE_S: Final = 1.0
"""A server that takes no page for so long has gone, or must ask again."""
MAX_QUEUED: Final = 64
"""Messages that wait for a server that does not read."""
_READABLE: Final = int(zmq.POLLIN)
_UNWRITABLE: Final = (TypeError, ValueError, OverflowError)


class EngineLink(EngineEvents):
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
        super().__init__(block_tokens, clock)
        self._hello = hello
        self._read_gauges = read_gauges
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
        self._pages = Pages(self._programs)
        self._patient_since_s: float | None = None
        self._is_answered = False
        self._next_poll_s = self._next_hello_s = float("-inf")
        self._next_report_s = self._next_gauges_s = float("-inf")
        # It is being started when the engine is.
        self._next_revive_s = float("-inf")

    # -- the server ----------------------------------------------------------------------------------

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
            # To be told that nothing is there takes a tenth of the time that an `Again` takes.
            if not self._can_receive():
                break
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
                if self._send(self._hello()):
                    self._start_following()
                continue
            if not self._is_followed:
                self._start_following()
            found.append(message)
        if self._pages.is_open:
            self._tell_page(now_s)
        return found

    def busy(self) -> bool:
        """Whether hooks must go on until the server knows all programs."""
        return self._pages.is_open

    def answer(self, answers: list[messages.Answer]) -> None:
        """Tell the server what became of commands, and all that has happened until now."""
        self._report(self._clock(), answers)
        # What the rest of the hook changes is told when the engine goes idle.
        self._is_answered = True

    def report(self, now_s: float, *, idle: bool, settled: bool = True) -> None:
        """Send what has happened, if it is time: at once where the engine is about to go idle.

        Args:
            now_s: Monotonic time.
            idle: Nothing runs or waits.
            settled: The figures stay as they are while nothing happens; else the next call sends them again.
        """
        if not self._is_followed:
            return
        is_news = bool(self._events) or self._is_answered
        due = now_s >= self._next_gauges_s or (is_news and (idle or now_s >= self._next_report_s))
        if due:
            self._report(now_s)
        if not settled:
            self._next_gauges_s = float("-inf")

    def _report(self, now_s: float, answers: list[messages.Answer] | None = None) -> None:
        self._next_report_s = now_s + REPORT_INTERVAL_S
        self._next_gauges_s = now_s + GAUGES_INTERVAL_S
        self._is_answered = False
        self._offset_s = self._wall_clock() - now_s
        events, lost = self._take_events()
        report = messages.Report(
            engine_id=self.engine_id,
            sent_s=self._wall_clock(),
            events=events,
            gauges=self._read_gauges(),
            lost=lost,
        )
        message: messages.ToServer = report
        if answers:
            message = messages.Answered(engine_id=self.engine_id, answers=answers, report=report)
        if not self._send(message):
            # Whoever follows next is told.
            self._lost += lost + len(events)
        elif lost and self._is_followed:
            # The server's picture has holes now.
            self._pages.begin()

    def close(self) -> None:
        """Say goodbye."""
        self._send(messages.EngineBye(engine_id=self.engine_id))
        # What is still told has nobody to hear it.
        self._unfollowed()
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
        # A server that asks who this is gets what has not been told yet, too.
        self._is_followed = self._was_followed = True
        self._offset_s = self._wall_clock() - self._clock()
        self._next_gauges_s = float("-inf")
        self._pages.begin()

    def _tell_page(self, now_s: float) -> None:
        if not self._can_send():
            # It reads slowly; or it is gone, and the engine must not run for its sake for ever.
            self._patient_since_s = self._patient_since_s or now_s
            if now_s - self._patient_since_s > PATIENCE_S:
                self._unfollowed()
            return
        self._patient_since_s = None
        if self._events or self._lost:
            # A page is of now: what has happened before comes before it.
            self._report(now_s)
        if self._is_followed:
            self._send(self._pages.next(self.engine_id, self._offset_s))

    def _can_receive(self) -> bool:
        return bool(int(self._socket.get(zmq.EVENTS)) & _READABLE)

    def _can_send(self) -> bool:
        return bool(self._socket.poll(0, zmq.POLLOUT))

    def _unfollowed(self) -> None:
        self._patient_since_s = None
        self._is_followed = False
        self._lost += len(self._events)
        self._events.clear()
        self._pages.stop()

    def _send(self, message: messages.ToServer) -> bool:
        """Send, or find that nobody listens (any more)."""
        frame = self._frame(message)
        if frame is None:
            if isinstance(message, messages.Answered) and message.report is not None:
                # Somebody waits for these, whatever else cannot be written.
                self._send(msgspec.structs.replace(message, report=None))
            return True
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if not isinstance(error, zmq.Again):
                logger.warning("nothing can be told to the control server: %s", error)
            self._unfollowed()
            return False
        return True

    def _frame(self, message: messages.ToServer) -> bytes | None:
        """The message as bytes, without the programs of a page and the answers that cannot be written.

        None where there is more that cannot be: then it is left out, and the events are counted as lost.
        """
        try:
            return messages.encoder.encode(message)
        except _UNWRITABLE:
            logger.exception("a message to the control server cannot be written, and is left out")
        report = message.report if isinstance(message, messages.Answered) else message
        if isinstance(report, messages.Report):
            self._lost += len(report.events) + report.lost
        elif isinstance(message, messages.Answered):
            answers = [answer for answer in message.answers if _is_writable(answer)]
            return messages.encoder.encode(msgspec.structs.replace(message, answers=answers))
        if isinstance(message, messages.Programs):
            # One of them must not hide the others, which the server would take for gone.
            told = [state for state in message.programs if _is_writable(state)]
            return messages.encoder.encode(msgspec.structs.replace(message, programs=told))
        return None


def _is_writable(part: messages.ProgramState | messages.Answer) -> bool:
    try:
        messages.encoder.encode(part)
    except _UNWRITABLE:
        return False
    return True
