"""Prefetch in a small engine: the returning turn finds its KV, nobody pays for it, nothing is left behind.

`MiniEngine` checks what every request computes on, so a block that was hit before its copy had ended, or
that was given away while a copy wrote to it, fails the test.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.gpu_pin import ReleaseCause
from kvtier.policy_facts import PolicyConfig
from kvtier.ttl.overrides import TtlOverride
from kvtier.ttl.tenant_budgets import TenantBudget
from kvtier.turns.live_mode import Mode
from kvtier.turns.prefetch import RETURN_WAIT_S
from kvtier.turns.prefetching import plan as prefetch_plan
from kvtier.turns.returns import LOOKUP_DEADLINE_S
from tests.unit.fake_vllm import BLOCK_TOKENS
from tests.unit.mini_engine import MiniEngine
from tests.unit.prefetch_cases import (
    N_TOKENS,
    ask,
    ends,
    handle,
    in_pieces,
    loads,
    paused,
    pin_of,
    seize,
    step_until_copying,
)
from tests.unit.program_cases import (
    assert_nothing_held,
    failures,
    follow_up,
    prompt,
    sources,
    total,
    turn,
)
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from kvtier.orders import OrderResult


@pytest.fixture
def engine() -> MiniEngine:
    return MiniEngine()


@pytest.fixture
def tier(engine: MiniEngine) -> VirtualTier:
    assert isinstance(engine.tier, VirtualTier)
    return engine.tier


# -- what it is for --------------------------------------------------------------------------------


def test_the_returning_turn_finds_what_was_prefetched(engine: MiniEngine) -> None:
    first = paused(engine)
    assert ask(engine) == ("accepted", "loading")
    assert engine.half.has_work(), "an idle engine must step"
    engine.run()
    assert not engine.half.has_work()
    assert ends(engine) == {"loaded": 1}
    assert total(engine, "prefetched_tokens") == N_TOKENS
    assert total(engine, "loaded_bytes") == 1000
    pin = pin_of(engine)
    assert len(pin.block_ids) * BLOCK_TOKENS == N_TOKENS
    assert engine.half.pins.held_blocks == 0
    engine.run(follow_up(first, "r2"))
    assert sources(engine) == {"gpu_pin": N_TOKENS, "recomputed": 12}
    assert [order.request_id for order in loads(engine)] == [""], "the request has loaded nothing"
    assert total(engine, "pin_releases|handoff") == 1
    assert_nothing_held(engine)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_it_comes_in_pieces(ranks: int, window: int) -> None:
    engine = MiniEngine(ranks=ranks)
    in_pieces(engine, window)
    first = paused(engine)
    engine.workers.delay = 2
    ask(engine)
    most = 0
    while engine.half.has_work():
        engine.step()
        most = max(most, engine.half.prefetcher.n_in_flight)
    assert len(loads(engine)) == 4
    assert most <= 4
    engine.run(follow_up(first, "r2"))
    assert sources(engine)["gpu_pin"] == N_TOKENS
    assert_nothing_held(engine)


def test_no_more_is_ordered_ahead_than_the_link_has_moved_in_a_step(engine: MiniEngine) -> None:
    in_pieces(engine, 1)
    paused(engine)
    ask(engine)
    ordered = []
    while engine.half.has_work():
        before = len(loads(engine))
        engine.step()
        ordered.append(len(loads(engine)) - before)
    assert [n for n in ordered if n] == [1, 2, 1], "the link had run dry, so the window was doubled"


def test_what_gpu_memory_holds_is_not_loaded_again(engine: MiniEngine) -> None:
    """Its first three blocks are there: a chunk and a half. Nobody writes to what others may read."""
    first = paused(engine)
    engine.run(turn("o", prompt(13), session="other", max_tokens=1, hints={"pin": False}))
    sources(engine)
    here = engine.pool.find(first.block_hashes)
    assert len(here) == 3
    assert ask(engine) == ("accepted", "loading")
    assert engine.pool.references == dict.fromkeys(here, 1), "they may not be evicted meanwhile"
    engine.run()
    (order,) = [order for order in loads(engine) if not order.request_id]
    assert order.skip_blocks == 1
    assert order.block_ids[0] == 0, "what is skipped is not named"
    assert not set(here) & set(order.block_ids)
    assert pin_of(engine).block_ids.tolist()[:3] == here
    engine.run(follow_up(first, "r2"))
    assert sources(engine)["gpu_pin"] == N_TOKENS
    assert_nothing_held(engine)


def test_what_somebody_has_computed_meanwhile_is_kept_instead(engine: MiniEngine) -> None:
    first = paused(engine)
    engine.workers.delay = 6
    ask(engine)
    step_until_copying(engine)
    engine.workers.delay = 0
    engine.run(turn("o", prompt(17), session="other", max_tokens=1, hints={"pin": False}))
    theirs = engine.pool.find(first.block_hashes)
    (order,) = [order for order in loads(engine) if not order.request_id]
    assert len(theirs) == 8, "its first blocks, and those that were loaded"
    assert not set(theirs[:4]) & set(order.block_ids)
    assert pin_of(engine).block_ids.tolist() == theirs
    assert set(engine.pool.references) == set(theirs), "the blocks that were loaded twice are free"
    sources(engine)
    engine.run(follow_up(first, "r2"))
    assert sources(engine)["gpu_pin"] == N_TOKENS
    assert_nothing_held(engine)


def test_the_turns_own_pin_goes_on(engine: MiniEngine) -> None:
    """It keeps the turn's head; the prefetch brings the rest, and it lasts no shorter than it was to."""
    first = paused(engine)
    engine.run(turn("o", prompt(9), session="other", max_tokens=1, hints={"pin": False}))
    ask(engine, ttl_s=500.0)
    pin = pin_of(engine)
    engine.half.pins.unpin("r1", ReleaseCause.TTL)
    engine.half.pins.pin(
        "r1",
        pin.program,
        pin.block_ids,
        now_s=engine.now_s,
        ttl_s=500.0,
        data=replace(pin.data, predicted_gap_s=7.0),
    )
    deadline_s = pin_of(engine).deadline_s
    engine.run()
    engine.run()
    assert ask(engine, ttl_s=20.0) == ("accepted", "in_gpu")
    assert pin_of(engine).deadline_s == deadline_s
    assert pin_of(engine).data.predicted_gap_s == 7.0  # type: ignore[attr-defined]
    assert len(pin_of(engine).block_ids) * BLOCK_TOKENS == N_TOKENS
    assert ask(engine, ttl_s=550.0) == ("accepted", "in_gpu")
    assert pin_of(engine).deadline_s == engine.now_s + 550.0
    sources(engine)
    engine.run(follow_up(first, "r2"))
    assert sources(engine)["gpu_pin"] == N_TOKENS
    assert_nothing_held(engine)


