"""Commands of operators and clients, from the link to the blocks and back, in a small engine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from kvtier import link_messages as messages
from kvtier.backend import NoTier
from kvtier.link_messages import ProgramKey
from kvtier.policy_facts import PolicyConfig
from tests.unit.command_cases import AGENT, Rig, agent_turn, override
from tests.unit.prefetch_cases import ends, in_pieces, loads, paused, step_until_copying
from tests.unit.program_cases import assert_nothing_held, evict, follow_up, prompt, total, turn
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from pathlib import Path

    from kvtier.orders import StepOrders


@pytest.fixture
def rig() -> Rig:
    return Rig()


# -- pins ------------------------------------------------------------------------------------------


def test_the_commands_of_a_hook_are_answered_together_and_in_order() -> None:
    rig = Rig()
    agent_turn(rig)
    for ttl_s in (5.0, 60.0, 7.0):
        rig.send(messages.PinCommand, ttl_s=ttl_s)
    rig.engine.wake()
    rig.engine.wake()
    assert rig.link.messages == [3]
    assert [answer.id for answer in rig.link.answers] == [1, 2, 3]
    assert rig.left_s() == pytest.approx(7.0, abs=0.1)


def test_a_pin_is_given_another_time(rig: Rig) -> None:
    agent_turn(rig)
    answer = rig.do(messages.PinCommand, ttl_s=42.0)
    assert (answer.outcome, answer.reason) == ("accepted", "pinned")
    assert rig.left_s() == pytest.approx(42.0)
    rig.engine.now_s += 43.0
    rig.engine.wake()
    assert rig.pins == []


def test_a_pin_longer_than_allowed_is_clipped(rig: Rig) -> None:
    agent_turn(rig)
    answer = rig.do(messages.PinCommand, ttl_s=1e6)
    assert (answer.outcome, answer.reason) == ("clipped", "max_ttl")
    assert rig.left_s() == pytest.approx(600.0)


def test_a_pin_lasts_from_when_it_was_asked_for(rig: Rig) -> None:
    """An idle engine that nobody can wake takes a command in with its next step."""
    agent_turn(rig)
    left_s = rig.left_s()
    answer = rig.do(messages.PinCommand, ttl_s=60.0, asked_s=time.time() - 61.0)
    assert (answer.outcome, answer.reason) == ("rejected", "too_late")
    assert rig.left_s() == pytest.approx(left_s, abs=1.0)
    answer = rig.do(messages.PinCommand, ttl_s=340.0, asked_s=time.time() - 100.0)
    assert (answer.outcome, answer.reason) == ("accepted", "pinned")
    assert rig.left_s() == pytest.approx(240.0, abs=20.0)
    # A clock that was set back makes nothing longer.
    rig.do(messages.PinCommand, ttl_s=60.0, asked_s=time.time() + 1000.0)
    assert rig.left_s() == pytest.approx(60.0)


def test_release_frees_the_blocks_of_an_idle_engine_at_once(rig: Rig) -> None:
    agent_turn(rig)
    assert rig.engine.pool.references
    answer = rig.do(messages.ReleaseCommand)
    assert (answer.outcome, answer.reason, answer.detail) == ("accepted", "released", "8 blocks")
    assert rig.engine.pool.references == {}
    assert ("release", "command") in rig.link.told
    again = rig.do(messages.ReleaseCommand)
    assert (again.outcome, again.reason) == ("missing", "no_pin")


@pytest.mark.parametrize("moment", ["asked", "copying", "stopped", "pinned"])
def test_a_release_stops_a_prefetch(rig: Rig, moment: str) -> None:
    """Nothing of it is pinned any more, nor will be."""
    engine = rig.engine
    in_pieces(engine, 1)
    paused(engine, session="agent")
    engine.workers.delay = 3
    assert rig.do(messages.ToolReturnCommand).outcome == "accepted"
    if moment != "asked":
        step_until_copying(engine)
    if moment == "stopped":
        prefetcher = engine.half.prefetcher
        prefetcher._stop(next(iter(prefetcher._going.values())), "memory")
    while moment == "pinned" and not rig.pins:
        engine.step()
    answer = rig.do(messages.ReleaseCommand)
    in_flight = engine.half.prefetcher.n_in_flight
    assert (answer.outcome, answer.reason) == (
        ("clipped", "loading") if in_flight else ("accepted", "released")
    )
    assert "prefetch" in answer.detail
    assert rig.pins == []
    ordered = len(loads(engine))
    engine.run()
    assert rig.pins == []
    assert len(loads(engine)) == ordered, "nothing more is loaded"
    assert engine.pool.references == {}
    if moment != "stopped":
        assert ends(engine) == {"released": 1}
    again = rig.do(messages.ReleaseCommand)
    assert (again.outcome, again.reason) == ("missing", "no_pin")


def test_a_release_during_the_copy_says_that_blocks_come_later(rig: Rig) -> None:
    rig.engine.workers.delay = 3
    request = turn("r1", prompt(30), session="agent")
    rig.engine.add(request)
    while "r1" not in rig.engine.told:
        rig.engine.step()
    answer = rig.do(messages.ReleaseCommand)
    assert (answer.outcome, answer.reason) == ("clipped", "staging")
    rig.engine.run()
    assert rig.engine.pool.references == {}


def test_nothing_is_done_to_a_program_that_runs(rig: Rig) -> None:
    request = turn("r1", prompt(30), session="agent")
    rig.engine.add(request)
    for kind in (messages.ReleaseCommand, messages.StageCommand, messages.PrefetchCommand):
        answer = rig.do(kind)
        assert (answer.outcome, answer.reason) == ("rejected", "running")
    rig.engine.run()
    assert "r1" in rig.engine.told


def test_an_unknown_program_is_missing(rig: Rig) -> None:
    for key in (ProgramKey(None, "nobody"), ProgramKey("tenant", "agent")):
        agent_turn(rig)
        answer = rig.do(messages.ReleaseCommand, program=key)
        assert (answer.outcome, answer.reason) == ("missing", "unknown_program")


# -- the CPU tier ----------------------------------------------------------------------------------


def test_staging_on_command_copies_what_the_pause_did_not(rig: Rig) -> None:
    agent_turn(rig, hints={"stage": False})
    assert not rig.engine.half.stager.copies
    assert isinstance(rig.engine.tier, VirtualTier)
    answer = rig.do(messages.StageCommand)
    assert (answer.outcome, answer.reason, answer.detail) == ("accepted", "staging", "32 tokens")
    rig.engine.run()
    assert rig.engine.tier.table.counts()["chunks"] == 4
    again = rig.do(messages.StageCommand)
    assert (again.outcome, again.reason) == ("accepted", "staged")


@pytest.mark.parametrize("mode", ["shadow", "off"])
def test_nothing_is_held_unless_kvtier_is_on(rig: Rig, mode: str) -> None:
    agent_turn(rig, hints={"stage": False})
    assert rig.pins
    rig.do(messages.PolicyCommand, mode=mode)
    rig.engine.wake()
    assert rig.pins == []
    assert rig.engine.pool.references == {}
    for command in (
        (messages.PinCommand, {"ttl_s": 60.0}),
        (messages.StageCommand, {}),
        (messages.PrefetchCommand, {}),
        (messages.ToolReturnCommand, {}),
    ):
        answer = rig.do(command[0], **command[1])
        assert (answer.outcome, answer.reason) == ("rejected", "mode"), command
        assert mode in answer.detail
    assert rig.engine.pool.references == {}
    assert isinstance(rig.engine.tier, VirtualTier)
    assert rig.engine.tier.table.counts()["chunks"] == 0


def test_commands_that_come_with_the_one_that_switches_off_are_refused(rig: Rig) -> None:
    agent_turn(rig, hints={"stage": False})
    rig.send(messages.PolicyCommand, mode="shadow")
    rig.send(messages.PinCommand, ttl_s=60.0)
    assert rig.do(messages.StageCommand).reason == "mode"
    assert [answer.reason for answer in rig.link.answers] == ["changed", "mode", "mode"]
    assert rig.engine.pool.references == {}


def test_staging_without_a_tier_is_rejected() -> None:
    rig = Rig(tier=NoTier())
    agent_turn(rig)
    answer = rig.do(messages.StageCommand)
    assert (answer.outcome, answer.reason) == ("rejected", "no_tier")


def test_a_program_is_prefetched_before_it_returns(rig: Rig) -> None:
    first = agent_turn(rig)
    rig.do(messages.ReleaseCommand)
    evict(rig.engine)
    answer = rig.do(messages.ToolReturnCommand)
    assert answer.outcome == "accepted", answer
    rig.engine.run()
    second = follow_up(first, "r2", session="agent")
    rig.engine.run(second)
    assert total(rig.engine, "prompt_tokens|gpu_pin") == 32


def test_a_returned_tool_keeps_the_pin_for_a_while(rig: Rig) -> None:
    agent_turn(rig)
    rig.do(messages.PinCommand, ttl_s=1.0)
    answer = rig.do(messages.ToolReturnCommand)
    assert (answer.outcome, answer.reason) == ("accepted", "in_gpu")
    assert rig.left_s() == pytest.approx(60.0)


@pytest.mark.parametrize("kind", [messages.ToolReturnCommand, messages.PrefetchCommand])
def test_a_program_that_is_pinned_needs_no_tier_to_be_awaited(
    kind: type[messages.Command],
) -> None:
    rig = Rig(tier=NoTier())
    agent_turn(rig)
    rig.do(messages.PinCommand, ttl_s=1.0)
    answer = rig.do(kind)
    assert (answer.outcome, answer.reason) == ("accepted", "in_gpu")
    assert "32 tokens" in answer.detail
    assert rig.left_s() == pytest.approx(60.0 if kind is messages.ToolReturnCommand else 1.0)
    rig.do(messages.ReleaseCommand)
    again = rig.do(kind)
    assert (again.outcome, again.reason) == ("missing", "no_kv")


def test_what_cannot_be_loaded_besides_the_pin_is_said(rig: Rig) -> None:
    """The first blocks are pinned, and GPU memory has no place for the rest."""
    engine = rig.engine
    paused(engine, session="agent")
    others = engine.pool.take(35)
    assert others is not None
    rig.do(messages.ToolReturnCommand)
    engine.run()
    assert 0 < len(rig.pins[0].block_ids) < 8
    assert rig.do(messages.ToolReturnCommand).outcome == "clipped"
    engine.pool.free_blocks(others)


# -- tools -----------------------------------------------------------------------------------------


def test_an_announced_tool_names_the_pause(rig: Rig) -> None:
    agent_turn(rig)
    answer = rig.do(messages.ToolCallCommand, tool="bash", p50_s=5.0)
    assert (answer.outcome, answer.reason) == ("accepted", "decided_anew")
    rig.engine.now_s += 5.0
    again = turn("r2", prompt(30), session="agent")
    rig.engine.run(again)
    # The gap was learned under the announced name: its window exists now.
    assert rig.engine.half.policy.ttl._gaps.n_tools == 1


def test_an_announced_duration_counts_from_when_it_was_said(rig: Rig) -> None:
    agent_turn(rig)
    # What was asked for stays, whatever is announced.
    rig.do(messages.PinCommand, ttl_s=400.0)
    left_s = rig.left_s()
    rig.do(messages.ToolCallCommand, tool="bash", p50_s=5.0, asked_s=time.time() - 100.0)
    (pin,) = rig.pins
    assert rig.engine.now_s - pin.data.announced_s == pytest.approx(100.0, abs=20.0)
    assert rig.left_s() == pytest.approx(left_s, abs=1.0)
    noted = rig.engine.half.policy.ttl.announcements.of(pin.program, "r1")
    assert noted is not None
    assert noted.at_s == pin.data.announced_s


def test_a_tool_announced_during_the_turn_counts_at_its_end(rig: Rig) -> None:
    request = turn("r1", prompt(30), session="agent")
    rig.engine.add(request)
    rig.engine.step()
    answer = rig.do(messages.ToolCallCommand, tool="bash")
    assert (answer.outcome, answer.reason) == ("accepted", "at_turn_end")
    rig.engine.run()
    assert rig.engine.told["r1"]["tool"] == "bash"
    # It is over with the pause.
    again = turn("r2", prompt(40), session="agent")
    rig.engine.run(again)
    assert rig.engine.told["r2"]["tool"] is None


def test_the_end_of_a_program_gives_everything_up(rig: Rig) -> None:
    agent_turn(rig)
    answer = rig.do(messages.EndCommand)
    assert (answer.outcome, answer.reason) == ("accepted", "ended")
    assert ("gone", "") in rig.link.told
    assert rig.engine.pool.references == {}
    assert len(rig.engine.half.programs) == 0
    assert isinstance(rig.engine.tier, VirtualTier)
    assert rig.engine.tier.table.counts()["programs"] == 0
    assert_nothing_held(rig.engine)


def test_the_end_of_a_running_program_waits_for_its_turn(rig: Rig) -> None:
    request = turn("r1", prompt(30), session="agent")
    rig.engine.add(request)
    assert rig.do(messages.EndCommand).reason == "at_turn_end"
    rig.engine.run()
    assert len(rig.engine.half.programs) == 0
    assert rig.engine.pool.references == {}


# -- overrides and policy --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scope", [{"program": AGENT}, {"tool": "bash"}, {"tenant": "acme"}, {}], ids=str
)
def test_an_override_of_zero_pins_nothing(scope: dict[str, Any]) -> None:
    rig = Rig()
    if "program" in scope:
        scope = {"program": ProgramKey("acme", "agent")}
    rig.do(messages.OverridesCommand, overrides=[override("fixed", 0.0, **scope)])
    agent_turn(rig, cache_salt="acme", hints={"tool": "bash"})
    assert rig.pins == []
    assert rig.engine.told["r1"]["reason"] == "override_fixed"
    rig.do(messages.OverridesCommand, overrides=[])
    agent_turn(rig, "r2", cache_salt="acme", hints={"tool": "bash"})
    assert rig.pins


def test_an_override_fixes_the_time(rig: Rig) -> None:
    rig.do(messages.OverridesCommand, overrides=[override("fixed", 60.0, program=AGENT)])
    agent_turn(rig, hints={"ttl_s": 5.0})
    assert rig.engine.told["r1"]["ttl_s"] == 60.0


def test_the_answer_to_a_change_is_the_policy_that_holds(rig: Rig) -> None:
    answer = rig.do(messages.PolicyCommand, max_ttl_s=7.0, stage=False, aging_s=5.0)
    assert answer.outcome == "accepted"
    assert answer.policy is not None
    assert (answer.policy.max_ttl_s, answer.policy.stage, answer.policy.aging_s) == (
        7.0,
        False,
        5.0,
    )
    agent_turn(rig)
    assert rig.engine.told["r1"]["ttl_s"] <= 7.0
    assert not rig.engine.half.stager.copies


def test_a_policy_out_of_range_changes_nothing(rig: Rig) -> None:
    before = rig.do(messages.PolicyCommand).policy
    answer = rig.do(messages.PolicyCommand, max_ttl_s=7.0, aging_s=-1.0)
    assert (answer.outcome, answer.reason) == ("rejected", "out_of_range")
    assert "aging_s" in answer.detail
    assert answer.policy == before


def test_no_pin_is_to_last_shorter_than_the_fixed_ttl_as_at_start() -> None:
    rig = Rig(config=PolicyConfig(fixed_ttl_s=10.0))
    answer = rig.do(messages.PolicyCommand, max_ttl_s=9.0)
    assert (answer.outcome, answer.reason) == ("rejected", "out_of_range")
    assert "ttl_fixed_s=10" in answer.detail
    assert rig.do(messages.PolicyCommand, max_ttl_s=10.0).outcome == "accepted"


@pytest.mark.parametrize("content", ["on", "nonsense"])
def test_where_a_switch_file_sets_the_mode_a_command_changes_nothing(
    tmp_path: Path, content: str
) -> None:
    switch = tmp_path / "switch"
    switch.write_text(content)
    rig = Rig(switch_file=switch)
    before = rig.do(messages.PolicyCommand).policy
    answer = rig.do(messages.PolicyCommand, mode="off", max_ttl_s=7.0, stage=False)
    assert (answer.outcome, answer.reason) == ("rejected", "switch_file")
    assert answer.policy == before
    switch.unlink()
    rig.engine.now_s += 2.0
    rig.engine.wake()
    assert rig.do(messages.PolicyCommand).policy == before
    assert rig.do(messages.PolicyCommand, mode="off", max_ttl_s=7.0).outcome == "accepted"


def test_a_command_that_agrees_with_the_switch_file_is_taken(tmp_path: Path) -> None:
    switch = tmp_path / "switch"
    switch.write_text("shadow\n")
    rig = Rig(switch_file=switch)
    answer = rig.do(messages.PolicyCommand, mode="shadow", max_ttl_s=7.0)
    assert answer.outcome == "accepted"
    assert answer.policy is not None
    assert (answer.policy.mode, answer.policy.max_ttl_s) == ("shadow", 7.0)


def test_a_change_that_fails_leaves_everything_as_it_was(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent_turn(rig)
    before = rig.do(messages.PolicyCommand).policy

    def fail(*_: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(rig.engine.half.pauses, "regret_s_per_block", fail)
    answer = rig.do(
        messages.PolicyCommand,
        mode="shadow",
        max_ttl_s=7.0,
        pin_budget_fraction=0.1,
        tenant_budgets=[messages.TenantBudget(None, 1, 1.0)],
    )
    assert (answer.outcome, answer.reason) == ("rejected", "internal")
    assert answer.policy == before
    assert rig.pins


def test_a_smaller_budget_ends_pins_until_it_holds(rig: Rig) -> None:
    agent_turn(rig)
    other = turn("r9", prompt(20, 500), session="other")
    rig.engine.run(other)
    pinned = rig.engine.half.pins.pinned_blocks
    assert pinned > 10
    answer = rig.do(messages.PolicyCommand, pin_budget_fraction=10 / 40)
    assert answer.outcome == "accepted"
    assert 0 < rig.engine.half.pins.pinned_blocks <= 10
    rig.do(messages.PolicyCommand, pin_budget_fraction=0.0)
    assert rig.engine.pool.references == {}


def test_mode_off_by_command_holds_nothing_and_on_again_pins(rig: Rig) -> None:
    agent_turn(rig)
    answer = rig.do(messages.PolicyCommand, mode="off")
    assert answer.policy is not None
    assert answer.policy.mode == "off"
    rig.engine.wake()
    assert rig.engine.pool.references == {}
    rig.do(messages.PolicyCommand, mode="on")
    agent_turn(rig, "r2")
    assert rig.pins


def test_a_tenant_pins_only_what_its_budget_allows(rig: Rig) -> None:
    # 8 blocks of 1000 bytes, for 10 s.
    budget = messages.TenantBudget("acme", 80_000, 1e6)
    rig.do(messages.PolicyCommand, tenant_budgets=[budget])
    agent_turn(rig, cache_salt="acme", hints={"ttl_s": 60.0})
    assert rig.left_s() == pytest.approx(10.0, abs=0.2)
    other = turn("r9", prompt(20, 500), session="other")
    other.cache_salt = "acme"
    rig.engine.run(other)
    # Nothing is left for a second one.
    assert [pin.key for pin in rig.pins] == ["r1"]
    assert rig.engine.told["r9"]["reason"] == "tenant_budget"
    # What the first does not use comes back.
    rig.do(messages.ReleaseCommand, program=ProgramKey("acme", "agent"))
    again = turn("r10", prompt(20, 600), session="third")
    again.cache_salt = "acme"
    rig.engine.run(again)
    assert [pin.key for pin in rig.pins] == ["r10"]


# -- all of them -----------------------------------------------------------------------------------


def test_commands_are_counted_and_a_failing_one_is_answered(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent_turn(rig, hints={"stage": False})

    def fail(*_: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(rig.engine.half.policy, "staged_value_s", fail)
    answer = rig.do(messages.StageCommand)
    assert (answer.outcome, answer.reason) == ("rejected", "internal")
    assert total(rig.engine, "commands|stage|rejected") == 1


def test_a_wake_is_no_turn(rig: Rig) -> None:
    rig.engine.wake()
    assert len(rig.engine.half.programs) == 0
    assert not rig.engine.busy
    assert rig.engine.pool.references == {}


def test_the_link_is_measured_anew_when_the_engine_is_idle(rig: Rig) -> None:
    request = turn("r1", prompt(30))
    rig.engine.add(request)
    rig.engine.step()
    rig.do(messages.CalibrateCommand)
    running_while_measured: list[int] = []
    submit = rig.engine.workers.submit

    def watched(step: StepOrders, now_s: float) -> None:
        if step.measure:
            running_while_measured.append(len(rig.engine.running))
        submit(step, now_s)

    rig.engine.workers.submit = watched  # type: ignore[method-assign]
    rig.engine.run()
    assert running_while_measured == [0]


def test_a_measurement_that_is_due_does_not_keep_a_paused_engine_stepping(rig: Rig) -> None:
    """vLLM's pause waits until there is nothing to do, and keeps the turns: they would never end."""
    rig.engine.add(turn("r1", prompt(30)))
    rig.engine.step()
    rig.do(messages.CalibrateCommand)
    assert not rig.engine.half.has_work()
    rig.engine.run()
    assert not rig.engine.half.has_work()


