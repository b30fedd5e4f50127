"""Turns of programs give the tokens of plain vLLM, whatever kvtier does with their KV meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.engine.conftest import PlainVllm
    from tests.engine.engine_child import EngineChild

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SCENARIOS = [
    "pin_hit",
    "without_a_pin_the_flood_evicts",
    "reload_after_flood",
    "reload_behind_gpu_blocks",
    "reload_of_spoilt_bytes",
    "superseded",
    "branched",
    "handed_over",
    "parallel_turns",
    "preempted",
    "grows_into_pins",
    "starts_at_once_on_pinned_memory",
    "aborted_while_running",
    "aborted_while_waiting",
    "aborted_before_the_first_step",
    "aborted_while_loading",
    "cancelled_staging",
    "waits_for_staging",
    "failed_load",
    "failed_load_behind_gpu_blocks",
    "failed_store",
    "tenants",
    "pressure_of_many",
    "prefetched",
    "not_prefetched",
    "prefetched_behind_gpu_blocks",
    "prefetched_in_pieces",
    "returns_meanwhile",
    "prefetch_of_spoilt_bytes",
    "failed_prefetch",
    "reset_meanwhile",
    "others_meanwhile",
]


@pytest.fixture(scope="module")
def switch_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("switch") / "mode"


@pytest.fixture(scope="module")
def engine(
    start_engine: Callable[..., EngineChild],
    switch_file: Path,
    plain: PlainVllm,
) -> EngineChild:
    child = start_engine(
        "scenarios_turns,scenarios_mishaps,scenarios_prefetch,scenarios_recorded",
        {"dram_gb": 0.25, "switch_file": str(switch_file)},
    )
    child.call("ready")
    return child


def test_live_equals_replay(engine: EngineChild, plain: PlainVllm) -> None:
    """The first test: the tape has to begin with the engine's first step."""
    answer: dict[str, Any] = engine.call("live_equals_replay")
    told = answer["value"]
    assert told["same_steps"]
    assert told["same_answers"]
    # Actions, reasons, TTLs and costs, to the last digit.
    assert told["replayed"] == told["live"]
    assert told["clock_left"] == 0
    # The run had some of everything.
    assert told["answers"] == ["commit", "lookup", "reserve"]
    entries = [(event, entry) for event, _, _, entry in told["live"]]
    assert {entry["cause"] for event, entry in entries if event == "release"} >= {
        *("handoff", "pressure", "reset", "ttl")
    }
    assert {entry["action"] for event, entry in entries if event == "pause"} >= {"pin", "offload"}
    assert "reload" in [entry["action"] for event, entry in entries if event == "return"]
    assert len({entry["ttl_s"] for event, entry in entries if event == "pause"}) > 5
    plain.check(answer["records"])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(engine: EngineChild, plain: PlainVllm, scenario: str) -> None:
    answer = engine.call(scenario)
    plain.check(answer["records"])
    if answer["value"]:
        # Times, which are not judged.
        print(f"{scenario}: {answer['value']}")  # noqa: T201


@pytest.mark.parametrize(
    ("mode", "chunks"), [("always", 0), ("first_k", 3), ("first_k", 1), ("never", 0)]
)
def test_staged_evicted_reloaded(
    engine: EngineChild, plain: PlainVllm, mode: str, chunks: int
) -> None:
    plain.check(engine.call("reload", mode=mode, chunks=chunks)["records"])


def test_bad_input_is_counted_and_harmless(engine: EngineChild, plain: PlainVllm) -> None:
    answer: dict[str, Any] = engine.call("bad_input")
    assert answer["value"]["uncounted"] == []
    plain.check(answer["records"])


def test_live_switch(engine: EngineChild, plain: PlainVllm, switch_file: Path) -> None:
    plain.check(engine.call("switched_off", switch_file=str(switch_file))["records"])
