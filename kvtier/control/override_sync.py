"""Brings the list of TTL overrides to the engines, and knows which of them have it.

The whole list is sent after an engine's hello and after each change; one list at a time is on its way to
an engine, so that many changes cost an idle engine one list when it wakes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtier import link_messages as link
from kvtier.control.command_desk import EngineBusyError

if TYPE_CHECKING:
    from kvtier.control.command_desk import CommandDesk
    from kvtier.control.override_book import OverrideBook


@dataclass(slots=True, eq=False)
class _Reader:
    """An engine: the version of the list that it has, and the one on its way (`sent_id` 0: none)."""

    has: int = 0
    sent: int = 0
    sent_id: int = 0
    waiting: list[tuple[int, asyncio.Future[bool]]] = field(default_factory=list)

    def settle(self) -> None:
        """Tell those who wait for what the engine has now."""
        for version, future in self.waiting:
            if self.has >= version and not future.done():
                future.set_result(True)
        self.waiting = [entry for entry in self.waiting if not entry[1].done()]


class OverrideSync:
    """See the module's docstring."""

    def __init__(self, book: OverrideBook, desk: CommandDesk) -> None:
        self._book = book
        self._desk = desk
        self._readers: dict[str, _Reader] = {}

    def engine_came(self, engine_id: str) -> None:
        """An engine has said hello: what was sent before may be lost."""
        reader = self._readers.setdefault(engine_id, _Reader())
        reader.has = 0
        self._send(engine_id, reader)

    def engine_went(self, engine_id: str) -> None:
        """An engine is gone."""
        if (reader := self._readers.pop(engine_id, None)) is not None:
            for _, future in reader.waiting:
                if not future.done():
                    future.set_result(False)

    def answered(self, engine_id: str, command_id: int, outcome: link.Outcome) -> None:
        """An engine has answered to a list; what it says of any but the last one sent is no news."""
        reader = self._readers.get(engine_id)
        if reader is None or reader.sent_id != command_id:
            return
        reader.sent_id = 0
        if outcome == "accepted":
            reader.has = reader.sent
            reader.settle()
            if reader.has < self._book.version:
                self._send(engine_id, reader)

    def send_what_is_new(self) -> None:
        """Send the list to those who have an older one, and to whom none is on its way."""
        for engine_id, reader in self._readers.items():
            if not reader.sent_id and reader.has < self._book.version:
                self._send(engine_id, reader)

    async def spread(self, left_s: float | None) -> int:
        """Bring the list as it is now to the engines; return how many have it in time.

        Args:
            left_s: Time until the caller's own deadline; None: it has none.
        """
        version = self._book.version
        self.send_what_is_new()
        waits = [self._wait(e, r, version, left_s) for e, r in self._readers.items()]
        return sum(await asyncio.gather(*waits))

    async def _wait(
        self, engine_id: str, reader: _Reader, version: int, left_s: float | None
    ) -> bool:
        if reader.has >= version:
            return True
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        reader.waiting.append((version, future))
        patience_s = self._desk.patience_s(engine_id)
        if left_s is not None:
            patience_s = min(patience_s, left_s)
        try:
            async with asyncio.timeout(patience_s):
                return await future
        except TimeoutError:
            return False
        finally:
            reader.waiting = [entry for entry in reader.waiting if entry[1] is not future]

    def _send(self, engine_id: str, reader: _Reader) -> None:
        command = link.OverridesCommand(id=0, overrides=self._book.all())
        try:
            sent = self._desk.post(engine_id, command)
        except EngineBusyError:
            # It has hundreds of commands to answer first; the server tries again.
            sent = None
        reader.sent = self._book.version
        reader.sent_id = 0 if sent is None else sent.command.id
