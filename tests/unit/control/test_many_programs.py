"""What long-lived processes keep of programs that have come and gone: nothing but fixed windows."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from kvtier import link_messages as link
from kvtier.control import link_server, wakers
from kvtier.control.decision_history import DecisionHistory
from kvtier.control.link_server import LinkServer
from kvtier.control.registry import Registry
from kvtier.frontend.clients import Repeats
from kvtier.identity.program_arrivals import ProgramArrivals
from kvtier.programs import ProgramLimits
from tests.model.census import census
from tests.model.wire import scripted_link
from tests.unit.control.control_host import GAUGES, hello, program
from tests.unit.mini_engine import MiniEngine
from tests.unit.program_cases import follow_up, prompt, turn

if TYPE_CHECKING:
    from collections import Counter
    from pathlib import Path

    import pytest

    from kvtier.control.link import EngineLink

NOW_S = 1_700_000_000.0
HISTORY = ".history._entries"


def life_of(name: str) -> list[link.Event]:
    """A program of one turn, as its engine tells it."""
    common: dict[str, Any] = {"at_s": NOW_S, "program": program(name), "request_id": f"{name}-1"}
    return [
        link.TurnStarted(**common, turn=1, prompt_tokens=10),
        link.TurnRunning(**common, gpu_tokens=1, cpu_tokens=2, recomputed_tokens=3),
        link.Decided(**common, event="pause", action="pin", reason="return_expected"),
        link.TurnEnded(**common, context_tokens=40, output_tokens=5, tool="bash"),
        link.Pinned(**common, tokens=30, deadline_s=NOW_S + 5),
        link.Staged(at_s=NOW_S, program=program(name), tokens=32),
        link.PinEnded(**common, cause="ttl", tokens=30),
        link.ProgramGone(at_s=NOW_S, program=program(name)),
    ]


def told(registry: Registry, events: list[link.Event]) -> None:
    registry.report(
        link.Report(engine_id="engine-0", sent_s=NOW_S, events=events, gauges=GAUGES), NOW_S
    )


def test_the_control_server_forgets_programs_that_are_gone() -> None:
    registry = Registry(history=DecisionHistory(max_bytes=1 << 20))
    registry.hello(hello(), NOW_S)
    before = census(registry)
    for first in range(0, 10_000, 1000):
        told(registry, [e for n in range(first, first + 1000) for e in life_of(f"agent-{n}")])
    assert registry.program_count() == 0
    more = {path: n for path, n in (census(registry) - before).items() if HISTORY not in path}
    assert more == {}
    # The history is full: as many programs as its bytes have room for.
    assert registry.history.kept_bytes <= (1 << 20)
    assert registry.history.kept_bytes > (1 << 20) * 0.99
    assert registry.history.last(None, "agent-9999", 1)


def test_programs_whose_end_is_never_told_make_room_for_others() -> None:
    registry = Registry(max_programs=500)
    registry.hello(hello(), NOW_S)
    for n in range(5000):
        told(registry, life_of(f"agent-{n}")[:-1])
    assert registry.program_count() == 500
    assert registry.find(None, "agent-4999")


def test_strangers_and_engines_of_another_version_are_remembered_within_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_server, "MAX_STRANGERS", 50)
    monkeypatch.setattr(wakers, "MAX_WAKERS", 20)

    class Follower:
        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    async def scene() -> None:
        server = LinkServer(tmp_path / "link", Registry(), Follower(), clock=lambda: NOW_S)
        try:
            for n in range(2 * link_server.MAX_STRANGERS):
                page = link.Programs(engine_id=f"engine-{n}", programs=[], first=True)
                server.received(f"stranger-{n}".encode(), [link.encoder.encode(page)])
                other = hello(f"other-{n}", link=link.LINK_VERSION + 1)
                server.received(f"other-{n}".encode(), [link.encoder.encode(other)])
                waker = link.WakerHello(link=link.LINK_VERSION, pid=os.getpid(), parent_pid=n)
                server.received(f"waker-{n}".encode(), [link.encoder.encode(waker)])
            assert len(server._strangers) == link_server.MAX_STRANGERS
            assert len(server.incompatible()) == link_server.MAX_STRANGERS
            assert len(server.wakers) == wakers.MAX_WAKERS
            server.received(b"engine", [link.encoder.encode(hello())])
            assert b"engine" not in server._strangers, "there is room for a real one"
        finally:
            server.close()

    asyncio.run(scene())


def test_names_of_programs_are_remembered_within_limits() -> None:
    repeats, arrivals = Repeats(), ProgramArrivals()
    for n in range(100_000):
        assert not repeats.again(f"agent-{n}")
        assert arrivals.first_arrival_s(f"agent-{n}", float(n)) == n
    assert (len(repeats._seen), len(arrivals)) == (10_000, 10_000)


def _turns(engine: MiniEngine, first: int, end: int) -> Counter[str]:
    """Programs of two turns; most never say that they end. What the scheduler half remembers then."""
    for n in range(first, end):
        begin = turn(f"r{n}-1", prompt(13, n), session=f"agent-{n}", hints={"ttl_s": 60.0})
        engine.run(begin)
        hints = {"end": True} if n % 3 == 0 else {"tool": f"tool-{n % 7}"}
        engine.run(follow_up(begin, f"r{n}-2", session=f"agent-{n}", hints=hints))
        engine.now_s += 10.0
    return census(engine.half)


def _engine(link: EngineLink | None = None) -> MiniEngine:
    return MiniEngine(limits=ProgramLimits(max_programs=20), link=link)


def _grown(early: Counter[str], late: Counter[str]) -> dict[str, int]:
    return {p: n for p, n in (late - early).items() if n > 2 and not p.startswith(_WINDOWS)}


_WINDOWS = (
    ".admission._forecast._ended_turns",
    ".policy.ttl._gaps",
    ".policy.ttl._reuse",
    ".stats.",
)
"""Measurements, which go on to their own limits, and counters."""


def test_an_engine_keeps_nothing_of_programs_that_others_have_displaced() -> None:
    engine = _engine()
    early = _turns(engine, 0, 60)
    assert _grown(early, _turns(engine, 60, 240)) == {}


def test_an_engine_whose_control_server_is_away_keeps_no_events() -> None:
    half: list[Any] = []
    control, wire = scripted_link(lambda: half[0], lambda: engine.now_s, lambda: NOW_S)
    engine = _engine(control)
    half.append(engine.half)
    wire.is_up = False
    early = _turns(engine, 0, 60) + census(control)
    late = _turns(engine, 60, 240) + census(control)
    assert _grown(early, late) == {}
