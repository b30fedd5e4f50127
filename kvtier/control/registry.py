"""The control server's picture of the host: engines, their figures and their programs.

It is kept from the messages of `kvtier.link_messages` alone: reads never reach an engine. Pure:
no socket, no clock, and nothing of it grows beyond its limits, whatever comes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from kvtier import link_messages as link
from kvtier.control.decision_history import DecisionHistory, release_of
from kvtier.control.program_picture import ProgramPicture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtier.link_messages import ProgramKey

MAX_ENGINES: Final = 256
MAX_PROGRAMS: Final = 65_536
"""Of one engine. An engine bounds its own programs (`max_programs`, 10,000 by default)."""


NATURAL_ENDS: Final = frozenset({"handoff", "superseded"})
"""Causes of pins' ends of which the decision on the return or the next pause tells; see `ReleaseCause`."""


class RegistryFullError(Exception):
    """There is no room for another engine."""


@dataclass(slots=True, eq=False)
class EngineRecord:
    """One engine; times are Unix seconds.

    Attributes:
        hello: What does not change about it.
        policy: Its settings that may change, as it told last.
        gauges: Its figures, None before the first report.
        gauges_s: When it reported them.
        seen_s: When anything came from it last.
        programs: What it knows, in the order of their last turns' starts and ends.
        lost_events: Events that it could not report.
        untold: Programs that it has not named since it began to tell all that it knows.
    """

    hello: link.EngineHello
    policy: link.PolicyState
    seen_s: float
    gauges: link.Gauges | None = None
    gauges_s: float = 0.0
    programs: OrderedDict[ProgramKey, ProgramPicture] = field(default_factory=OrderedDict)
    lost_events: int = 0
    untold: set[ProgramKey] = field(default_factory=set)

    @property
    def engine_id(self) -> str:
        """Its name."""
        return self.hello.engine_id

    @property
    def seems_idle(self) -> bool:
        """Whether it ran nothing when it reported last."""
        return self.gauges is None or not (
            self.gauges.running_requests or self.gauges.waiting_requests
        )


