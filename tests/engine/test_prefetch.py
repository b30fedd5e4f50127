"""Prefetch on vLLM's real schedulers, 0.30 to 0.33, with every block's content tracked.

`test_turns.py` has it in a real engine with a real CPU tier.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.orders import Order, StepOrders
from tests.engine.vllm_versions import installed_version

if TYPE_CHECKING:
    from tests.engine.scenario_runner import Ask, Facts

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not installed_version(), reason="vLLM is not installed"),
]

STAGED_TOKENS = 128


def _assert_clean(facts: Facts) -> None:
    assert facts["lost_blocks"] == 0
    assert facts["held_blocks"] == 0
    assert facts["locked_chunks"] == 0
    assert facts["internal_failures"] == 0


def test_the_returning_turn_hits_what_was_prefetched(ask: Ask) -> None:
    facts = ask("prefetch")
    assert facts["answer"] == ["accepted", "loading"]
    assert facts["pinned_tokens"] == STAGED_TOKENS
    assert facts["cached_tokens"] == STAGED_TOKENS
    assert facts["counted"]["gpu_pin"] == STAGED_TOKENS
    assert facts["requests_loads"] == 0
    assert facts["ends"] == {"loaded": 1}
    _assert_clean(facts)


def test_an_idle_engine_goes_on_until_the_last_piece_has_come(ask: Ask) -> None:
    facts = ask("prefetch_slowly")
    assert facts["copies"]["load_ok"] == 2
    assert facts["counted"]["gpu_pin"] == STAGED_TOKENS
    assert facts["requests_loads"] == 0
    _assert_clean(facts)


def test_other_requests_start_as_soon_as_without(ask: Ask) -> None:
    facts = ask("prefetch_beside_others")
    assert facts["steps_to_start"] == 1
    assert facts["counted"]["gpu_pin"] == STAGED_TOKENS
    assert facts["preemptions"] == 0
    _assert_clean(facts)


def test_who_returns_meanwhile_waits_for_what_is_on_its_way(ask: Ask) -> None:
    facts = ask("prefetch_and_return")
    # The copies take six steps more; their results count at a step's end, with one more in flight.
    assert facts["steps_to_start"] <= 6 + 2
    assert facts["counted"]["gpu_pin"] == STAGED_TOKENS
    assert facts["requests_loads"] == 0
    assert facts["ends"] == {"returned": 1}
    _assert_clean(facts)


def test_who_returns_early_loads_the_rest(ask: Ask) -> None:
    facts = ask("prefetch_and_return_early")
    assert (facts["counted"]["gpu_pin"], facts["counted"]["cpu"]) == (64, 64)
    assert facts["cached_tokens"] == STAGED_TOKENS
    assert facts["requests_loads"] == 1
    _assert_clean(facts)


def test_a_request_that_needs_all_memory_waits_for_one_copy_at_most(ask: Ask) -> None:
    facts = ask("prefetch_under_pressure")
    assert facts["steps_to_start"] <= 8 + 3
    assert facts["copies"]["load_ok"] == 1, "nothing more was ordered"
    _assert_clean(facts)


def test_nobody_is_preempted_for_what_was_prefetched(ask: Ask) -> None:
    facts = ask("prefetch_beside_growth")
    assert facts["preemptions"] == 0
    assert facts["pressure"] == 1
    _assert_clean(facts)


def test_nothing_is_taken_from_those_who_wait_for_memory(ask: Ask) -> None:
    facts = ask("prefetch_without_memory")
    assert facts["answer"] == ["rejected", "memory"]
    assert "load_ok" not in facts["copies"]
    _assert_clean(facts)


def test_a_failed_prefetch_is_no_hit(ask: Ask) -> None:
    facts = ask("prefetch_fails")
    assert facts["pinned_after"] == 0
    assert facts["ends"] == {"copy_failed": 1}
    assert facts["counted"]["cpu"] == STAGED_TOKENS, "the request has loaded it"
    _assert_clean(facts)


def test_a_reset_meanwhile_succeeds_and_gives_no_block_away_too_early(ask: Ask) -> None:
    facts = ask("prefetch_and_reset")
    assert facts["succeeded"] is True
    assert facts["in_flight"] == 2
    assert facts["ends"] == {"reset": 1}
    _assert_clean(facts)


def test_when_kvtier_gives_up_meanwhile_no_block_is_given_away_too_early(ask: Ask) -> None:
    facts = ask("prefetch_and_give_up")
    assert facts["written"] == facts["missing_at_once"] == 8
    assert facts["output_tokens"] == [30, 30]
    assert facts["lost_blocks"] == 0


def test_vllms_events_tell_nothing_false(ask: Ask) -> None:
    facts = ask("prefetch_beside_events")
    assert facts["events"] == []
    assert facts["events_on"] is True
    assert facts["counted"]["gpu_pin"] == STAGED_TOKENS
    _assert_clean(facts)


@pytest.mark.parametrize("scenario", ["walk_prefetch", "walk_prefetch_restarts"])
def test_random_walk(ask: Ask, scenario: str) -> None:
    """Each step of the walk checks all references and all KV; here, what is left at the end."""
    facts = ask(scenario)
    assert facts["internal_failures"] == 0
    assert facts["lost_blocks"] == 0
    assert facts["loads_left"] == facts["staging_left"] == facts["prefetches_left"] == 0
    assert facts["locked_chunks"] == facts["open_reservations"] == 0
    assert facts["preempted_beside_pins"] == 0
    # Requests wait for copies, answers, and for pieces of staging that hold their blocks.
    assert facts["worst_idle_run"] <= 10
    # A walk in which nothing happens checks nothing.
    assert facts["done"]["finished"] >= 30
    assert facts["prefetched_tokens"] > 500
    assert facts["prefetch_ends"]["prefetch_ends|loaded"] >= 5


def test_replays_worker_tells_vllm_nothing_of_a_prefetch() -> None:
    from kvtier.replay.link import Link  # noqa: PLC0415 - the worker needs vLLM
    from kvtier.replay.worker import VirtualWorker  # noqa: PLC0415

    machine: Any = SimpleNamespace(block_bytes=100)
    worker = VirtualWorker(machine, Link(1e6, 0.0), None)
    loads = [
        Order(i, "load", request_id, (0, 1), [[7]], 2, 0, generation, 9.0)
        for i, request_id, generation in ((1, "", "one"), (2, "r", "one"), (3, "", ""))
    ]
    worker.submit(SimpleNamespace(orders=StepOrders(None, loads)), 0.0)
    output, _ = worker.collect(1.0)
    assert output.finished_recving == {"r"}
    assert output.invalid_block_ids == set()
    report = output.kv_connector_worker_meta
    assert {result.order_id: result.ok for result in report.results} == {1: True, 2: True, 3: False}
