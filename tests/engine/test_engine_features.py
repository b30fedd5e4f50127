"""vLLM's features in a real engine beside kvtier: the tokens are those of plain vLLM or of a computation anew."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.engine.tiny_model import write_adapter, write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.engine.conftest import PlainVllm
    from tests.engine.engine_child import EngineChild

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(600)]

OPTIONS = {
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 8,
    "scheduling_policy": "priority",
    "scheduler_cls": "kvtier.scheduler.ProgramScheduler",
    "skip_tokenizer_init": False,
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        write_adapter(directory / name, seed)
    return {name: str(directory / name) for name in "ab"}


@pytest.fixture(scope="module")
def engine(
    start_engine: Callable[..., EngineChild],
    plain: PlainVllm,
    model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> EngineChild:
    model = tmp_path_factory.mktemp("features") / "model"
    shutil.copytree(model_dir, model)
    write_tokenizer(model)
    child = start_engine("scenarios_features", {"dram_gb": 0.25}, model=str(model), options=OPTIONS)
    child.call("ready")
    return child


def test_adapters_share_no_kv(
    engine: EngineChild, adapters: dict[str, str], plain: PlainVllm
) -> None:
    plain.check(engine.call("adapters", paths=adapters)["records"])


def test_a_grammar_is_kept_on_reloaded_kv(engine: EngineChild) -> None:
    engine.call("grammar")


@pytest.mark.parametrize("scenario", ["drafts", "siblings", "pause_and_resume"])
def test_scenario(engine: EngineChild, plain: PlainVllm, scenario: str) -> None:
    plain.check(engine.call(scenario)["records"])
