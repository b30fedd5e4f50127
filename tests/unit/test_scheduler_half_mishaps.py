"""The scheduler half in a small engine: everything that can cut a program's life short."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from kvtier.policy_facts import PolicyConfig
from kvtier.turns.decision_log import DecisionLog
from tests.unit.mini_engine import MiniEngine
from tests.unit.program_cases import (
    assert_nothing_held,
    evict,
    expire,
    failures,
    follow_up,
    prompt,
    sources,
    total,
    turn,
)
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.fake_vllm import FakeRequest


@pytest.fixture
def engine() -> MiniEngine:
    return MiniEngine()


@pytest.fixture
def tier(engine: MiniEngine) -> VirtualTier:
    assert isinstance(engine.tier, VirtualTier)
    return engine.tier


def staged_program(engine: MiniEngine) -> FakeRequest:
    """A program whose KV is in the tier alone."""
    first = turn("r1", prompt(30))
    engine.run(first)
    expire(engine)
    evict(engine)
    sources(engine)
    return first


def test_a_failed_load_is_recomputed_and_not_tried_again(engine: MiniEngine) -> None:
    first = staged_program(engine)
    engine.workers.ok = lambda order: order.direction != "load"
    engine.run(follow_up(first, "r2"))
    assert len([o for o in engine.workers.orders if o.direction == "load"]) == 1
    assert failures(engine) == {"load_copy": 1}
    assert "reload_prediction_ratio" not in engine.stats.take()["samples"]
    assert_nothing_held(engine)


def test_a_load_of_something_else_is_computed_and_staged_anew(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    """What the tier holds is wrong, so it must not be found, nor spare its store, any more."""
    first = staged_program(engine)
    n_staged = tier.table.counts()["chunks"]
    engine.workers.ok, engine.workers.spoils = lambda order: order.direction != "load", True
    engine.add(follow_up(first, "r2"))
    while not failures(engine):
        engine.step()
    # Its first chunk has gone, and with it the others.
    assert (tier.table.counts()["chunks"], tier.table.counts()["programs"]) == (0, 0)
    assert len(engine.half.stager.copies) == 0, "no pin is given up for what is not there"
    engine.run()
    assert failures(engine) == {"load_integrity": 1}
    assert tier.table.counts()["chunks"] > n_staged
    engine.workers.ok = lambda _: True
    expire(engine)
    evict(engine)
    sources(engine)
    engine.run(follow_up(first, "r3"))
    assert sources(engine)["cpu"] > 0
    assert tier.leaks() == {}
    assert_nothing_held(engine)


def test_a_failed_load_behind_a_cached_prefix(engine: MiniEngine) -> None:
    first = staged_program(engine)
    engine.run(turn("o", prompt(13), session="other", max_tokens=2))
    engine.workers.ok = lambda order: order.direction != "load"
    engine.run(follow_up(first, "r2"))
    assert failures(engine) == {"load_copy": 1}
    assert_nothing_held(engine)


@pytest.mark.parametrize("moment", ["lookup", "answered", "loading", "running"])
def test_aborted_at_any_moment(engine: MiniEngine, tier: VirtualTier, moment: str) -> None:
    first = staged_program(engine)
    tier.answer_after = 2
    engine.workers.delay = 3
    engine.add(follow_up(first, "r2", max_tokens=20))
    steps = {"lookup": 1, "answered": 2, "loading": 4, "running": 12}[moment]
    for _ in range(steps):
        engine.step()
    if moment == "answered":
        engine.half.answers.poll(engine.now_s)
        engine.half.answers.poll(engine.now_s)
        assert engine.half.reader.hit_chunks("r2") == 4
    elif moment == "loading":
        assert "r2" in engine.loading
    elif moment == "running":
        assert engine.running
    engine.abort("r2")
    tier.answer_after = 0
    engine.run()
    engine.step()
    engine.step()
    assert len(engine.workers.cancelled) == (moment == "loading")
    assert tier.leaks() == {}
    assert engine.half.reader.n_loads == 0
    assert_nothing_held(engine)


def test_an_idle_engine_takes_the_answer_that_an_aborted_request_has_asked_for(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    first = staged_program(engine)
    tier.answer_after = 5
    engine.add(follow_up(first, "r2"))
    engine.step()
    engine.abort("r2")
    engine.run()
    assert tier.leaks() == {}, "chunks are locked until somebody gives them back"


def test_a_load_is_given_up_when_its_program_vanishes(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    first = staged_program(engine)
    engine.workers.delay = 1000
    engine.add(follow_up(first, "r2"))
    while "r2" not in engine.loading:
        engine.step()
    (load,) = (o for o in engine.workers.orders if o.direction == "load")
    engine.abort("r2")
    engine.workers.delay = 0
    engine.run(max_steps=5)
    assert engine.workers.cancelled == [load.order_id]
    assert failures(engine) == {}, "nobody misses it"
    assert tier.leaks() == {}
    assert_nothing_held(engine)


def test_the_decision_log_says_what_a_load_took_and_what_was_predicted(
    engine: MiniEngine, tmp_path: Path
) -> None:
    first = staged_program(engine)
    log = DecisionLog(tmp_path / "log.jsonl")
    engine.half.answers._log = log
    engine.run(follow_up(first, "r2"))
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["event"], entry["request_id"], entry["ok"]) == ("loaded", "r2", True)
    assert entry["tokens"] > 0
    assert entry["predicted_s"] > 0
    assert entry["seconds"] == pytest.approx(1e-4)


def test_an_aborted_failed_load_is_no_measurement(engine: MiniEngine) -> None:
    first = staged_program(engine)
    engine.workers.delay = 2
    engine.workers.ok = lambda order: order.direction != "load"
    engine.add(follow_up(first, "r2"))
    while "r2" not in engine.loading:
        engine.step()
    engine.stats.take()
    engine.abort("r2")
    engine.run()
    assert "reload_prediction_ratio" not in engine.stats.take().get("samples", {})


def test_who_does_not_load_does_not_lock() -> None:
    engine = MiniEngine(config=PolicyConfig(reload="never"))
    engine.add(follow_up(staged_program(engine), "r2", max_tokens=8))
    while not engine.running:
        engine.step()
    assert isinstance(engine.tier, VirtualTier)
    assert engine.tier.leaks() == {}
    engine.run()
    assert sources(engine) == {"recomputed": 44}


def test_a_retry_after_an_abort_finds_its_program(engine: MiniEngine) -> None:
    first = turn("r1", prompt(30))
    engine.run(first)
    engine.add(follow_up(first, "r2"))
    engine.abort("r2")
    assert "r1" in engine.half.pins, "nothing has taken the pin over"
    engine.run(follow_up(first, "r3"))
    assert sources(engine)["gpu_pin"] == 32


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("moment", ["staging", "lookup", "loading", "paused"])
def test_the_tier_is_lost_and_comes_back(
    engine: MiniEngine, tier: VirtualTier, moment: str, *, restarted: bool
) -> None:
    engine.workers.delay = 3
    first = turn("r1", prompt(30))
    if moment == "staging":
        engine.add(first)
        while "r1" not in engine.told:
            engine.step()
        engine.step()
    else:
        first = staged_program(engine)
    second = follow_up(first, "r2")
    if moment in {"lookup", "loading"}:
        tier.answer_after = 2
        engine.add(second)
        engine.step()
        while moment == "loading" and "r2" not in engine.loading:
            engine.step()
    tier.lose()
    engine.step()
    assert total(engine, "failures|tier_lost") == 1
    if moment not in {"lookup", "loading"}:
        engine.add(second)
    engine.run()
    assert engine.told["r2"]["pinned_blocks"] > 0
    tier.answer_after = 0
    tier.come_back(restarted=restarted)
    engine.run(follow_up(second, "r3"))
    assert engine.told["r3"]["staging"]
    expire(engine)
    evict(engine)
    sources(engine)
    engine.run(follow_up(second, "r4"))
    assert sources(engine)["cpu"] >= 32
    assert_nothing_held(engine)


@pytest.mark.parametrize("restarted", [False, True])
def test_an_answer_from_before_the_loss_is_not_used(
    engine: MiniEngine, tier: VirtualTier, *, restarted: bool
) -> None:
    """Its chunks are not locked any more: other KV may be in their slots by now."""
    first = staged_program(engine)
    tier.answer_after = 1
    engine.add(follow_up(first, "r2"))
    engine.step()
    engine.half.answers.poll(engine.now_s)
    assert engine.half.reader.hit_chunks("r2") == 4
    tier.lose()
    tier.come_back(restarted=restarted)
    engine.half.answers.poll(engine.now_s)
    engine.run()
    assert [
        o for o in engine.workers.orders if o.request_id == "r2" and o.direction == "load"
    ] == []
    assert_nothing_held(engine)


def test_new_weights_never_read_old_kv(engine: MiniEngine, tier: VirtualTier) -> None:
    first = turn("r1", prompt(30))
    engine.run(first)
    assert engine.pool.references
    assert engine.update_weights(), "the reset is not refused for pins"
    assert total(engine, "pin_releases|reset") == 1
    sources(engine)
    second = follow_up(first, "r2")
    engine.run(second)
    assert sources(engine) == {"recomputed": 44}
    expire(engine)
    evict(engine)
    engine.run(follow_up(second, "r3"))
    assert sources(engine)["cpu"] == 40, "the new weights' KV is staged and read"
    assert_nothing_held(engine)


def test_two_engines_updates_are_not_the_same_weights() -> None:
    """Each has been updated once; what one stages from then on the other must not find."""
    one, other = MiniEngine(), MiniEngine()
    assert one.half.stager.copies.namespace == other.half.stager.copies.namespace
    for engine in (one, other):
        assert engine.update_weights()
        assert engine.half.reader.namespace == engine.half.stager.copies.namespace
    assert one.half.stager.copies.namespace != other.half.stager.copies.namespace


def test_a_reset_gives_up_what_is_being_staged(engine: MiniEngine, tier: VirtualTier) -> None:
    """Its blocks are anybody's now: what the copy reads is not to be believed."""
    engine.workers.delay = 4
    engine.add(turn("r1", prompt(30)))
    while not engine.workers.orders:
        engine.step()
    assert engine.reset_prefix_cache()
    evict(engine)
    engine.run()
    assert engine.workers.idle
    assert tier.table.counts()["chunks"] == 0
    assert_nothing_held(engine)