def test_pieces_that_end_in_another_order(engine: MiniEngine) -> None:
    in_pieces(engine)
    first = paused(engine)
    engine.workers.delay = 2
    ask(engine)
    step_until_copying(engine, 4)
    engine.workers._running = [
        (5 - i, order) for i, (_, order) in enumerate(engine.workers._running)
    ]
    engine.step()
    engine.step()
    engine.step()
    assert engine.pool.find(first.block_hashes) == [], "nothing counts before what comes before it"
    assert engine.half.pins.pinned_blocks == 0
    engine.run(follow_up(first, "r2"))
    assert pin_of(engine, "r2")
    assert sources(engine)["gpu_pin"] == N_TOKENS
    assert_nothing_held(engine)


def test_an_ordinary_pin_in_all_else(engine: MiniEngine) -> None:
    paused(engine)
    ask(engine, ttl_s=5.0)
    engine.run()
    assert pin_of(engine).deadline_s == pytest.approx(engine.now_s + 5.0, abs=0.1)
    engine.run(turn("big", prompt(39 * 4, 900), session="big", max_tokens=1, hints={"pin": False}))
    assert total(engine, "pin_releases|pressure") == 1
    ask(engine, ttl_s=5.0)
    engine.run()
    before = total(engine, "pin_releases|ttl")
    engine.now_s += 6.0
    engine.step()
    assert total(engine, "pin_releases|ttl") - before == 1
    assert_nothing_held(engine)