def test_a_tool_announced_to_take_long_has_the_kv_staged_before_it_is_given_up(rig: Rig) -> None:
    agent_turn(rig, hints={"stage": False})
    evictable = rig.engine.pool.get_num_free_blocks()
    # Memory is short from now on: what waits makes a pin dear.
    rig.engine.half._waiting_tokens.add("other", 10_000)
    answer = rig.do(messages.ToolCallCommand, tool="train", p50_s=120.0)
    rig.engine.half._waiting_tokens.remove("other")
    assert answer.outcome == "accepted"
    assert "offload" in answer.detail
    rig.engine.run()
    assert isinstance(rig.engine.tier, VirtualTier)
    assert rig.engine.tier.table.counts()["chunks"] == 4
    assert rig.engine.pool.get_num_free_blocks() > evictable


def test_no_command_pins_for_longer_than_the_tenants_budget(rig: Rig) -> None:
    budget = messages.TenantBudget("acme", 80_000, 1e9)
    rig.do(messages.PolicyCommand, tenant_budgets=[budget])
    agent_turn(rig, cache_salt="acme", hints={"ttl_s": 4.0})
    agent = ProgramKey("acme", "agent")
    answer = rig.do(messages.PinCommand, program=agent, ttl_s=300.0)
    assert (answer.outcome, answer.reason) == ("clipped", "tenant_budget")
    assert rig.left_s() == pytest.approx(10.0, abs=0.2)
    rig.do(messages.ToolReturnCommand, program=agent)
    assert rig.left_s() == pytest.approx(10.0, abs=0.2)
    # Decided anew, it keeps what it has paid for.
    rig.do(messages.ToolCallCommand, program=agent, tool="bash", p50_s=1.0)
    assert rig.pins


def test_a_tool_is_called_alike_by_outputs_overrides_and_announcements(rig: Rig) -> None:
    rig.do(
        messages.OverridesCommand, overrides=[override("fixed", 0.0, tool="functions.web search")]
    )
    request = turn("r1", prompt(30), session="agent")
    rig.engine.add(request)
    rig.engine.step()
    rig.do(messages.ToolCallCommand, tool="functions.web search")
    rig.engine.run()
    assert rig.engine.told["r1"]["tool"] == "web_search"
    assert rig.pins == []
