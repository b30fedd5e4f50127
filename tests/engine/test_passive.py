"""Pins without a CPU tier, and shadow mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.engine.conftest import PlainVllm
    from tests.engine.engine_child import EngineChild

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("files")
    return {"switch_file": str(directory / "mode"), "decision_log": str(directory / "log.jsonl")}


@pytest.fixture(scope="module")
def engine(
    start_engine: Callable[..., EngineChild],
    files: dict[str, str],
    plain: PlainVllm,
) -> EngineChild:
    return start_engine("scenarios_passive", {"tier": "off", "mode": "shadow", **files})


def test_shadow(engine: EngineChild, plain: PlainVllm, files: dict[str, str]) -> None:
    answer = engine.call("shadow", decision_log=files["decision_log"])
    plain.check(answer["records"])


@pytest.mark.parametrize("scenario", ["pin_only", "expired"])
def test_without_a_tier(
    engine: EngineChild, plain: PlainVllm, files: dict[str, str], scenario: str
) -> None:
    plain.check(engine.call(scenario, switch_file=files["switch_file"])["records"])


def test_no_server_was_started(engine: EngineChild, run_dir: Path) -> None:
    assert engine.process.poll() is None
    assert not (run_dir / "kvtier.json").exists()