def test_the_next_turn_replaces_it(engine: MiniEngine) -> None:
    """A prompt that repeats the conversation but for its end takes the blocks; the pin ends all the same."""
    first = paused(engine)
    ask(engine)
    engine.run()
    second = turn("r2", [*first.prompt_token_ids, *prompt(8, 700)])
    engine.run(second)
    assert sources(engine)["gpu_pin"] == 28
    assert [pin.key for pin in engine.half.pins.pins()] == ["r2"]
    assert_nothing_held(engine)


# -- who is refused --------------------------------------------------------------------------------


def test_there_must_be_something_to_load(engine: MiniEngine, tier: VirtualTier) -> None:
    assert ask(engine) == ("missing", "no_kv")
    paused(engine)
    engine.half.stager.copies.clear()
    assert ask(engine) == ("missing", "no_kv")
    tier.lose()
    assert ask(engine) == ("rejected", "no_tier")
    engine.run()


def test_not_while_a_turn_is_under_way(engine: MiniEngine) -> None:
    first = paused(engine)
    engine.add(follow_up(first, "r2", max_tokens=9))
    assert ask(engine) == ("rejected", "running")
    engine.run()


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.SHADOW])
def test_not_unless_kvtier_is_on(engine: MiniEngine, mode: Mode) -> None:
    paused(engine)
    engine.half.live_mode.mode = mode
    assert ask(engine) == ("rejected", "mode")


def test_asked_twice_it_begins_once(engine: MiniEngine) -> None:
    paused(engine)
    assert ask(engine) == ("accepted", "loading")
    assert ask(engine) == ("accepted", "under_way")
    engine.run()
    assert ask(engine) == ("accepted", "in_gpu")
    assert len(loads(engine)) == 1


def test_asked_again_before_the_first_has_ended(engine: MiniEngine) -> None:
    """Its program has come back for a moment only. One pin never keeps a block twice."""
    in_pieces(engine, 2)
    first = paused(engine)
    engine.workers.delay = 4
    ask(engine)
    step_until_copying(engine, 2)
    engine.add(follow_up(first, "r2"))
    engine.abort("r2")
    assert ask(engine) == ("rejected", "busy")
    engine.run()
    assert engine.half.pins.pinned_blocks == 4
    assert ask(engine) == ("accepted", "loading")
    engine.run()
    assert engine.half.pins.pinned_blocks == len(pin_of(engine).block_ids) == 8
    engine.run(follow_up(first, "r3"))
    assert sources(engine)["gpu_pin"] == N_TOKENS
    assert_nothing_held(engine)


def test_only_so_many_at_a_time(engine: MiniEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_plan, "MAX_PREFETCHES", 1)
    paused(engine)
    paused(engine, "q1", session="t")
    assert ask(engine) == ("accepted", "loading")
    assert ask(engine, "t") == ("rejected", "busy")
    engine.run()
    assert ask(engine, "t") == ("accepted", "in_gpu"), "they share all of it"


