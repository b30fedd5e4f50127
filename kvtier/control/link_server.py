"""The control server's end of the link: who is connected, what they say, what they are told.

It keeps the registry by what engines send, carries commands to them and answers back, and notices engines
that end without a word. Whoever sends anything without having said hello is asked to (`Resync`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from kvtier import link_messages as link
from kvtier.control.command_desk import CommandDesk
from kvtier.control.registry import RegistryFullError
from kvtier.control.router_socket import RouterSocket, Sent
from kvtier.control.wakers import Wakers
from kvtier.server import processes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvtier.control.command_desk import Pending
    from kvtier.control.registry import EngineRecord, Registry

logger = logging.getLogger(__name__)

Part = TypeVar("Part", link.Report, link.Answer)

CHECK_INTERVAL_S: Final = 1.0
RESYNC_INTERVAL_S: Final = 0.2
"""Between two `Resync`s to the same stranger."""
LONGEST_RESYNC_INTERVAL_S: Final = 30.0
"""Strangers are asked who they are ever more rarely."""
MAX_STRANGERS: Final = 1024
MAX_ID_CHARS: Final = 256


class LinkFollower(Protocol):
    """Who wants to know what the link brings."""

    def engine_came(self, engine: EngineRecord, *, is_new: bool) -> None:
        """An engine has said hello; `is_new` unless this very process was known before.

        It waits for a command, however little that says: without one it takes itself for unheard.
        """

    def engine_went(self, engine: EngineRecord, cause: str) -> None:
        """An engine is gone."""

    def tier_changed(self, engine: EngineRecord) -> None:
        """An engine's CPU tier has come or gone."""

    def reported(self, engine: EngineRecord, report: link.Report) -> None:
        """Events have been taken into the registry."""

    def events_lost(self, count: int) -> None:
        """So many events did not come, or came from one who has not said who it is."""

    def answered(self, pending: Pending, answer: link.Answer) -> None:
        """A command has its answer."""

    def deferred(self, pending: Pending, answer: link.Answer) -> None:
        """A command has no answer yet, and its caller is told so."""

    def command_lost(self, pending: Pending, answer: link.Answer) -> None:
        """A command will have no answer, whether or not anybody waits for one."""

    def link_error(self, kind: str) -> None:
        """Something came that is not understood or not wanted."""