class Registry:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        max_engines: int = MAX_ENGINES,
        max_programs: int = MAX_PROGRAMS,
        history: DecisionHistory | None = None,
    ) -> None:
        self._max_engines = max_engines
        self._max_programs = max_programs
        self._engines: dict[str, EngineRecord] = {}
        self.tier_server_runs = True
        """Whether the host's LMCache server runs, as far as is known: without it no CPU tier works."""
        self.history = DecisionHistory() if history is None else history

    # -- what is known -------------------------------------------------------------------------------

    def engines(self) -> list[EngineRecord]:
        """All engines, in the order of their ids."""
        known = self._engines.copy()
        return [known[engine_id] for engine_id in sorted(known)]

    def engine(self, engine_id: str) -> EngineRecord | None:
        """One engine."""
        return self._engines.get(engine_id)

    def __len__(self) -> int:
        """Return the number of engines."""
        return len(self._engines)

    def program_count(self) -> int:
        """Programs of all engines; one that two engines know counts twice. May be read from any thread."""
        return sum(len(engine.programs) for engine in self._engines.copy().values())

    def find(self, tenant: str | None, name: str) -> list[tuple[EngineRecord, ProgramPicture]]:
        """A program in each engine that knows it."""
        keys = [link.ProgramKey(tenant, name, named) for named in (True, False)]
        return [
            (engine, engine.programs[key])
            for engine in self.engines()
            for key in keys
            if key in engine.programs
        ]

    def programs(self) -> Iterator[tuple[EngineRecord, ProgramPicture]]:
        """All programs of all engines."""
        for engine in self.engines():
            for program in engine.programs.values():
                yield engine, program

    # -- what comes ----------------------------------------------------------------------------------

    def hello(self, hello: link.EngineHello, now_s: float) -> bool:
        """An engine has said who it is. True if it is another process than before.

        Raises:
            RegistryFullError: There are too many engines; nothing has changed.
        """
        known = self._engines.get(hello.engine_id)
        if known is not None and _process(known.hello) == _process(hello):
            known.hello, known.policy, known.seen_s = hello, hello.policy, now_s
            return False
        if known is None and len(self._engines) >= self._max_engines:
            raise RegistryFullError(f"{self._max_engines} engines have registered")
        self._engines[hello.engine_id] = EngineRecord(hello, hello.policy, now_s)
        return True

    def programs_page(self, page: link.Programs, now_s: float) -> None:
        """An engine tells all that it knows; with the last page it has replaced what was known before."""
        engine = self._engines.get(page.engine_id)
        if engine is None:
            return
        engine.seen_s = now_s
        if page.first:
            engine.untold = set(engine.programs)
        for state in page.programs:
            engine.untold.discard(state.program)
            self._put(engine, ProgramPicture.from_state(state))
        if page.last:
            for key in engine.untold:
                engine.programs.pop(key, None)
            engine.untold = set()

    def report(self, report: link.Report, now_s: float) -> None:
        """An engine tells what has happened."""
        engine = self._engines.get(report.engine_id)
        if engine is None:
            return
        engine.seen_s = now_s
        engine.gauges, engine.gauges_s = report.gauges, report.sent_s
        if not self.tier_server_runs:
            _lose_tier(engine)
        engine.lost_events += report.lost
        for event in report.events:
            self._apply(engine, event)

    def tier_lost(self) -> list[EngineRecord]:
        """The LMCache server has gone: no engine has a CPU tier until it reports one; returns who had."""
        return [engine for engine in self.engines() if _lose_tier(engine)]

    def policy(self, engine_id: str, policy: link.PolicyState) -> None:
        """An engine's settings have changed."""
        engine = self._engines.get(engine_id)
        if engine is None:
            return
        engine.policy = policy
        if engine.gauges is not None:
            # Its next report may be a while away.
            engine.gauges = msgspec.structs.replace(engine.gauges, mode=policy.mode)

    def gone(self, engine_id: str) -> EngineRecord | None:
        """Forget an engine with its programs; return what was known of it."""
        return self._engines.pop(engine_id, None)

    def _apply(self, engine: EngineRecord, event: link.Event) -> None:
        if isinstance(event, link.Decided):
            self.history.add(engine.engine_id, event)
            return
        if isinstance(event, link.PinEnded) and event.cause not in NATURAL_ENDS:
            self.history.add(engine.engine_id, release_of(event))
        if isinstance(event, link.ProgramGone):
            engine.programs.pop(event.program, None)
            return
        program = engine.programs.get(event.program)
        if program is None:
            # Only a turn makes a program known: the end of a pin, say, may follow the program's.
            if not isinstance(event, link.TurnStarted):
                return
            program = ProgramPicture(event.program, event.at_s, event.at_s)
        program.apply(event)
        if isinstance(event, link.TurnStarted | link.TurnEnded):
            engine.untold.discard(event.program)
            self._put(engine, program)

    def _put(self, engine: EngineRecord, program: ProgramPicture) -> None:
        """Make a program the last one in its engine's order."""
        engine.programs[program.key] = program
        engine.programs.move_to_end(program.key)
        if len(engine.programs) > self._max_programs:
            engine.programs.popitem(last=False)


def _lose_tier(engine: EngineRecord) -> bool:
    """Take an engine's CPU tier for lost; False if it had none that worked, or another one than the host's."""
    if not engine.hello.on_hosts_tier:
        return False
    if engine.gauges is None or engine.gauges.tier_state != "ready":
        return False
    engine.gauges = msgspec.structs.replace(engine.gauges, tier_state="lost")
    return True


def _process(hello: link.EngineHello) -> tuple[int, float]:
    return hello.pid, hello.pid_start_s