@pytest.mark.parametrize(
    ("config", "answer", "tokens"),
    [
        (PolicyConfig(reload="never"), ("missing", "no_kv"), 0),
        (PolicyConfig(reload="first_k", reload_first_chunks=2), ("accepted", "loading"), 16),
        (PolicyConfig(fixed_ttl_s=0.0), ("rejected", "ttl"), 0),
        (PolicyConfig(max_ttl_s=9.0), ("accepted", "loading"), N_TOKENS),
    ],
)
def test_the_operators_settings_hold(
    config: PolicyConfig, answer: tuple[str, str], tokens: int
) -> None:
    engine = MiniEngine(config=config)
    paused(engine)
    assert ask(engine, ttl_s=30.0) == answer
    engine.run()
    assert engine.half.pins.pinned_blocks * BLOCK_TOKENS == tokens
    if tokens:
        assert pin_of(engine).deadline_s <= engine.now_s + min(30.0, config.max_ttl_s)
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    ("mode", "override_s", "ttl_s"),
    [("fixed", 3.0, 3.0), ("cap", 3.0, 3.0), ("floor", 3.0, 30.0), ("floor", 90.0, 90.0)],
)
def test_overrides_hold(engine: MiniEngine, mode: Any, override_s: float, ttl_s: float) -> None:
    paused(engine)
    override = TtlOverride("program", handle(engine), mode, override_s)
    engine.half.policy.ttl.overrides.replace([override])
    now_s = engine.now_s
    ask(engine, ttl_s=30.0)
    engine.run()
    assert pin_of(engine).deadline_s == pytest.approx(now_s + ttl_s)
    assert_nothing_held(engine)


def test_a_tenants_budget_is_charged_for_what_it_uses(engine: MiniEngine) -> None:
    paused(engine, cache_salt="t")
    budgets = engine.half.policy.ttl.budgets
    budgets.replace([TenantBudget("t", 8000 * 10.0, 1e9)])
    in_pieces(engine, 1)
    assert ask(engine, ttl_s=4.0, tenant="t") == ("accepted", "loading")
    engine.run()
    assert pin_of(engine).block_ids.size == 8
    assert budgets.ttl_limit_s("t", 8000, engine.now_s) == pytest.approx(6.0, abs=0.1)
    engine.now_s += 1.0
    engine.half.endings.unpin("r1", ReleaseCause.COMMAND)
    assert budgets.ttl_limit_s("t", 8000, engine.now_s) == pytest.approx(9.0, abs=0.1)
    budgets.replace([TenantBudget("t", 0.0, 1e9)])
    assert ask(engine, tenant="t") == ("rejected", "ttl")
    assert_nothing_held(engine)


# -- nobody pays for it ----------------------------------------------------------------------------


@pytest.mark.parametrize(("n_free", "tokens"), [(10, N_TOKENS), (8, 24), (3, 8)])
def test_only_free_blocks_beyond_a_headroom_are_taken(
    engine: MiniEngine, n_free: int, tokens: int
) -> None:
    first = paused(engine)
    others = engine.pool.take(40 - n_free)
    assert others is not None
    assert ask(engine)[0] == ("accepted" if tokens == N_TOKENS else "clipped")
    engine.run()
    assert engine.half.pins.pinned_blocks * BLOCK_TOKENS == tokens
    engine.pool.free_blocks(others)
    engine.run(follow_up(first, "r2"))
    assert sources(engine)["gpu_pin"] == tokens
    assert_nothing_held(engine)


def test_nothing_is_taken_where_nothing_is_free(engine: MiniEngine) -> None:
    paused(engine)
    others = engine.pool.take(38)
    assert others is not None
    assert ask(engine) == ("rejected", "memory")
    assert not engine.half.has_work()
    engine.pool.free_blocks(others)


def test_requests_that_wait_come_first(engine: MiniEngine) -> None:
    paused(engine)
    others = engine.pool.take(20)
    assert others is not None
    engine.add(turn("w", prompt(60, 900), session="w"))
    assert ask(engine) == ("clipped", "memory")
    engine.add(turn("w2", prompt(60, 900), session="w2"))
    engine.half.prefetcher.forget(handle(engine))
    engine.step()
    engine.pool.free_blocks(others)
    engine.run()


def test_a_preempted_request_that_waits_comes_first(engine: MiniEngine) -> None:
    paused(engine)
    engine.run()
    request = turn("p", prompt(20, 900), session="p", max_tokens=30)
    engine.add(request)
    engine.step()
    engine.step()
    engine._preempt(engine.running[-1])
    others = seize(engine)
    engine.step()
    assert engine.half.room.is_short
    engine.pool.free_blocks(others)
    assert ask(engine) == ("rejected", "memory")
    engine.run()
    assert not engine.half.room.is_short


