"""kvtier on the real schedulers of vLLM 0.30 to 0.33, synchronous and asynchronous."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.engine.vllm_versions import installed_version

if TYPE_CHECKING:
    from tests.engine.scenario_runner import Ask, Facts, Runner

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not installed_version(), reason="vLLM is not installed"),
]


def _assert_clean(facts: Facts) -> None:
    """Nothing leaked, nothing failed, no running request suffered for a pin, no spinning."""
    assert facts["gave_up"] is False
    assert facts["lost_blocks"] == 0
    assert facts["preempted_beside_pins"] == 0
    assert facts["worst_idle_run"] <= 1


def test_runs_the_release_it_says(runner: Runner) -> None:
    assert runner.ask("release", "sync")["version"] == runner.version


def test_pinned_turn_is_hit_after_other_traffic(ask: Ask) -> None:
    facts = ask("pin_hit")
    # 100 + 61 tokens leave 160 reusable ones, in 10 blocks.
    assert facts["with_cached_tokens"] == 160
    assert facts["counted_gpu_pin"] == 160
    assert facts["without_cached_tokens"] == 0
    assert facts["handoffs"] == 1
    assert facts["pinned"] == ["a2"]
    _assert_clean(facts["with_end"])


def test_request_starts_in_the_next_step_although_everything_is_pinned(ask: Ask) -> None:
    facts = ask("all_pinned")
    assert facts["free_before"] == 0
    assert facts["steps_to_start"] == 1
    assert facts["pressure_releases"] == 2
    _assert_clean(facts)


def test_own_pin_is_the_last_to_yield(ask: Ask) -> None:
    facts = ask("cheapest_first")
    assert facts["cached_tokens"] == 160
    assert (facts["handoffs"], facts["pressure_releases"]) == (1, 1)
    _assert_clean(facts)


def test_growing_requests_take_as_many_steps_as_without_pins(ask: Ask) -> None:
    facts = ask("growth")
    assert facts["with_steps"] == facts["without_steps"]
    assert facts["with"]["preemptions"] == 0
    _assert_clean(facts["with"])


def test_no_preemption_before_the_last_pin_is_gone(ask: Ask) -> None:
    facts = ask("growth_beyond_memory")
    assert facts["preemptions"] > 0, "the scenario must need more memory than there is"
    assert facts["done"] == [20, 20, 150, 150, 150]
    _assert_clean(facts)


def test_pins_stay_where_ending_them_would_not_help(ask: Ask) -> None:
    facts = ask("too_large_waits")
    assert facts["waited"]
    assert facts["pinned_while_waiting"] == ["A"]
    _assert_clean(facts)


def test_next_turn_replaces_the_pin(ask: Ask) -> None:
    facts = ask("superseded")
    assert facts["after_second"] == ["a2"]
    # A prompt that continues no turn may be a sub-agent's: what it did not continue may be wanted.
    assert facts["after_third"] == ["a2", "a3"]
    _assert_clean(facts)


def test_parallel_turns_of_a_session_are_all_kept(ask: Ask) -> None:
    facts = ask("parallel_turns")
    assert facts["pinned"] == ["p", "q"]
    assert facts["cached"] == {"p": 112, "q": 112}
    _assert_clean(facts)


def test_ended_program_keeps_nothing(ask: Ask) -> None:
    facts = ask("program_ended")
    assert facts["pinned"] == []
    _assert_clean(facts)


def test_reset_of_an_idle_engine_drops_pins(ask: Ask) -> None:
    facts = ask("reset_idle")
    assert facts["pinned_before"] == 2
    assert facts["succeeded"] is True
    assert facts["pinned_after"] == 0
    assert facts["reset_releases"] == 2
    _assert_clean(facts)


def test_reset_with_running_requests_drops_pins(ask: Ask) -> None:
    facts = ask("reset_running")
    assert facts["succeeded"] is True
    assert facts["pinned_after"] == 0
    assert facts["output_tokens"] == 30
    _assert_clean(facts)


def test_pause_and_clear_cache_drops_pins(ask: Ask) -> None:
    facts = ask("pause")
    assert facts["succeeded"] is True
    assert facts["lost_while_paused"] == 0
    assert facts["output_tokens"] == 5
    _assert_clean(facts)


def test_deadlines_are_kept_when_the_engine_calls(ask: Ask) -> None:
    facts = ask("ttl")
    assert facts["before_deadline"] == ["A", "B"]
    assert facts["while_idle"] == ["A", "B"]
    assert facts["at_arrival"] == ["B"]
    assert facts["in_a_step"] == []
    assert facts["ttl_releases"] == 2
    _assert_clean(facts)


def test_turn_cancelled_before_its_start_leaves_the_pin(ask: Ask) -> None:
    facts = ask("abort_waiting")
    assert facts["after_abort"] == ["a1"]
    assert facts["retry_cached_tokens"] == 96
    _assert_clean(facts)


def test_turn_cancelled_in_the_middle_keeps_nothing(ask: Ask) -> None:
    facts = ask("abort_running")
    assert facts["after_abort"] == []
    _assert_clean(facts)


def test_preempted_turn_ends_well(ask: Ask) -> None:
    facts = ask("preempted_program")
    assert facts["preemptions"] > 0, "the scenario must preempt"
    assert facts["lengths"] == {"a": 100, "b": 100}
    _assert_clean(facts)


def test_hybrid_model_is_left_alone_with_a_warning(ask: Ask) -> None:
    facts = ask("hybrid")
    assert facts["is_passive"]
    assert any("--prefix-cache-retention-interval" in text for text in facts["warnings"])
    assert facts["lost_after_turn"] == 0
    assert facts["output_tokens"] == 2


@pytest.mark.parametrize("scenario", ["reload", "reload_slowly"])
def test_staged_turn_is_reloaded_after_eviction(ask: Ask, scenario: str) -> None:
    facts = ask(scenario)
    # 160 reusable tokens hold two chunks of 64.
    assert facts["staged_chunks"] == 2
    assert facts["counted_cpu"] == 128
    assert facts["cached_tokens"] == 128
    assert facts["copies"] == {"store_ok": 1, "load_ok": 1}
    assert facts["failures"] == {}
    _assert_tier_clean(facts)


def test_failed_load_is_recomputed(ask: Ask) -> None:
    facts = ask("failed_load")
    assert facts["copies"] == {"store_ok": 1, "load_failed": 1}
    assert facts["output_tokens"] == 2
    assert facts["failures"] == {"failures|load_copy": 1}
    _assert_tier_clean(facts)


def test_failed_store_is_not_believed(ask: Ask) -> None:
    facts = ask("failed_store")
    assert facts["staged_chunks"] == 0
    assert facts["copies"] == {"store_failed": 1}
    assert facts["output_tokens"] == 2
    _assert_tier_clean(facts)


def test_abort_while_loading_gives_everything_back(ask: Ask) -> None:
    facts = ask("abort_while_loading")
    assert facts["loads_at_abort"] == 1
    assert facts["loads_after"] == 0
    assert facts["locked_chunks"] == 0
    assert facts["lost_blocks"] == 0


def test_request_waits_no_longer_than_the_copy_that_holds_its_blocks(ask: Ask) -> None:
    facts = ask("start_while_staging")
    assert facts["held_blocks"] == 16
    # The copy takes 20 steps; its result counts at the end of a step, with one more in flight.
    assert facts["steps_to_start"] <= 20 + 4
    assert facts["lost_blocks"] == 0


def test_growing_request_takes_blocks_from_staging(ask: Ask) -> None:
    facts = ask("cancelled_staging")
    assert facts["held_blocks"] == 12
    assert facts["preemptions"] == 0
    assert facts["resident_chunks"] == 0
    assert facts["open_reservations"] == 0
    assert facts["locked_chunks"] == 0
    assert facts["lost_blocks"] == 0


def test_silent_tier_keeps_no_blocks_from_a_request(ask: Ask) -> None:
    facts = ask("silent_tier")
    assert facts["held_blocks"] == 16
    assert facts["steps_to_start"] is not None


@pytest.mark.parametrize("where", ["build", "allocation"])
def test_when_kvtier_gives_up_nobody_waits_for_ever(ask: Ask, where: str) -> None:
    facts = ask(f"give_up_in_{where}")
    assert facts["gave_up"]
    assert facts["counted"] == 1
    assert facts["output_tokens"] == 5
    assert facts["copies"].get("load_ok", 0) == (1 if where == "build" else 0)
    assert facts["copies"].get("load_failed", 0) == (0 if where == "build" else 1)
    assert facts["lost_blocks"] == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_when_kvtier_gives_up_while_it_makes_room_no_block_is_lost(ask: Ask, when: str) -> None:
    facts = ask(f"give_up_{when}_room")
    assert facts["gave_up"]
    assert facts["counted"] == 1
    assert facts["free_before"] == 0
    assert facts["output_tokens"] == 5
    assert facts["lost_blocks"] == 0


def test_when_kvtier_gives_up_with_a_requests_references_they_come_back(ask: Ask) -> None:
    facts = ask("give_up_after_taking_over")
    assert facts["gave_up"]
    assert facts["pinned"] == [True]
    assert facts["output_tokens"] == 5
    assert facts["lost_blocks"] == 0


def _assert_tier_clean(facts: Facts) -> None:
    assert facts["held_after_staging"] == 0
    assert facts["locked_chunks"] == 0
    assert facts["lost_blocks"] == 0


@pytest.mark.parametrize("scenario", ["walk_pins", "walk_tier", "walk_tier_restarts"])
def test_random_walk(ask: Ask, scenario: str) -> None:
    """Each step of the walk checks all references and all KV; here, what is left at the end."""
    facts = ask(scenario)
    assert facts["internal_failures"] == 0
    assert facts["lost_blocks"] == 0
    assert facts["loads_left"] == 0
    assert facts["staging_left"] == 0
    assert facts.get("locked_chunks", 0) == 0
    assert facts.get("open_reservations", 0) == 0
    assert facts["preempted_beside_pins"] == 0
    # An answer of the tier takes up to three steps.
    assert facts["worst_idle_run"] <= (1 if scenario == "walk_pins" else 4)
    # A walk in which nothing happens checks nothing.
    assert facts["done"]["finished"] >= 10
    assert facts["hit_tokens"] > 500
    if scenario != "walk_pins":
        assert facts["copies"]["load_ok"] >= 1
        assert facts["copies"]["store_ok"] >= 5
