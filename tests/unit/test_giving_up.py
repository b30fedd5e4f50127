"""An internal fault: kvtier gives everything back, whatever failed, but for blocks that copies still write to."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from kvtier.orders import Calibration
from tests.unit.mini_engine import MiniEngine, Report
from tests.unit.prefetch_cases import ask, in_pieces, loads, paused, step_until_copying
from tests.unit.program_cases import prompt, turn
from tests.unit.test_scheduler_half_model import SchedulerHalfMachine
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from kvtier.orders import OrderResult


class FaultError(Exception):
    """What the tests let fail."""


def fault(*_: Any, **__: Any) -> None:
    raise FaultError


def break_part(monkeypatch: pytest.MonkeyPatch, engine: MiniEngine, part: str) -> None:
    """Let a method fail, by its path from the scheduler half."""
    *path, method = part.split(".")
    owner: object = engine.half
    for name in path:
        owner = getattr(owner, name)
    monkeypatch.setattr(owner, method, fault)


def copying(engine: MiniEngine, n_pieces: int = 2) -> list[OrderResult]:
    """A prefetch in so many pieces; the results that the workers report when these are copied."""
    in_pieces(engine, n_pieces)
    paused(engine)
    engine.workers.delay = 2
    ask(engine)
    step_until_copying(engine, n_pieces)
    results: list[OrderResult] = []
    while not results:
        results, _ = engine.workers.collect()
    return results


def give_up(engine: MiniEngine) -> bool:
    """As the connector does."""
    engine.half.reader.take_orders()
    return engine.half.shutdown(engine_goes_on=True)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("where", ["policy.observe_copy", "_steps.ended", "policy.seed_from"])
def test_results_of_the_report_in_which_it_fails_count(
    monkeypatch: pytest.MonkeyPatch, where: str, ranks: int
) -> None:
    """These copies have ended, and nobody reports them again."""
    engine = MiniEngine(ranks=ranks)
    results = copying(engine)
    assert len(results) == 2 * ranks
    break_part(monkeypatch, engine, where)
    calibration = Calibration(store=(1e-4, ()), load=(1e-4, ()), profile_path="", prefill=())
    report = Report(
        results, calibration if where == "policy.seed_from" else None, engine.half._steps._last_id
    )
    with pytest.raises(FaultError):
        engine.half.on_worker(report)
    assert not give_up(engine), "no copy writes to a block any more"
    assert engine.pool.references == {}


def test_other_ranks_that_still_write_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MiniEngine(ranks=2)
    first, second = copying(engine, 1)
    break_part(monkeypatch, engine, "_steps.ended")
    with pytest.raises(FaultError):
        engine.half.on_worker(Report([first], step_id=engine.half._steps._last_id))
    assert give_up(engine)
    assert set(engine.pool.references) == set(loads(engine)[0].block_ids)
    assert not engine.half.late_results([second])
    assert engine.pool.references == {}


@pytest.mark.parametrize("where", ["pool.cache", "prefetcher._pinning.grow"])
def test_a_fault_while_a_piece_is_taken_in(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    engine = MiniEngine()
    results = copying(engine)
    half = engine.half
    break_part(monkeypatch, engine, where)
    with pytest.raises(FaultError):
        half.on_worker(Report(results))
    assert not give_up(engine)
    assert engine.pool.references == {}


@pytest.mark.parametrize("part", ["stager.cancel_all", "prefetcher.stop_all", "tier.close"])
def test_what_cannot_be_ended_keeps_nothing_else_from_ending(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    engine = MiniEngine()
    engine.run(turn("r1", prompt(30)))
    assert engine.pool.references
    break_part(monkeypatch, engine, part)
    give_up(engine)
    assert engine.pool.references == {}
    assert isinstance(engine.tier, VirtualTier)
    assert engine.tier.closed is (part != "tier.close")


class GivingUpMachine(SchedulerHalfMachine):
    """Gives up after any course of events: what requests and copies hold is held, and nothing else."""

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine, half = self.engine, self.engine.half
        entries = [*engine.waiting, *engine.running, *engine.loading.values()]
        requests = Counter(block for entry in entries for block in entry.blocks)
        writing = give_up(engine)
        pieces = list(half.prefetcher._pieces.in_flight())
        written = Counter(block for piece in pieces for block in piece.block_ids.tolist())
        assert writing is bool(pieces)
        assert engine.pool.references == requests + written
        for _ in range(1 + max((delay for delay, _ in engine.workers._running), default=0)):
            results, _ = engine.workers.collect()
            half.late_results(results)
        assert engine.pool.references == requests


TestGivingUpMachine = GivingUpMachine.TestCase
TestGivingUpMachine.settings = settings(
    max_examples=20, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
