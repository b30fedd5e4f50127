"""Commands on their way to engines, and who waits for the answers.

A command stays in the engine's socket until the engine runs a hook. Who asked waits for a short while
only: an engine that is idle and cannot be woken answers when its next request comes, so the caller is
told `deferred`. Each engine has a bounded number of commands without an answer.

An engine answers in the order of its commands: what was asked before a command that it answers has lost its
answer. Answers are lost where the engine could not send; it says hello then.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from kvtier import link_messages as link
from kvtier.control.router_socket import Sent

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S: Final = 0.25
"""How long an answer is waited for where nobody can wake the engine."""
WAKEABLE_PATIENCE_S: Final = 2.0
"""The same where somebody can: the answer comes with the next step, however long that is."""
MAX_UNANSWERED: Final = 512
"""Of one engine."""
BUSY_WAKE_DELAY_S: Final = 0.05
"""An engine that seems busy runs a hook by itself sooner than this."""
REWAKE_DELAYS_S: Final = (0.02, 0.1, 0.25, 0.5)
"""A hook may have run just before the command arrived: wake again after these times."""


class EngineBusyError(Exception):
    """Too many commands wait for this engine already."""


@dataclass(slots=True, eq=False)
class Pending:
    """A command without an answer. `future` is None when nobody waits for it any more."""

    engine_id: str
    command: link.Command
    future: asyncio.Future[link.Answer] | None = None


class CommandDesk:
    """See the module's docstring.

    Args:
        send: Queues a message for an engine.
        wake: Makes an engine run a hook; False if nobody can.
        can_wake: Whether somebody can.
        seems_idle: Whether an engine is likely to run no hook by itself.
        deferred: Told of commands whose callers wait no longer.
        lost: Told of commands that will have no answer.
        clock: Unix time.
    """

    def __init__(
        self,
        *,
        send: Callable[[str, bytes], Sent],
        wake: Callable[[str, int], bool],
        can_wake: Callable[[str], bool],
        seems_idle: Callable[[str], bool],
        deferred: Callable[[Pending, link.Answer], None],
        lost: Callable[[Pending, link.Answer], None],
        clock: Callable[[], float],
    ) -> None:
        self._send = send
        self._wake = wake
        self._can_wake = can_wake
        self._seems_idle = seems_idle
        self._deferred = deferred
        self._lost = lost
        self._clock = clock
        self._ids = itertools.count(1)
        self._pending: dict[str, dict[int, Pending]] = {}
        self._before_hello: dict[str, int] = {}
        self._wake_timers: dict[str, asyncio.TimerHandle] = {}

    def unanswered(self, engine_id: str) -> int:
        """Commands of an engine without an answer."""
        return len(self._pending.get(engine_id, ()))

    async def ask(
        self, engine_id: str, command: link.Command, left_s: float | None = None
    ) -> link.Answer:
        """Send a command to an engine and wait for the answer, or until it counts as deferred.

        Args:
            engine_id: The engine.
            command: The command; its id is replaced.
            left_s: Time until the caller's own deadline; None: it has none.

        Raises:
            EngineBusyError: Too many commands wait for it; this one was not sent.
        """
        entry = self.post(engine_id, command)
        if entry is None:
            return self._lose(
                Pending(engine_id, command), "unreachable", "its link is down just now"
            )
        patience_s = self.patience_s(engine_id)
        if left_s is not None:
            patience_s = min(patience_s, left_s)
        entry.future = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(patience_s):
                return await entry.future
        except TimeoutError:
            answer = _answer(
                entry, "deferred", "not_answered", f"done at its next step: {self._why(engine_id)}"
            )
            self._deferred(entry, answer)
            return answer
        finally:
            entry.future = None

    def patience_s(self, engine_id: str) -> float:
        """How long the answer of an engine is waited for, seconds."""
        return WAKEABLE_PATIENCE_S if self._can_wake(engine_id) else PATIENCE_S

    def post(self, engine_id: str, command: link.Command) -> Pending | None:
        """Send a command; None if the engine cannot be reached just now.

        Raises:
            EngineBusyError: Too many commands wait for it; this one was not sent.
        """
        pending = self._pending.setdefault(engine_id, {})
        if len(pending) >= MAX_UNANSWERED and self._is_full(engine_id):
            raise EngineBusyError(f"{len(pending)} commands wait for engine {engine_id}")
        command = msgspec.structs.replace(command, id=next(self._ids), asked_s=self._clock())
        match self._send(engine_id, link.encoder.encode(command)):
            case Sent.FULL:
                raise EngineBusyError(f"the link to engine {engine_id} is full")
            case Sent.NO_PEER:
                return None
            case Sent.QUEUED:
                pass
        entry = pending[command.id] = Pending(engine_id, command)
        if self._can_wake(engine_id):
            self._start_waking(engine_id)
        return entry

    def answered(self, answer: link.Answer) -> Pending | None:
        """An engine has answered; return the command, None if there is none of this number."""
        pending = self._pending.get(answer.engine_id, {})
        entry = pending.pop(answer.id, None)
        if entry is None:
            return None
        self._answer_lost(answer.engine_id, answer.id)
        if not pending:
            self._stop_waking(answer.engine_id)
        if entry.future is not None and not entry.future.done():
            entry.future.set_result(answer)
        return entry

    def said_hello_again(self, engine_id: str) -> None:
        """An engine has said hello on the same socket: it answers what waits there, and nothing else.

        What was sent before leaves room for new commands, and is given up with the next hello at the latest.
        """
        self._answer_lost(engine_id, self._before_hello.get(engine_id, 0) + 1)
        self._before_hello[engine_id] = max(self._pending.get(engine_id, ()), default=0)

    def engine_lost(self, engine_id: str, reason: str, detail: str) -> None:
        """An engine is gone, or its socket with all that waited there: nothing will be answered."""
        self._stop_waking(engine_id)
        self._before_hello.pop(engine_id, None)
        for entry in self._pending.pop(engine_id, {}).values():
            self._lose(entry, reason, detail)

    def close(self) -> None:
        """Let nobody wait any more."""
        for engine_id in list(self._pending):
            self.engine_lost(engine_id, "server_stops", "the control server stops")

    def _is_full(self, engine_id: str) -> bool:
        before = self._before_hello.get(engine_id, 0)
        return sum(number > before for number in self._pending[engine_id]) >= MAX_UNANSWERED

    def _answer_lost(self, engine_id: str, until: int) -> None:
        """The answers to the commands before number `until` will not come any more."""
        pending = self._pending.get(engine_id, {})
        for number in [number for number in pending if number < until]:
            self._lose(pending.pop(number), "reconnected", "its link broke before it answered")

    def _lose(self, entry: Pending, reason: str, detail: str) -> link.Answer:
        """Tell that a command will have no answer: who waits for it, and who follows all of them."""
        answer = _answer(entry, "rejected", reason, detail)
        if entry.future is not None and not entry.future.done():
            entry.future.set_result(answer)
        self._lost(entry, answer)
        return answer

    def _why(self, engine_id: str) -> str:
        """Why an engine may not have answered, as far as that is known."""
        if self._can_wake(engine_id) or not self._seems_idle(engine_id):
            return "it has not run one since"
        return "it was idle when it reported last, and nobody can wake it"

    # -- waking --------------------------------------------------------------------------------------

    def _start_waking(self, engine_id: str) -> None:
        """Wake the engine now if it seems idle, soon if not; again while it does not answer."""
        if engine_id in self._wake_timers:
            # It is being woken: one wake is for all commands that wait.
            return
        if self._seems_idle(engine_id):
            self._wake_again(engine_id, 0)
        else:
            self._wake_in(engine_id, BUSY_WAKE_DELAY_S, 0)

    def _wake_in(self, engine_id: str, delay_s: float, count: int) -> None:
        loop = asyncio.get_running_loop()
        self._wake_timers[engine_id] = loop.call_later(delay_s, self._wake_again, engine_id, count)

    def _wake_again(self, engine_id: str, count: int) -> None:
        self._wake_timers.pop(engine_id, None)
        if not self._pending.get(engine_id) or not self._wake(engine_id, count):
            return
        if count < len(REWAKE_DELAYS_S):
            self._wake_in(engine_id, REWAKE_DELAYS_S[count], count + 1)

    def _stop_waking(self, engine_id: str) -> None:
        if (timer := self._wake_timers.pop(engine_id, None)) is not None:
            timer.cancel()


def _answer(entry: Pending, outcome: link.Outcome, reason: str, detail: str) -> link.Answer:
    return link.Answer(
        id=entry.command.id,
        engine_id=entry.engine_id,
        outcome=outcome,
        reason=reason,
        detail=detail,
    )
