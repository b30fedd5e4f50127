"""kvtier's invariants hold in random lives of a real scheduler; and a defect that is planted is found.

One child process does it all: importing vLLM takes seconds, and lives repeat only where strings hash the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine.vllm_versions import REPO, environment, installed_version
from tests.model.__main__ import ENVIRONMENT
from tests.model.actions import ACTIONS
from tests.model.outcome import Outcome, Run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not installed_version(), reason="vLLM is not installed"),
]

TRANSITIONS = 12_000
SEED = 20261122
EXAMPLES = 30
"""Lives whose events hypothesis chooses: seconds."""
DEFECTS = {
    "lost_unpin": (0, r"^Broken: 1 .*references"),
    "double_free": (0, r"^Broken: 1 .*references"),
    "store_believed_too_early": (0, r"^Broken: 3: .*tier does not say so"),
    "ended_before_commit": (0, r"^Broken: 3: given up as staged"),
    "failed_store_committed": (3, r"^Broken: 3: .*other KV"),
    "budget_off_by_one": (11, r"^Broken: .*5: 2 of 1 blocks"),
    "stale_program_table": (0, r"^Broken: 7: the picture"),
    "forgotten_chains": (0, r"^Broken: 7: .*_chains"),
    "evicted_chunks_remembered": (7, r"^Broken: 7: the server .*_sizes"),
    "lost_unlock": (0, r"^Broken: 1: left over .*locked_chunks"),
    "lost_wakeup": (0, r"^Broken: 1: left over .*staging jobs"),
    "older_waits_for_ever": (0, r"^Broken: 4: .*computed nothing"),
    "cancelled_store_committed": (3, r"^Broken: 3: .*other KV"),
    "evicted_while_read": (3, r"^Broken: kvtier has failed"),
    "confirmed_for_ever": (16, r"^Broken: 3: .*tier does not say so"),
    "eviction_unnoticed": (7, r"^Broken: 3: .*tier does not say so"),
    "found_missing_unnoticed": (17, r"^Broken: 3: .*tier does not say so"),
    "swallowed_worker_error": (3, r"^Broken: 3: .*other KV"),
    "swallowed_prefetch_error": (102, r"^WrongKVError"),
    "tenant_charged_too_little": (13, r"^Broken: 5: tenant"),
    "tenant_not_charged": (13, r"^Broken: 5: tenant"),
    "tier_lost_unnoticed": (1, r"^Broken: 3: .*tier does not say so"),
    "waits_for_lost_tier": (18, r"calm steps: .*WAITING"),
    "wrong_adapter_key": (0, r"^WrongKVError|^Broken: 3: .*other KV"),
    "written_blocks_given_away": (14, r"^WrongKVError"),
    "wrong_tenant_key": (0, r"^WrongKVError|^Broken: 3: .*other KV"),
    "missed_reset": (0, r"^WrongKVError"),
}
"""Each planted defect, the life in which it shows soon, and what is said then."""


def check(*arguments: str) -> dict[str, Any]:
    """Run the checker; what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.model", "--json", *arguments],
        cwd=REPO,
        env={**os.environ, **environment(installed_version()), **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert lines, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(lines[-1])
    return facts


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    planted = [f"{name}:{life}" for name, (life, _) in DEFECTS.items()]
    chosen = ["--examples", str(EXAMPLES), "--planted", "lost_wakeup"]
    return check("--steps", str(TRANSITIONS), "--seed", str(SEED), *chosen, "--defects", *planted)


def test_no_invariant_breaks(facts: dict[str, Any]) -> None:
    assert facts["outcome"]["broken"] == {}
    assert facts["outcome"]["transitions"] >= TRANSITIONS


def test_engines_of_all_kinds_have_lived(facts: dict[str, Any]) -> None:
    kinds = facts["outcome"]["kinds"]
    drawn = {"sync", "async", "fcfs", "priority", "vllm_scheduler", "by_program"}
    drawn |= {"runner_v1", "runner_v2"}
    assert drawn | {"one_priority", "priorities", "backfill_0", "backfill_1"} == kinds.keys()


def test_everything_that_may_happen_has_happened(facts: dict[str, Any]) -> None:
    outcome = facts["outcome"]
    assert ACTIONS.keys() <= outcome["happened"].keys()
    assert outcome["preemptions"] > 0
    seen = outcome["seen"]
    assert seen["prefetched_tokens"] > 0
    assert seen["prompt_tokens|cpu"] > 0
    assert seen["prompt_tokens|gpu_pin"] > 0
    assert seen["failures|tier_lost"] > 0


@pytest.mark.parametrize("defect", sorted(DEFECTS))
def test_a_planted_defect_is_caught(facts: dict[str, Any], defect: str) -> None:
    found = facts["defects"][defect]
    assert found["caught"]
    assert re.search(DEFECTS[defect][1], found["by"])


def test_no_invariant_breaks_whatever_hypothesis_chooses(facts: dict[str, Any]) -> None:
    assert facts["machine"]["broken"] == []
    assert facts["machine"]["transitions"] > 50 * EXAMPLES


def test_hypothesis_makes_what_breaks_a_life_short(facts: dict[str, Any]) -> None:
    said, *example = facts["planted"]["broken"]
    assert re.search(DEFECTS["lost_wakeup"][1], said)
    happens = [line for line in example if line.startswith("state.happens")]
    # Somebody comes, and all that is under way is to end.
    assert re.findall(r"name='(\w+)'", "".join(happens)) == ["arrive", "calm"]
    assert not any("state.steps" in line for line in example)


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    lived: list[int] = []

    def live(seed: int, number: int) -> Outcome:
        lived.append(number)
        return Outcome(1, 100, Counter(step=seed), broken={1: "why"} if number == 1 else {})

    for transitions in (300, 500):
        run = Run(7, tmp_path / "run.json", live)
        run.until(transitions)
    assert lived == [0, 1, 2, 3, 4]
    assert run.outcome.happened == {"step": 35}
    assert run.outcome.broken == {1: "why"}