def test_new_weights_while_a_commit_is_out(engine: MiniEngine, tier: VirtualTier) -> None:
    engine.add(turn("r1", prompt(30)))
    while not engine.half.stager._by_commit:
        engine.step()
    assert engine.update_weights()
    engine.run()
    assert engine.half.stager.copies._staged == {}, "the late answer is about the old weights' KV"
    assert tier.leaks() == {}


def test_pins_yield_to_requests_that_need_memory() -> None:
    engine = MiniEngine(n_blocks=20)
    engine.run(turn("r1", prompt(30)))
    assert engine.half.pins.pinned_blocks == 8
    engine.run(turn("big", prompt(70, 200), session="other", max_tokens=2))
    assert total(engine, "pin_releases|pressure") == 1
    assert_nothing_held(engine)


def test_a_running_request_is_not_preempted_for_pins() -> None:
    engine = MiniEngine(n_blocks=20)
    engine.run(turn("r1", prompt(30)))
    engine.run(turn("long", prompt(30, 200), session="other", max_tokens=40))
    assert total(engine, "pin_releases|pressure") == 1
    assert engine.told["long"] is not None
    assert_nothing_held(engine)


def test_a_preempted_request_reads_what_was_staged(engine: MiniEngine) -> None:
    first = staged_program(engine)
    second = engine.add(follow_up(first, "r2", max_tokens=12))
    while not engine.running:
        engine.step()
    engine._preempt(engine.running[0])
    evict(engine)
    engine.run()
    assert len([o for o in engine.workers.orders if o.direction == "load"]) == 2
    assert len(second.output_token_ids) == 12
    assert sources(engine) == {"cpu": 32, "recomputed": 12}, "prompt tokens are counted once"
    assert_nothing_held(engine)