def test_it_ends_when_memory_gets_short(engine: MiniEngine) -> None:
    in_pieces(engine, 1)
    first = paused(engine)
    engine.workers.delay = 3
    ask(engine)
    step_until_copying(engine)
    others = seize(engine)
    engine.run()
    assert ends(engine) == {"memory": 1}
    assert engine.half.pins.pinned_blocks * BLOCK_TOKENS == 8, "what has come stays"
    engine.pool.free_blocks(others)
    engine.run(follow_up(first, "r2"))
    assert sources(engine) == {"gpu_pin": 8, "cpu": 24, "recomputed": 12}
    assert_nothing_held(engine)


def test_a_request_waits_for_no_more_than_what_is_ordered(engine: MiniEngine) -> None:
    """It needs all of the memory: the prefetch orders no more, and its pin yields."""
    in_pieces(engine, 1)
    paused(engine)
    engine.workers.delay = 4
    ask(engine)
    step_until_copying(engine)
    engine.add(turn("big", prompt(39 * 4, 900), session="big", max_tokens=1, hints={"pin": False}))
    steps = 0
    while not engine.told.get("big") and "big" not in engine.told:
        engine.step()
        steps += 1
        assert steps < 20
    assert steps <= 4 + 3
    assert len(loads(engine)) == 1
    engine.run()
    assert_nothing_held(engine)


def test_the_pin_budget_is_kept() -> None:
    engine = MiniEngine(pin_budget_fraction=0.15)
    paused(engine)
    assert ask(engine) == ("clipped", "budget")
    engine.run()
    assert engine.half.pins.pinned_blocks == engine.half.pins.budget_blocks == 6
    assert_nothing_held(engine)


def test_a_budget_that_shrinks_meanwhile(engine: MiniEngine) -> None:
    first = paused(engine)
    engine.workers.delay = 3
    ask(engine)
    step_until_copying(engine)
    engine.half.pins.budget_blocks = 4
    engine.run()
    assert engine.half.pins.pinned_blocks == 0
    assert engine.pool.references == {}
    engine.run(follow_up(first, "r2"))
    assert sources(engine)["gpu_cache"] == N_TOKENS, "loaded it is: it can be hit until evicted"
    assert_nothing_held(engine)


def test_a_budget_that_is_short_for_a_moment_leaves_no_hole_in_the_pin(engine: MiniEngine) -> None:
    in_pieces(engine)
    first = paused(engine)
    engine.workers.delay = 2
    ask(engine)
    step_until_copying(engine, 4)
    prefetcher, pins = engine.half.prefetcher, engine.half.pins
    landed = count(1)
    on_result, budget_blocks = prefetcher.on_result, pins.budget_blocks

    def short_once(result: OrderResult) -> bool:
        pins.budget_blocks = pins.pinned_blocks if next(landed) == 2 else budget_blocks
        return on_result(result)

    prefetcher.on_result = short_once  # type: ignore[method-assign]
    engine.run()
    (pin,) = pins.pins()
    assert pin.block_ids.tolist() == engine.pool.find(first.block_hashes)[:2]


# -- what can happen meanwhile ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_failed_piece_ends_it(engine: MiniEngine, bad: int) -> None:
    in_pieces(engine)
    first = paused(engine)
    engine.workers.delay = 2
    ask(engine)
    step_until_copying(engine, 4)
    wrong = loads(engine)[bad]
    engine.workers.ok = lambda order: order is not wrong
    engine.run()
    assert ends(engine) == {"copy_failed": 1}
    assert failures(engine) == {"prefetch_copy": 1}
    assert engine.half.pins.pinned_blocks == 2 * bad
    assert len(engine.pool.find(first.block_hashes)) == 2 * bad
    hashed = [b.block_id for b in engine.pool.blocks if b.block_hash in first.block_hashes]
    assert len(hashed) == 2 * bad, "what came behind the bad piece is no hit"
    engine.workers.ok = lambda _: True
    engine.run(follow_up(first, "r2"))
    assert sources(engine)["recomputed"] == 12
    assert_nothing_held(engine)


