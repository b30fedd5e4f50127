"""Engines of several processes: tensor parallel, pipeline parallel, data parallel. Half a minute each to start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.engine.conftest import PlainVllm
    from tests.engine.engine_child import EngineChild

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(600)]

SETTINGS = {"dram_gb": 0.25}


@pytest.fixture(scope="class")
def tensor_parallel(start_engine: Callable[..., EngineChild]) -> Iterator[EngineChild]:
    """Return two workers with one of the model's two KV heads each."""
    options = {"tensor_parallel_size": 2}
    child = start_engine("scenarios_turns,scenarios_ranks", SETTINGS, options=options)
    child.call("ready")
    yield child
    child.close()


@pytest.fixture(scope="class")
def replicas(start_engine: Callable[..., EngineChild]) -> Iterator[EngineChild]:
    """Return two engines behind one front end, on one CPU tier."""
    child = start_engine("scenarios_replicas", {**SETTINGS, "reload": "always"}, replicas=2)
    yield child
    child.close()


class TestTensorParallel:
    """Each rank copies its part of every chunk, and a chunk counts when all have."""

    @pytest.mark.parametrize(
        "scenario",
        [
            "pin_hit",
            "reload_after_flood",
            "reload_behind_gpu_blocks",
            "tenants",
            "preempted",
            "load_fails_on_one_rank",
            "store_fails_on_one_rank",
        ],
    )
    def test_scenario(self, tensor_parallel: EngineChild, plain: PlainVllm, scenario: str) -> None:
        plain.check(tensor_parallel.call(scenario)["records"])


class TestDataParallel:
    """Ranks share no GPU memory; what one has staged, the other loads."""

    @pytest.mark.parametrize("scenario", ["moves", "stays", "tenants"])
    def test_scenario(self, replicas: EngineChild, plain: PlainVllm, scenario: str) -> None:
        plain.check(replicas.call(scenario)["records"])


class TestPipelineParallel:
    """kvtier pins, and says why it does not stage."""

    def test_pins_work_and_the_reason_for_no_tier_is_said(
        self, start_engine: Callable[..., EngineChild], plain: PlainVllm
    ) -> None:
        engine = start_engine("scenarios_ranks", SETTINGS, options={"pipeline_parallel_size": 2})
        plain.check(engine.call("stages")["records"])
        said = engine.log.read_text(errors="replace")
        assert "--pipeline-parallel-size is 2; the CPU tier accepts 1" in said
        engine.close()

    def test_a_required_tier_is_refused_at_start(
        self, start_engine: Callable[..., EngineChild]
    ) -> None:
        engine = start_engine(
            "scenarios_ranks",
            {**SETTINGS, "tier": "require"},
            options={"pipeline_parallel_size": 2},
        )
        with pytest.raises(AssertionError, match="--pipeline-parallel-size is 2"):
            engine.call("stages")
