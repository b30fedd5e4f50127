"""What `kvtier top` shows, and the collecting of it: status, programs by state, last decisions."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvtier.client import Decision, KVTierClient, Program, Status, Watch

STATES: Final = ("running", "waiting", "paused")
SHOWN_PROGRAMS: Final = 20
SHOWN_DECISIONS: Final = 12
_EXPLAINED_PROGRAMS: Final = 6
_RECONNECT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision and its program's name."""

    name: str
    decision: Decision


@dataclass(frozen=True, slots=True)
class View:
    """One frame's content.

    Attributes:
        counts: Programs by state.
        programs: The most recently active ones.
        decisions: Newest first.
        lost_events: That the watch has missed.
        taken_at: When it was collected.
        trouble: Why the figures are old; empty: they are not.
    """

    where: str
    status: Status
    counts: Mapping[str, int]
    programs: Sequence[Program]
    decisions: Sequence[Decided]
    lost_events: int
    taken_at: datetime
    trouble: str = ""


def collect(client: KVTierClient, decisions: Decisions) -> View:
    """Ask the server for a view. Raises `ControlError`."""
    status = client.get_status()
    counts = dict.fromkeys(STATES, 0)
    programs: tuple[Program, ...] = ()
    # Without an engine the server has no programs to speak of.
    if status.engines:
        for state in STATES:
            counts[state] = client.list_programs(states=[state], page_size=1).total_size
        programs = client.list_programs(page_size=SHOWN_PROGRAMS).programs
    if not decisions.known:
        decisions.begin(_last_decisions(client, programs))
    return View(
        where=str(client.connection),
        status=status,
        counts=counts,
        programs=programs,
        decisions=decisions.newest(),
        lost_events=decisions.lost_events,
        taken_at=datetime.now(UTC),
    )


def _last_decisions(client: KVTierClient, programs: Sequence[Program]) -> list[Decided]:
    """What was decided before the watch began; programs that have gone meanwhile are left out."""
    from kvtier.client import NotFound  # noqa: PLC0415 - brings grpc

    found = []
    for program in programs[:_EXPLAINED_PROGRAMS]:
        try:
            decisions = client.explain_decision(program.name, tenant=program.tenant, limit=2)
        except NotFound:
            continue
        found += [Decided(program.name, decision) for decision in decisions]
    epoch = datetime.fromtimestamp(0, UTC)
    return sorted(found, key=lambda decided: decided.decision.decided_at or epoch)


@dataclass
class Decisions:
    """The last decisions, followed by a thread once `follow` is called; used once."""

    known: bool = False
    lost_events: int = 0
    _last: deque[Decided] = field(default_factory=lambda: deque(maxlen=SHOWN_DECISIONS))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _watch: Watch | None = None

    def begin(self, earlier: Sequence[Decided]) -> None:
        """Put what was before, oldest first, before what was seen."""
        with self._lock:
            self.known = True
            seen = list(self._last)
            self._last.clear()
            self._last.extend([*(d for d in earlier if d not in seen), *seen])

    def newest(self) -> list[Decided]:
        """Return them, newest first."""
        with self._lock:
            return list(reversed(self._last))

    @contextmanager
    def followed(self, client: KVTierClient) -> Iterator[None]:
        """Watch meanwhile; a watch that fails is begun anew after a second."""
        thread = threading.Thread(target=self._follow, args=(client,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._stop.set()
                if self._watch is not None:
                    self._watch.close()
            thread.join()

    def _follow(self, client: KVTierClient) -> None:
        from kvtier.client import ControlError, Event  # noqa: PLC0415 - brings grpc

        while not self._stop.is_set():
            try:
                with self._lock:
                    if self._stop.is_set():
                        return
                    self._watch = client.watch(kinds=["decision"])
                for item in self._watch:
                    if not isinstance(item, Event):
                        self.lost_events += item.events
                    elif item.decision is not None:
                        with self._lock:
                            self._last.append(Decided(item.name, item.decision))
            except (ControlError, ValueError):
                # The frame says what is wrong: its own calls fail too.
                self._stop.wait(_RECONNECT_S)
