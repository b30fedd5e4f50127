"""The scheduler half in a small engine: a program's life, and everything that can cut it short."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvtier.backend import NoTier
from kvtier.policy import PolicyConfig
from kvtier.programs import ProgramLimits
from kvtier.turns.live_mode import Mode
from tests.unit.fake_vllm import FakeRequest
from tests.unit.mini_engine import MiniEngine
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from pathlib import Path


def prompt(n_tokens: int, start: int = 0) -> list[int]:
    return list(range(start, start + n_tokens))


def turn(
    request_id: str,
    tokens: list[int],
    *,
    session: str | None = "s",
    max_tokens: int = 4,
    hints: dict[str, Any] | None = None,
    **fields: Any,
) -> FakeRequest:
    params = {"kvtier": hints} if hints is not None else None
    return FakeRequest(
        request_id,
        tokens,
        max_tokens,
        session_id=session,
        kv_transfer_params=params,
        **fields,
    )


def follow_up(before: FakeRequest, request_id: str, n_new: int = 10, **how: Any) -> FakeRequest:
    """The program's next turn: all of the last one, and the tool's answer."""
    return turn(request_id, before.all_token_ids + prompt(n_new, 500), **how)


def evict(engine: MiniEngine) -> None:
    """Somebody else has used all of the memory."""
    assert engine.half.pins.pinned_blocks == 0
    blocks = engine.pool.take(engine.pool.get_num_free_blocks())
    assert blocks is not None
    engine.pool.free_blocks(blocks)


def expire(engine: MiniEngine) -> None:
    engine.now_s += 700.0
    engine.step()
    assert len(engine.half.pins) == 0


def total(engine: MiniEngine, key: str) -> float:
    return engine.stats.totals.get(key, 0)


def sources(engine: MiniEngine) -> dict[str, float]:
    """Prompt tokens by where their KV came from, since the last call."""
    names = ("gpu_pin", "gpu_cache", "cpu", "recomputed")
    now = {name: total(engine, f"prompt_tokens|{name}") for name in names}
    before = getattr(engine, "seen", dict.fromkeys(names, 0))
    engine.seen = now  # type: ignore[attr-defined]
    return {name: now[name] - before[name] for name in names if now[name] != before[name]}


def failures(engine: MiniEngine) -> dict[str, float]:
    found = engine.stats.totals.items()
    return {key.removeprefix("failures|"): n for key, n in found if key.startswith("failures|")}


def assert_nothing_held(engine: MiniEngine) -> None:
    """After everything has ended and every pin has expired."""
    expire(engine)
    engine.run()
    assert engine.pool.references == {}
    assert isinstance(engine.tier, VirtualTier)
    assert engine.tier.leaks() == {}


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
def test_tenants_and_adapters_read_only_their_own(engine: MiniEngine, what: str) -> None:
    """`MiniEngine` fails when a block holds what another tenant or adapter has computed."""

    class Lora:
        def __init__(self, name: str) -> None:
            self.lora_name = self.lora_path = name

    fields: list[dict[str, Any]] = [{"cache_salt": "a"}, {"cache_salt": "b"}]
    if what == "adapter":
        fields = [{"lora_request": Lora("a")}, {"lora_request": Lora("b")}, {}]
    for i, who in enumerate(fields):
        engine.run(turn(f"r{i}", prompt(30), session=f"s{i}", **who))
        expire(engine)
        evict(engine)
    assert sources(engine) == {"recomputed": 30 * len(fields)}
    engine.run(turn("again", prompt(30), session="s0", **fields[0]))
    assert sources(engine) == {"recomputed": 6, "cpu": 24}


def test_what_token_ids_do_not_determine_stays_out_of_the_tier(
    engine: MiniEngine, tier: VirtualTier
) -> None:
    first = turn("r1", prompt(30), mm_features=["an image"])
    engine.run(first)
    assert engine.told["r1"]["pinned_blocks"] == 8
    assert tier.table.counts()["chunks"] == 0
    expire(engine)
    evict(engine)
    engine.run(follow_up(first, "r2", mm_features=["an image"]))
    assert sources(engine) == {"recomputed": 30 + 44}


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
    assert engine.half.stager._staged == {}
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
    engine.half._housekeep(engine.now_s)
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
    assert engine.half.stager._staged == {}


# -- what goes wrong -------------------------------------------------------------------------------


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
    assert tier.leaks() == {}
    assert engine.half.reader.n_loads == 0
    assert_nothing_held(engine)


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
    assert one.half.stager.namespace == other.half.stager.namespace
    for engine in (one, other):
        assert engine.update_weights()
        assert engine.half.reader.namespace == engine.half.stager.namespace
    assert one.half.stager.namespace != other.half.stager.namespace


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
    assert engine.half.stager._staged == {}, "the late answer is about the old weights' KV"
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
            "staged": len(half.stager._staged),
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