class LinkServer:
    """See the module's docstring.

    Args:
        path: Of the Unix socket.
        registry: Kept by it.
        follower: Told of what happens.
        clock: Unix time.
        look_at_tier: Looks whether the LMCache server runs, for the registry.

    Raises:
        OSError, zmq.ZMQError: The socket cannot be bound.
    """

    def __init__(
        self,
        path: Path,
        registry: Registry,
        follower: LinkFollower,
        *,
        clock: Callable[[], float] = time.time,
        look_at_tier: Callable[[], None] = lambda: None,
    ) -> None:
        self._look_at_tier = look_at_tier
        self._registry = registry
        self._follower = follower
        self._clock = clock
        self._identities: dict[str, bytes] = {}
        self._engine_ids: dict[bytes, str] = {}
        # When each was last asked who he is, and when he may be asked again.
        self._strangers: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        self._incompatible: OrderedDict[bytes, link.EngineHello] = OrderedDict()
        self.wakers = Wakers()
        self.desk = CommandDesk(
            send=self._send_to_engine,
            wake=self._wake,
            can_wake=self.can_wake,
            seems_idle=self._seems_idle,
            deferred=follower.deferred,
            lost=follower.command_lost,
            clock=clock,
        )
        self._socket = RouterSocket(path, self.received)

    # -- asked by the server -------------------------------------------------------------------------

    def can_wake(self, engine_id: str) -> bool:
        """Whether a command reaches the engine at once while it is idle."""
        engine = self._registry.engine(engine_id)
        return engine is not None and bool(self.wakers.of(engine.hello))

    def wake_without_tier(self) -> None:
        """Wake idle engines whose CPU tier is away: it comes back, and is known to have, in their hooks."""
        for engine in self._registry.engines():
            gauges = engine.gauges
            if gauges and gauges.tier_state in {"lost", "starting"} and engine.seems_idle:
                self._wake(engine.engine_id, 0)

    def incompatible(self) -> list[link.EngineHello]:
        """Engines that speak another version of the link, and so cannot be steered."""
        return list(self._incompatible.values())

    async def watch_processes(self) -> None:
        """Forget engines and wakers whose processes have ended; runs until it is cancelled."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            try:
                self.forget_dead()
            except Exception:
                # It must go on looking: nobody else tells of a killed engine.
                logger.exception("could not look which processes have ended")

    def forget_dead(self) -> None:
        """Look once which processes have ended."""
        for engine in self._registry.engines():
            if not processes.alive(engine.hello.pid, engine.hello.pid_start_s):
                self._engine_gone(engine.engine_id, "died")
        for identity, hello in list(self._incompatible.items()):
            if not processes.alive(hello.pid, hello.pid_start_s):
                del self._incompatible[identity]
        self.wakers.forget_dead()

    def close(self) -> None:
        """Close the socket; nobody waits for answers any more."""
        self.desk.close()
        self._socket.close()

    # -- what comes ----------------------------------------------------------------------------------

    def received(self, identity: bytes, frames: list[bytes]) -> None:
        """Take in a message, whatever it is."""
        if len(frames) != 1:
            self._follower.link_error("malformed")
            return
        try:
            message = link.server_decoder.decode(frames[0])
        # What msgspec raises, also where text is no UTF-8.
        except (ValueError, RecursionError):
            self._follower.link_error("malformed")
            return
        match message:
            case link.EngineHello():
                self._hello(identity, message)
            case link.WakerHello():
                self._waker_hello(identity, message)
            case link.EngineBye():
                if self._engine_ids.get(identity) == message.engine_id:
                    self._engine_gone(message.engine_id, "bye")
            case _ if self._engine_ids.get(identity) != message.engine_id:
                report = message.report if isinstance(message, link.Answered) else message
                if isinstance(report, link.Report):
                    self._follower.events_lost(len(report.events) + report.lost)
                self._ask_who(identity)
            case link.Programs():
                self._registry.programs_page(message, self._clock())
            case link.Report():
                self._report(message)
            case link.Answered():
                self._answered(message)

    def _hello(self, identity: bytes, hello: link.EngineHello) -> None:
        if hello.link != link.LINK_VERSION:
            self._refuse_version(identity, hello)
            return
        if not _plausible(hello) or not processes.alive(hello.pid, hello.pid_start_s):
            # Another PID namespace, say: nobody would notice its end.
            logger.warning("engine %.64r (pid %d) is not visible here", hello.engine_id, hello.pid)
            self._follower.link_error("invisible_engine")
            return
        before = self._registry.engine(hello.engine_id)
        try:
            is_new = self._registry.hello(hello, self._clock())
        except RegistryFullError as error:
            logger.warning("engine %s is not taken in: %s", hello.engine_id, error)
            self._follower.link_error("too_many_engines")
            return
        if is_new and before is not None:
            self._follower.engine_went(before, "restarted")
        if self._identities.get(hello.engine_id) != identity:
            self._bind(identity, hello.engine_id)
        else:
            self.desk.said_hello_again(hello.engine_id)
        engine = self._registry.engine(hello.engine_id)
        assert engine is not None
        if is_new:
            logger.info("engine %s (pid %d, %s) is here", engine.engine_id, hello.pid, hello.model)
        self._follower.engine_came(engine, is_new=is_new)

    def _bind(self, identity: bytes, engine_id: str) -> None:
        """From now on this socket is the engine's."""
        if (old := self._identities.pop(engine_id, None)) is not None:
            del self._engine_ids[old]
        if (other := self._engine_ids.pop(identity, None)) is not None:
            # One socket, another engine: the one before has not said goodbye.
            self._identities.pop(other, None)
            self._engine_gone(other, "replaced")
        # What waited in the socket before is lost with it.
        self.desk.engine_lost(engine_id, "reconnected", "its link broke before it answered")
        self._identities[engine_id] = identity
        self._engine_ids[identity] = engine_id
        self._strangers.pop(identity, None)

    def _refuse_version(self, identity: bytes, hello: link.EngineHello) -> None:
        self._follower.link_error("link_version")
        if identity not in self._incompatible:
            logger.error(
                "engine %.64r speaks version %d of the link and this control server (kvtier %s) version "
                "%d: use one version of kvtier, and restart the engines that run the other one",
                hello.engine_id,
                hello.link,
                hello.versions.get("kvtier", "?"),
                link.LINK_VERSION,
            )
        self._incompatible[identity] = hello
        if len(self._incompatible) > MAX_STRANGERS:
            self._incompatible.popitem(last=False)

    def _waker_hello(self, identity: bytes, hello: link.WakerHello) -> None:
        if hello.link != link.LINK_VERSION or not self.wakers.hello(identity, hello):
            self._follower.link_error("waker_refused")
        elif not any(identity in self.wakers.of(e.hello) for e in self._registry.engines()):
            # Engines that are idle since before this server began do not know of it, and one that has just
            # started may not be connected yet: so again with the next hello.
            self._send(identity, link.Wake(dp_rank=link.ALL_RANKS))

    def _report(self, report: link.Report) -> None:
        engine = self._registry.engine(report.engine_id)
        if engine is None:
            return
        tier_before = engine.gauges.tier_state if engine.gauges is not None else None
        if report.gauges.tier_state == "ready" != tier_before:
            # The LMCache server may be back since somebody looked last.
            self._look_at_tier()
        self._registry.report(report, self._clock())
        self._follower.reported(engine, report)
        tier = engine.gauges.tier_state if engine.gauges is not None else None
        if tier != tier_before:
            self._follower.tier_changed(engine)

    def _answered(self, message: link.Answered) -> None:
        if message.report is not None:
            self._in_message(self._report, message.report, message.engine_id)
        for answer in message.answers:
            self._in_message(self._answer, answer, message.engine_id)

    def _in_message(self, take: Callable[[Part], None], part: Part, engine_id: str) -> None:
        """Take in a part of a message: nobody speaks for another engine, and no part keeps the next ones away."""
        if part.engine_id != engine_id:
            self._follower.link_error("foreign_part")
            return
        try:
            take(part)
        except Exception:
            logger.exception("a part of a message of engine %s could not be handled", engine_id)

    def _answer(self, answer: link.Answer) -> None:
        if answer.policy is not None:
            self._registry.policy(answer.engine_id, answer.policy)
        pending = self.desk.answered(answer)
        if pending is None:
            self._follower.link_error("stray_answer")
            return
        self._take_in(pending.command, answer)
        self._follower.answered(pending, answer)

    def _take_in(self, command: link.Command, answer: link.Answer) -> None:
        """What a client has announced is part of the picture once the engine has accepted it."""
        if answer.outcome != "accepted":
            return
        engine = self._registry.engine(answer.engine_id)
        if engine is None:
            return
        match command:
            case link.ToolCallCommand():
                if program := engine.programs.get(command.program):
                    expected_s = command.p50_s
                    asked_s = self._clock() if command.asked_s is None else command.asked_s
                    returns_s = None if expected_s is None else asked_s + expected_s
                    program.tool_called(command.tool, returns_s)
            case link.ToolReturnCommand():
                if program := engine.programs.get(command.program):
                    program.tool_returned(self._clock())
            case _:
                pass

    def _ask_who(self, identity: bytes) -> None:
        if identity in self._incompatible:
            return
        now_s, wait_s = self._clock(), RESYNC_INTERVAL_S
        if (known := self._strangers.get(identity)) is not None:
            asked_s, wait_s = known
            if abs(now_s - asked_s) < wait_s:
                return
            # Asked in vain, perhaps for a reason that lasts; and asking wakes everybody.
            wait_s = min(2 * wait_s, LONGEST_RESYNC_INTERVAL_S)
        self._strangers[identity] = now_s, wait_s
        self._strangers.move_to_end(identity)
        if len(self._strangers) > MAX_STRANGERS:
            self._strangers.popitem(last=False)
        self._send(identity, link.Resync())
        # Whoever it is may be idle by now, and read this only when it is woken; only its hello will tell its rank.
        for waker in self.wakers.identities():
            self._send(waker, link.Wake(dp_rank=link.ALL_RANKS))

    def _engine_gone(self, engine_id: str, cause: str) -> None:
        engine = self._registry.gone(engine_id)
        if (identity := self._identities.pop(engine_id, None)) is not None:
            self._engine_ids.pop(identity, None)
        self.desk.engine_lost(engine_id, "engine_gone", "the engine has ended")
        if engine is not None:
            logger.info("engine %s is gone: %s", engine_id, cause)
            self._follower.engine_went(engine, cause)

    # -- what goes out -------------------------------------------------------------------------------

    def _send(self, identity: bytes, message: link.Resync | link.Wake) -> Sent:
        return self._socket.send(identity, link.encoder.encode(message))

    def _send_to_engine(self, engine_id: str, payload: bytes) -> Sent:
        identity = self._identities.get(engine_id)
        return Sent.NO_PEER if identity is None else self._socket.send(identity, payload)

    def _seems_idle(self, engine_id: str) -> bool:
        engine = self._registry.engine(engine_id)
        return engine is None or engine.seems_idle

    def _wake(self, engine_id: str, attempt: int) -> bool:
        """Ask one of those who can, another one with each attempt. False if nobody can."""
        engine = self._registry.engine(engine_id)
        wakers = self.wakers.of(engine.hello) if engine is not None else []
        if engine is None or not wakers:
            return False
        start = attempt % len(wakers)
        for identity in wakers[start:] + wakers[:start]:
            if self._send(identity, link.Wake(dp_rank=engine.hello.dp_rank)) is Sent.QUEUED:
                return True
            self.wakers.gone(identity)
        return False


def _plausible(hello: link.EngineHello) -> bool:
    return 0 < len(hello.engine_id) <= MAX_ID_CHARS and hello.engine_id.isprintable()
