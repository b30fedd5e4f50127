"""What the services share: the picture, the way to engines, the overrides and the watchers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtier import link_messages as link
from kvtier.control.api import errors
from kvtier.control.api.callers import current_caller
from kvtier.control.command_desk import EngineBusyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.control.event_hub import EventHub
    from kvtier.control.link_server import LinkServer
    from kvtier.control.override_book import OverrideBook
    from kvtier.control.override_saver import OverrideSaver
    from kvtier.control.override_sync import OverrideSync
    from kvtier.control.program_picture import ProgramPicture
    from kvtier.control.registry import EngineRecord, Registry
    from kvtier.v1.observability_pb2 import WatchEventsResponse


@dataclass(frozen=True, slots=True)
class ServerState:
    """See the module's docstring. `clock` is Unix time."""

    registry: Registry
    link_server: LinkServer
    hub: EventHub[WatchEventsResponse]
    book: OverrideBook
    saver: OverrideSaver
    sync: OverrideSync
    started_s: float
    clock: Callable[[], float]

    def engines(self, engine_id: str = "") -> list[EngineRecord]:
        """All engines, or the one of this id.

        Raises:
            ApiError: There is none: UNAVAILABLE, NOT_FOUND for an id, FAILED_PRECONDITION where one runs
                that this server cannot steer.
        """
        engines = self.registry.engines()
        if not engines:
            for hello in self.link_server.incompatible():
                raise errors.incompatible_engine(hello.engine_id, hello.versions.get("kvtier", "?"))
            raise errors.no_engine()
        if not engine_id:
            return engines
        if (engine := self.registry.engine(engine_id)) is None:
            raise errors.engine_not_found(engine_id)
        return [engine]

    def program(self, tenant: str | None, name: str) -> list[tuple[EngineRecord, ProgramPicture]]:
        """A program in each engine that knows it, if the caller may see it.

        Raises:
            ApiError: NOT_FOUND, or as `engines`.
        """
        self.engines()
        current_caller().needs_program(tenant, name)
        found = self.registry.find(tenant, name)
        if not found:
            raise errors.program_not_found(name)
        return found

    async def ask_all(self, commands: Sequence[tuple[str, link.Command]]) -> list[link.Answer]:
        """Send commands to engines at once; return their answers in this order.

        Raises:
            ApiError: RESOURCE_EXHAUSTED where no engine takes one more command.
        """
        answers = await asyncio.gather(*(self._ask(*command) for command in commands))
        busy = [answer for answer in answers if isinstance(answer, EngineBusyError)]
        if busy and len(busy) == len(answers):
            raise errors.exhausted(str(busy[0]), "ENGINE_BUSY", "commands")
        return [
            _refused(engine_id, answer) if isinstance(answer, EngineBusyError) else answer
            for (engine_id, _), answer in zip(commands, answers, strict=True)
        ]

    async def _ask(self, engine_id: str, command: link.Command) -> link.Answer | EngineBusyError:
        try:
            return await self.link_server.desk.ask(engine_id, command, current_caller().left_s())
        except EngineBusyError as error:
            return error


def _refused(engine_id: str, error: EngineBusyError) -> link.Answer:
    """The answer of one engine of several that takes no more commands."""
    return link.Answer(
        id=0, engine_id=engine_id, outcome="rejected", reason="engine_busy", detail=str(error)
    )
