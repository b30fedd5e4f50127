"""The scheduler half in a small engine: a program's life, hints and settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.backend import NoTier
from kvtier.programs import ProgramLimits
from kvtier.turns.engine_facts import StepFacts
from kvtier.turns.live_mode import Mode
from kvtier.wire import KEY_BYTES
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


@pytest.fixture
def engine() -> MiniEngine:
    return MiniEngine()


@pytest.fixture
def tier(engine: MiniEngine) -> VirtualTier:
    assert isinstance(engine.tier, VirtualTier)
    return engine.tier


# -- a program's life ------------------------------------------------------------------------------


def test_a_program_in_eight_steps(engine: MiniEngine, tier: VirtualTier) -> None:
    first = turn("r1", prompt(30))
    engine.run(first)
    # 34 tokens, of which the last has no KV: 8 full blocks are pinned and staged.
    assert engine.told["r1"]["pinned_blocks"] == 8
    assert set(engine.pool.references.values()) == {1}
    assert tier.table.counts()["chunks"] == 4
    assert sources(engine) == {"recomputed": 30}

    engine.now_s += 3.0
    second = follow_up(first, "r2")
    engine.run(second)
    assert sources(engine) == {"gpu_pin": 32, "recomputed": 12}
    assert total(engine, "pin_releases|handoff") == 1
    assert {pin.key for pin in engine.half.pins.pins()} == {"r2"}
    assert engine.stats.take()["samples"]["gap_seconds"] == [pytest.approx(3.0, abs=0.1)]

    expire(engine)
    assert total(engine, "pin_releases|ttl") == 1
    evict(engine)
    third = follow_up(second, "r3")
    engine.run(third)
    assert sources(engine) == {"cpu": 40, "recomputed": 18}
    assert total(engine, "decisions|return|reload|reload_cheaper") == 1
    assert total(engine, "loaded_bytes") > 0
    assert failures(engine) == {}
    assert_nothing_held(engine)


def test_a_load_goes_where_it_should(engine: MiniEngine, tier: VirtualTier) -> None:
    first = turn("r1", prompt(30))
    engine.run(first)
    expire(engine)
    evict(engine)
    sources(engine)
    # Another program still has the system prompt in GPU memory: 12 tokens, one chunk and a half.
    other = turn("o", prompt(13), session="other", max_tokens=2)
    engine.run(other)
    second = follow_up(first, "r2")
    engine.run(second)
    (load,) = [order for order in engine.workers.orders if order.request_id == "r2"][:1]
    assert load.direction == "load"
    assert load.skip_blocks == 1
    assert [len(rank) for rank in load.slots] == [3]
    assert len(load.block_ids) == 6
    assert load.generation == tier.region.generation
    assert sources(engine) == {"recomputed": 5 + 12, "gpu_cache": 12, "cpu": 8 + 20}
    assert_nothing_held(engine)


def test_all_ranks_copy_and_report() -> None:
    engine = MiniEngine(ranks=2)
    first = turn("r1", prompt(30))
    engine.run(first)
    assert isinstance(engine.tier, VirtualTier)
    assert len(engine.tier.l1.chunks) == 8
    expire(engine)
    evict(engine)
    engine.run(follow_up(first, "r2"))
    assert sources(engine)["cpu"] == 32
    assert_nothing_held(engine)


def test_slow_answers_and_copies_change_nothing(engine: MiniEngine, tier: VirtualTier) -> None:
    tier.answer_after = 3
    engine.workers.delay = 4
    first = turn("r1", prompt(30))
    engine.run(first)
    expire(engine)
    evict(engine)
    engine.run(follow_up(first, "r2"))
    assert sources(engine) == {"recomputed": 42, "cpu": 32}
    assert_nothing_held(engine)


def test_without_a_tier_pins_alone_work() -> None:
    engine = MiniEngine(tier=NoTier())
    first = turn("r1", prompt(30))
    engine.run(first)
    engine.run(follow_up(first, "r2"))
    assert sources(engine) == {"gpu_pin": 32, "recomputed": 42}
    expire(engine)
    assert engine.pool.references == {}


def test_programs_are_found_by_prefix(engine: MiniEngine) -> None:
    """An agent that sends neither session nor hint."""
    first = turn("r1", prompt(30), session=None, max_tokens=8)
    engine.run(first)
    second = follow_up(first, "r2", session=None)
    engine.run(second)
    assert total(engine, "pin_releases|handoff") == 1
    assert sources(engine)["gpu_pin"] == 36


def test_a_prompt_that_is_all_cached_still_computes_a_token(engine: MiniEngine) -> None:
    first = turn("r1", prompt(32))
    engine.run(first)
    expire(engine)
    evict(engine)
    engine.run(turn("r2", prompt(32)))
    assert sources(engine) == {"recomputed": 32 + 8, "cpu": 24}


@pytest.mark.parametrize("what", ["tenant", "adapter"])
def test_tenants_and_adapters_read_only_their_own(
    engine: MiniEngine, what: str, tmp_path: Path
) -> None:
    """`MiniEngine` fails when a block holds what another tenant or adapter has computed."""

    def lora(name: str, number: int) -> Any:
        path = tmp_path / name
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")
        return SimpleNamespace(lora_name=name, lora_path=str(path), lora_int_id=number)

    fields: list[dict[str, Any]] = [{"cache_salt": "a"}, {"cache_salt": "b"}]
    if what == "adapter":
        fields = [{"lora_request": lora("a", 1)}, {"lora_request": lora("b", 2)}, {}]
    for i, who in enumerate(fields):
        engine.run(turn(f"r{i}", prompt(30), session=f"s{i}", **who))
        expire(engine)
        evict(engine)
    assert sources(engine) == {"recomputed": 30 * len(fields)}
    engine.run(turn("again", prompt(30), session="s0", **fields[0]))
    assert sources(engine) == {"recomputed": 6, "cpu": 24}


@pytest.mark.parametrize("what", ["mm_features", "prompt_embeds"])
def test_what_token_ids_do_not_determine_stays_out_of_the_tier(
    engine: MiniEngine, tier: VirtualTier, what: str
) -> None:
    """Prompt embeddings may come with token ids, which stand for the other positions only."""
    first = turn("r1", prompt(30), **{what: ["an image"]})
    engine.run(first)
    assert engine.told["r1"]["pinned_blocks"] == 8
    assert tier.table.counts()["chunks"] == 0
    expire(engine)
    evict(engine)
    engine.run(follow_up(first, "r2", **{what: ["an image"]}))
    assert sources(engine) == {"recomputed": 30 + 44}


def test_a_session_that_is_sent_an_image_in_its_middle_stays_out_of_the_tier(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    first = turn("r1", prompt(30))
    engine.add(first)
    engine.step()
    first.mm_features = ["an image"]
    engine.run()
    assert engine.told["r1"]["pinned_blocks"] == 8
    assert tier.table.counts()["chunks"] == 0


def test_parallel_turns_of_a_program_are_all_kept(engine: MiniEngine) -> None:
    """n > 1, or sub-agents: each may be the one that goes on."""
    siblings = [turn(f"r{i}", prompt(20), max_tokens=4 + 8 * i) for i in range(3)]
    engine.run(*siblings)
    assert {pin.key for pin in engine.half.pins.pins()} == {"r0", "r1", "r2"}
    engine.run(follow_up(siblings[1], "next"))
    assert engine.half.pins.of_program(next(iter(engine.half.pins.pins())).program)
    assert_nothing_held(engine)


def test_a_sub_agent_does_not_take_its_parents_pin(engine: MiniEngine) -> None:
    parent = turn("parent", prompt(30))
    engine.run(parent)
    engine.run(turn("child", prompt(8) + prompt(20, 300)))
    assert {pin.key for pin in engine.half.pins.pins()} == {"parent", "child"}
    engine.run(follow_up(parent, "next"))
    assert "parent" not in engine.half.pins
    assert sources(engine)["gpu_pin"] >= 32
    assert_nothing_held(engine)


def test_the_tier_is_told_what_its_programs_do(engine: MiniEngine, tier: VirtualTier) -> None:
    first = turn("r1", prompt(30))
    engine.run(first)
    assert tier.marked == [], "the tier has nothing of it while it runs"
    (name,) = (name for _, name in tier.table._programs)
    second = follow_up(first, "r2")
    engine.run(second)
    assert tier.marked == [(name, "waiting"), (name, "running"), (name, "paused")]
    third = follow_up(second, "r3")
    engine.half.before_reset()
    engine.half.reset_tier()
    engine.run(third)
    assert tier.marked[3:] == [], "nor of what was computed before the weights changed"


def test_a_copy_that_had_to_make_room_while_its_program_ran_is_made_again() -> None:
    """Nobody may count on it: where the pin then ends, too, the whole context would have to be computed again."""
    tier = VirtualTier(n_slots=6)
    engine = MiniEngine(tier=tier)
    first = turn("r1", prompt(30))
    engine.run(first)
    # What the second turn adds is less than a chunk.
    engine.add(follow_up(first, "r2", n_new=2, max_tokens=4))
    engine.step()
    others = b"".join(bytes([i]) * KEY_BYTES for i in range(5))
    reserve_id = tier.reserve("ns", "others", others, 0, 5, 1e9, 60.0)
    tier.commit(reserve_id, ok=True)
    tier.drop("ns", "others")
    engine.run()
    held = {program: len(stored.keys) for (_, program), stored in tier.table._programs.items()}
    assert list(held.values()) == [4]
    assert failures(engine) == {}


def test_what_other_weights_have_left_makes_room_for_itself() -> None:
    tier = VirtualTier(n_slots=10)
    engine = MiniEngine(tier=tier)
    first = turn("r1", prompt(30))
    engine.run(first)
    old = engine.half.stager.copies.namespace
    assert engine.update_weights()
    second = follow_up(first, "r2")
    engine.run(second)
    assert engine.half.stager.copies.namespace != old
    others = b"".join(bytes([i]) * KEY_BYTES for i in range(4))
    tier.commit(tier.reserve("ns", "others", others, 0, 4, 1e9, 60.0), ok=True)
    engine.step()
    (name,) = (name for namespace, name in tier.table._programs if namespace == old)
    held = {ns: len(stored.keys) for (ns, _), stored in tier.table._programs.items()}
    assert held[old] < 4
    assert engine.half.stager.copies.confirmed_chunks(name) == 5


def test_a_turn_that_goes_before_it_starts_is_waited_for_no_longer(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    first = turn("r1", prompt(30))
    engine.run(first)
    second = follow_up(first, "r2")
    engine.add(second)
    engine.abort("r2")
    assert [activity for _, activity in tier.marked] == ["waiting", "paused"]


def test_of_a_turn_that_waits_at_a_reset_the_old_copy_is_kept_no_longer(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    first = turn("r1", prompt(30))
    engine.run(first)
    engine.add(follow_up(first, "r2"))
    (record,) = tier.table._programs.values()
    assert record.activity == "waiting"
    engine.half.before_reset()
    engine.half.reset_tier()
    assert record.activity == "paused"


def test_a_copy_that_turns_share_is_what_the_neediest_does(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    first = turn("r1", prompt(30))
    engine.run(first)
    left, right = follow_up(first, "left"), follow_up(first, "right")
    half = engine.half
    half.on_new_request(left)
    half.on_new_request(right)
    (record,) = tier.table._programs.values()
    half.returns.mark(half._turns["left"], "running")
    assert record.activity == "waiting"
    half.returns.mark(half._turns["right"], "running")
    assert record.activity == "running"
    half.returns.mark_paused(half._turns["left"])
    assert record.activity == "running"
    half.returns.mark_paused(half._turns["right"])
    assert record.activity == "paused"
    assert half.returns._active == {}


def test_a_preempted_turn_needs_its_copy_again(engine: MiniEngine, tier: VirtualTier) -> None:
    first = turn("r1", prompt(30))
    engine.run(first)
    engine.add(follow_up(first, "r2", max_tokens=30))
    (record,) = tier.table._programs.values()
    while not engine.running:
        engine.step()
    assert record.activity == "running"
    engine._preempt(engine.running[0])
    engine.preempted.clear()
    # vLLM starts no request in a step that has preempted one.
    engine.half.build(StepFacts(preempted=("r2",)))
    assert record.activity == "waiting"
    while not engine.running:
        engine.step()
    assert record.activity == "running"


def test_a_stranger_in_the_program_does_not_mark_its_copy(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    engine.run(turn("r1", prompt(30)))
    engine.run(turn("child", list(range(900, 930))))
    assert tier.marked == []


def test_an_aborted_turn_ends_no_episode(engine: MiniEngine) -> None:
    request = turn("r1", prompt(30), max_tokens=20)
    engine.add(request)
    engine.step()
    engine.step()
    engine.abort("r1")
    assert len(engine.half.admission._forecast) == 1
    engine.run(turn("r2", prompt(30)))
    assert len(engine.half.admission._forecast) == 0


def test_of_parallel_conversations_the_one_that_goes_on_is_told(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    parent = turn("parent", prompt(30))
    child = turn("child", [*prompt(10), *range(900, 930)])
    engine.run(parent)
    engine.run(child)
    names = {name for _, name in tier.table._programs}
    assert len(names) == 2
    del tier.marked[:]
    engine.run(follow_up(child, "next"))
    (of_child,) = {name for name, _ in tier.marked}
    assert len(tier.marked) == 3
    engine.run(follow_up(parent, "after"))
    assert {name for name, _ in tier.marked} == names
    assert {name for name, _ in tier.marked[3:]} == names - {of_child}


# -- hints and settings ----------------------------------------------------------------------------


def test_the_end_hint_gives_everything_back(engine: MiniEngine, tier: VirtualTier) -> None:
    first = turn("r1", prompt(30))
    engine.run(first)
    engine.run(follow_up(first, "r2", hints={"end": True}))
    assert len(engine.half.pins) == 0
    assert engine.pool.references == {}
    assert tier.table.counts()["chunks"] == 0
    assert len(tier.dropped) == 1
    assert len(engine.half.programs) == 0
    assert engine.told["r2"] is None


def test_the_end_hint_while_the_turn_before_is_staged(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    engine.workers.delay = 3
    first = turn("r1", prompt(30))
    engine.add(first)
    while "r1" not in engine.told:
        engine.step()
    engine.run(follow_up(first, "r2", max_tokens=1, hints={"end": True}))
    assert engine.pool.references == {}
    assert tier.leaks() == {}
    assert engine.half.stager.copies._staged == {}
    assert engine.half.returns._chains == {}


def test_an_aborted_end_ends_the_program_too(engine: MiniEngine) -> None:
    first = turn("r1", prompt(30))
    engine.run(first)
    engine.add(follow_up(first, "r2", hints={"end": True}))
    engine.abort("r2")
    assert len(engine.half.pins) == 0
    assert len(engine.half.programs) == 0
    engine.run()
    assert engine.pool.references == {}


def test_bad_hints_are_counted_and_ignored(engine: MiniEngine) -> None:
    engine.run(turn("r1", prompt(30), hints={"ttl_s": "long", "colour": 1}))
    assert failures(engine) == {"hint_wrong_type": 1, "hint_unknown": 1}
    assert engine.told["r1"]["pinned_blocks"] == 8


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.SHADOW])
def test_off_and_shadow_hold_nothing(mode: Mode) -> None:
    engine = MiniEngine(mode=mode)
    first = turn("r1", prompt(30))
    engine.run(first)
    assert engine.pool.references == {}
    assert isinstance(engine.tier, VirtualTier)
    assert engine.tier.table.counts()["chunks"] == 0
    evict(engine)
    engine.run(follow_up(first, "r2"))
    assert sources(engine) == {"recomputed": 30 + 44}
    decided = [k for k in engine.stats.totals if k.startswith("decisions|pause")]
    assert bool(decided) == (mode is Mode.SHADOW)


def test_turned_off_everything_is_released(tmp_path: Path) -> None:
    switch = tmp_path / "mode"
    engine = MiniEngine(switch_file=switch)
    engine.workers.delay = 50
    engine.add(turn("r1", prompt(30)))
    while "r1" not in engine.told:
        engine.step()
    engine.step()
    assert engine.pool.references
    switch.write_text("off")
    engine.now_s += 2.0
    engine.step()
    assert engine.pool.references == {}
    assert total(engine, "pin_releases|off") == 1
    engine.run()
    assert isinstance(engine.tier, VirtualTier)
    assert engine.tier.leaks() == {}
    switch.write_text("on")
    engine.now_s += 2.0
    engine.run(turn("r2", prompt(30)))
    assert engine.told["r2"]["pinned_blocks"] == 8


def test_turned_off_while_a_lookup_is_answered(tmp_path: Path) -> None:
    switch = tmp_path / "mode"
    tier = VirtualTier()
    engine = MiniEngine(tier=tier, switch_file=switch)
    first = turn("r1", prompt(30))
    engine.run(first)
    expire(engine)
    evict(engine)
    tier.answer_after = 1
    engine.add(follow_up(first, "r2"))
    engine.step()
    engine.half.answers.poll(engine.now_s)
    assert tier.leaks()
    switch.write_text("off")
    engine.now_s += 2.0
    engine.half.housekeeping.run(engine.now_s)
    engine.run()
    assert tier.leaks() == {}
    assert total(engine, "prompt_tokens|cpu") == 0


def test_programs_are_forgotten() -> None:
    engine = MiniEngine(limits=ProgramLimits(forget_after_s=50.0))
    engine.run(turn("r1", prompt(30), hints={"ttl_s": 1000.0, "program": "x"}))
    assert len(engine.half.pins) == 1
    engine.now_s += 60.0
    engine.step()
    assert len(engine.half.programs) == 0
    assert len(engine.half.pins) == 0
    assert engine.half.returns._chains == {}
    assert engine.half.stager.copies._staged == {}