def test_the_program_returns_when_it_has_been_stopped_already(engine: MiniEngine) -> None:
    """Nothing more is ordered, for want of memory; what is on its way is waited for all the same."""
    in_pieces(engine, 1)
    first = paused(engine)
    engine.workers.delay = 5
    ask(engine)
    step_until_copying(engine)
    engine.half.prefetcher._stop(engine.half.prefetcher._going[handle(engine)], "memory")
    engine.run(follow_up(first, "r2"))
    assert ends(engine) == {"memory": 1}
    assert sources(engine) == {"gpu_pin": 8, "cpu": 24, "recomputed": 12}
    assert_nothing_held(engine)


@pytest.mark.parametrize("asked_again", [False, True])
def test_the_program_returns_meanwhile(engine: MiniEngine, *, asked_again: bool) -> None:
    """Its request waits for the pieces on their way, and loads the rest itself."""
    in_pieces(engine, 2)
    first = paused(engine)
    engine.workers.delay = 5
    ask(engine)
    step_until_copying(engine, 2)
    engine.add(follow_up(first, "r2"))
    if asked_again:
        assert ask(engine) == ("rejected", "running")
    engine.run()
    assert ends(engine) == {"returned": 1}
    assert [order.request_id for order in loads(engine)] == ["", "", "r2"]
    assert sources(engine) == {"gpu_pin": 16, "cpu": 16, "recomputed": 12}
    assert_nothing_held(engine)