def test_shutdown_gives_everything_back(engine: MiniEngine, tier: VirtualTier) -> None:
    engine.workers.delay = 5
    engine.add(turn("r1", prompt(30)))
    while "r1" not in engine.told:
        engine.step()
    engine.step()
    assert engine.pool.references
    engine.half.shutdown()
    assert engine.pool.references == {}
    assert tier.closed


def test_what_is_remembered_does_not_grow_with_requests(engine: MiniEngine) -> None:
    """Requests that come and go, finished or not, leave nothing in the scheduler's process."""

    def remembered() -> dict[str, int]:
        half = engine.half
        return {
            "turns": len(half._turns),
            "waiting": len(half._waiting_tokens),
            "chains": len(half.returns._chains),
            "staged": len(half.stager.copies._staged),
            "reads": len(half.reader._reads),
            "ops": len(half.reader._by_op),
            "futile": len(half.room._futile),
            "jobs": len(half.stager._jobs),
            "programs": len(half.programs),
            "admission": half.admission.waiting,
        }

    for i in range(6):
        engine.run(turn(f"e{i}", prompt(30, 100 * i), session=f"s{i}", hints={"end": True}))
        engine.add(turn(f"a{i}", prompt(30, 100 * i), session=None))
        engine.step()
        engine.abort(f"a{i}")
        engine.add(turn(f"w{i}", prompt(30, 100 * i + 7), session=None))
        engine.abort(f"w{i}")
        engine.run()
        engine.now_s += 4000.0
        engine.step()
    assert not any(remembered().values()), remembered()
