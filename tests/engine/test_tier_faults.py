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

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

DRAM_GB = 0.02
"""80 chunks of 256 KiB: seven of the scenarios' programs."""

SCENARIOS = {
    "strangers": set(),
    "full_of_equals": {"stage_l1_full"},
    "room_by_value": set(),
    "room_by_expired_lease": set(),
    "step_longer_than_the_timeout": set(),
    "hung": {"tier_lost", "lookup_late"},
    "hung_during_load": {"tier_lost"},
    "killed_before_store": {"tier_lost"},
    "killed_during_store": {"tier_lost"},
    "killed_between": {"tier_lost"},
    "killed_during_load": {"tier_lost"},
    "guardian_killed": {"tier_lost"},
}
"""What happens, and what is counted for it."""
NOTHING = {"strangers", "step_longer_than_the_timeout"}
"""Nothing is counted for these. For the others, what else is depends on the moment."""
AWAY = "CPU tier away, pinning only"
LONG = {"killed_during_store", "guardian_killed"}
"""The server is started anew for each that is killed, which takes half a minute on a slow machine: not in the usual run."""
LOGGED = {"guardian_killed": "starting LMCache server"}


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


@pytest.mark.parametrize(
    "scenario", [pytest.param(s, marks=[pytest.mark.long] * (s in LONG)) for s in SCENARIOS]
)
def test_scenario(engine: EngineChild, plain: PlainVllm, scenario: str) -> None:
    begin = engine.log.stat().st_size
    before = engine.call("failures", settle=False)["value"]
    plain.check(engine.call(scenario)["records"])
    after = engine.call("failures", settle=False)["value"]
    counted = {k for k, n in after.items() if n > before.get(k, 0)}
    assert counted >= SCENARIOS[scenario]
    assert scenario not in NOTHING or not counted
    log = engine.log.read_bytes()[begin:].decode(errors="replace")
    assert (AWAY in log) == ("tier_lost" in counted)
    assert LOGGED.get(scenario, "") in log