def test_the_program_returns_before_the_tier_has_answered(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    first = paused(engine)
    tier.answer_after = 3
    ask(engine)
    engine.add(follow_up(first, "r2"))
    assert engine.half.prefetcher.n_going == 0
    engine.run()
    assert sources(engine) == {"cpu": N_TOKENS, "recomputed": 12}
    assert_nothing_held(engine)


def test_a_request_does_not_wait_for_ever(engine: MiniEngine) -> None:
    first = paused(engine)
    engine.workers.delay = 10_000
    ask(engine)
    step_until_copying(engine)
    engine.workers.delay = 0
    engine.add(follow_up(first, "r2"))
    for _ in range(5):
        engine.step()
    assert not engine.running
    engine.now_s += RETURN_WAIT_S
    while "r2" not in engine.told:
        engine.step()
    assert sources(engine) == {"cpu": N_TOKENS, "recomputed": 12}
    engine.workers._running = [(0, order) for _, order in engine.workers._running]
    engine.run()
    assert "r1" not in engine.half.pins, "nobody would have ended that pin"
    assert_nothing_held(engine)


def test_another_conversation_of_the_program_does_not_wait(engine: MiniEngine) -> None:
    paused(engine)
    engine.workers.delay = 50
    ask(engine)
    step_until_copying(engine)
    engine.add(turn("sub", prompt(30, 800), max_tokens=2))
    for _ in range(6):
        engine.step()
    assert "sub" in engine.told
    engine.run()
    assert pin_of(engine, "r1"), "that one is still away"
    assert_nothing_held(engine)


@pytest.mark.parametrize("new_weights", [False, True])
def test_a_reset_meanwhile(engine: MiniEngine, *, new_weights: bool) -> None:
    """It succeeds, and yet nobody is given a block that a copy still writes to."""
    in_pieces(engine, 2)
    first = paused(engine)
    engine.workers.delay = 4
    ask(engine)
    step_until_copying(engine, 2)
    written = {b for order in loads(engine) for b in order.block_ids}
    assert engine.update_weights() if new_weights else engine.reset_prefix_cache()
    assert len(engine.half.pins) == 0
    assert engine.pool.references == dict.fromkeys(written, 1)
    others = seize(engine)
    engine.run()
    assert all(block.content == "another's" for block in others)
    assert len(loads(engine)) == 2
    assert engine.pool.find(first.block_hashes) == [], "what was there before a reset is no hit"
    assert ends(engine) == {"reset": 1}
    assert set(engine.pool.references) == {b.block_id for b in others}
    engine.pool.free_blocks(others)
    engine.run(follow_up(first, "r2"))
    again = {"recomputed": 44} if new_weights else {"cpu": N_TOKENS, "recomputed": 12}
    assert sources(engine) == again
    assert_nothing_held(engine)


def test_a_reset_that_is_refused_meanwhile(engine: MiniEngine) -> None:
    paused(engine)
    engine.workers.delay = 4
    ask(engine)
    step_until_copying(engine)
    others = engine.pool.take(1)
    assert others is not None
    assert not engine.reset_prefix_cache()
    assert len(engine.pool.references) == 9
    engine.run()
    engine.pool.free_blocks(others)
    assert_nothing_held(engine)


def test_switched_off_meanwhile(engine: MiniEngine) -> None:
    in_pieces(engine, 1)
    first = paused(engine)
    engine.workers.delay = 4
    ask(engine)
    step_until_copying(engine)
    engine.half.live_mode.mode = Mode.OFF
    engine.step()
    written = set(loads(engine)[0].block_ids)
    assert set(engine.pool.references) == written
    others = seize(engine)
    engine.run()
    assert all(block.content == "another's" for block in others)
    engine.pool.free_blocks(others)
    assert engine.pool.references == {}
    assert engine.pool.find(first.block_hashes) == []
    assert ends(engine) == {"mode": 1}
    engine.half.live_mode.mode = Mode.ON
    assert_nothing_held(engine)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("moment", ["asked", "answered", "copying"])
def test_the_tier_is_lost_meanwhile(
    engine: MiniEngine, tier: VirtualTier, moment: str, *, restarted: bool
) -> None:
    in_pieces(engine, 1)
    first = paused(engine)
    engine.workers.delay = 3
    tier.answer_after = 3
    ask(engine)
    if moment == "answered":
        for _ in range(4):
            engine.half.answers.poll(engine.now_s)
    elif moment == "copying":
        step_until_copying(engine)
    tier.lose()
    tier.come_back(restarted=restarted)
    engine.run()
    assert ends(engine) == {"no_tier": 1}
    assert len(loads(engine)) == (1 if moment == "copying" else 0), "the old slots are not ours"
    tier.answer_after = 0
    engine.run(follow_up(first, "r2"))
    found = sources(engine)
    assert found["recomputed"] == 44 - found.get("gpu_pin", 0) - found.get("cpu", 0)
    assert_nothing_held(engine)


def test_the_program_ends_meanwhile(engine: MiniEngine) -> None:
    first = paused(engine)
    engine.workers.delay = 3
    ask(engine)
    step_until_copying(engine)
    engine.half.endings.program_ended(handle(engine))
    engine.run()
    assert len(engine.half.pins) == 0
    assert engine.pool.references == {}
    assert engine.pool.find(first.block_hashes) == []
    assert ask(engine) == ("missing", "no_kv")
    assert_nothing_held(engine)


def test_its_pin_ends_meanwhile(engine: MiniEngine) -> None:
    in_pieces(engine, 1)
    paused(engine)
    engine.workers.delay = 2
    ask(engine)
    while not len(engine.half.pins):
        engine.step()
    engine.half.endings.unpin("r1", ReleaseCause.COMMAND)
    engine.run()
    assert ends(engine) == {"pin_ended": 1}
    assert len(engine.half.pins) == 0
    assert len(loads(engine)) <= 2
    assert_nothing_held(engine)


def test_the_tier_holds_less_than_was_believed(engine: MiniEngine, tier: VirtualTier) -> None:
    first = paused(engine)
    tier.table.drop(engine.half.stager.copies.namespace, handle(engine))
    assert ask(engine) == ("accepted", "loading")
    engine.run()
    assert ends(engine) == {"no_kv": 1}
    assert ask(engine) == ("missing", "no_kv"), "it is known now"
    engine.run(follow_up(first, "r2"))
    assert sources(engine) == {"recomputed": 44}
    assert_nothing_held(engine)


@pytest.mark.parametrize("reason", ["server_error", "late"])
def test_a_lookup_that_fails_or_stays_away(
    engine: MiniEngine, tier: VirtualTier, reason: str
) -> None:
    paused(engine)
    if reason == "late":
        tier.answer_after = 1000
    else:
        tier.fail = lambda _: reason
    ask(engine)
    engine.step()
    engine.now_s += LOOKUP_DEADLINE_S
    engine.step()
    engine.step()
    assert engine.half.prefetcher.n_going == 0
    late = {"prefetch_lookup_late": 1}
    assert failures(engine) == (late if reason == "late" else {"lookup_server_error": 1})
    assert engine.half.has_work() is (reason == "late")
    tier._answers = [(0, event) for _, event in tier._answers]
    engine.run()
    assert tier.leaks() == {}, "the locks of an answer that nobody waits for go back at once"
    assert_nothing_held(engine)


@pytest.mark.parametrize("ranks", [1, 2])
def test_kvtier_gives_up_meanwhile(ranks: int) -> None:
    """Everything is given back but what is written to, and that when the workers are done."""
    engine = MiniEngine(ranks=ranks)
    paused(engine)
    engine.workers.delay = 2
    ask(engine)
    step_until_copying(engine)
    written = set(loads(engine)[0].block_ids)
    half = engine.half
    assert half.shutdown(engine_goes_on=True)
    assert set(engine.pool.references) == written
    results, _ = [], engine.workers.collect()
    while not results:
        results, _ = engine.workers.collect()
    for result in results[:-1]:
        assert half.late_results([result]), "another rank still writes"
    assert not half.late_results(results[-1:])
    assert engine.pool.references == {}


def test_at_the_engines_end_all_is_given_back(engine: MiniEngine) -> None:
    paused(engine)
    engine.workers.delay = 2
    ask(engine)
    step_until_copying(engine)
    assert not engine.half.shutdown()
    assert engine.pool.references == {}
    assert isinstance(engine.tier, VirtualTier)
    assert engine.tier.leaks() == {}


def test_it_is_told_and_logged() -> None:
    told: list[tuple[Any, ...]] = []

    class Follower:
        def decided(self, event: str, program: str, request_id: str, entry: dict[str, Any]) -> None:
            if event == "prefetch":
                told.append((request_id, entry["action"], entry["reason"]))

    engine = MiniEngine()
    engine.half.prefetcher._accounts._log._follower = Follower()  # type: ignore[assignment]
    paused(engine)
    ask(engine)
    engine.run()
    assert told == [("r1", "accepted", "loading"), ("r1", "end", "loaded")]


# -- request ids that are used again ---------------------------------------------------------------


def test_a_prefetch_of_a_turn_whose_id_another_request_bears_now_keeps_nobody_from_pausing(
    engine: MiniEngine,
) -> None:
    paused(engine, "again")
    engine.add(turn("again", prompt(30, 500), session="other"))
    assert ask(engine) == ("accepted", "loading")
    engine.run()
    pin = pin_of(engine, "again")
    assert pin.program == handle(engine, "other"), "the turn that has ended last has the name"
    assert_nothing_held(engine)


def test_a_prefetch_does_not_go_on_with_another_programs_pin(engine: MiniEngine) -> None:
    in_pieces(engine, 1)
    paused(engine, "again")
    engine.add(turn("again", prompt(30, 500), session="other"))
    while not engine.running:
        engine.step()
    engine.workers.delay = 30
    ask(engine)
    step_until_copying(engine)
    while not engine.half.pins.of_program(handle(engine, "other")):
        engine.step()
    blocks = pin_of(engine, "again").block_ids.tolist()
    engine.run()
    assert pin_of(engine, "again").block_ids.tolist() == blocks
    assert ends(engine) == {"pin_ended": 1}
    assert_nothing_held(engine)
