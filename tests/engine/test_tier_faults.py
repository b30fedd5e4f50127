"""A tier that is full, dies, hangs or comes back costs time, never tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kvtier.assembly import server_spec
from kvtier.config import Settings
from kvtier.supervisor import ensure_server
from tests.engine.conftest import GRACE_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.engine.conftest import PlainVllm
    from tests.engine.engine_child import EngineChild

pytestmark = pytest.mark.engine

DRAM_GB = 0.02
"""80 chunks of 256 KiB: seven of the scenarios' programs."""

SCENARIOS = [
    "strangers",
    "full_of_equals",
    "room_by_value",
    "room_by_expired_lease",
    "step_longer_than_the_timeout",
    "hung",
    "hung_during_load",
    "killed_before_store",
    "killed_during_store",
    "killed_between",
    "killed_during_load",
    "guardian_killed",
]


@pytest.fixture(scope="module")
def engine(
    start_engine: Callable[..., EngineChild],
    run_dir: Path,
    plain: PlainVllm,
) -> EngineChild:
    settings = {"dram_gb": DRAM_GB, "server_grace_s": GRACE_S}
    spec = server_spec(Settings.load({f"kvtier.{k}": v for k, v in settings.items()}, {}), run_dir)
    # These tests kill the server more often than a guardian puts up with.
    with ensure_server(replace(spec, max_starts_per_minute=1000), run_dir=run_dir, owner="tests"):
        child = start_engine("scenarios_faults", settings)
        child.call("ready")
    return child


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(engine: EngineChild, plain: PlainVllm, scenario: str) -> None:
    plain.check(engine.call(scenario)["records"])
