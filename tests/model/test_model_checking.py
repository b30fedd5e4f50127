"""kvtier's invariants hold in random lives of a real scheduler; and a defect that is planted is found.

One child process does it all: importing vLLM takes seconds, and lives repeat only where strings hash the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine.vllm_versions import REPO, environment, installed_version
from tests.model.__main__ import ENVIRONMENT
from tests.model.plan import ACTIONS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not installed_version(), reason="vLLM is not installed"),
]

TRANSITIONS = 12_000
SEED = 20261122
DEFECTS: dict[str, tuple[int, str]] = {}
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
    return check("--steps", str(TRANSITIONS), "--seed", str(SEED), "--defects", *planted)


def test_no_invariant_breaks(facts: dict[str, Any]) -> None:
    assert facts["outcome"]["broken"] == {}
    assert facts["outcome"]["transitions"] >= TRANSITIONS


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


def test_a_run_goes_on_where_it_was_stopped_and_a_life_repeats(tmp_path: Path) -> None:
    """Of two runs, one in two pieces, all is the same."""
    state = tmp_path / "run.json"
    check("--steps", "1500", "--seed", "3", "--state", str(state))
    pieces = check("--steps", "4500", "--seed", "3", "--state", str(state))
    whole = check("--steps", "4500", "--seed", "3")
    assert pieces["outcome"] == whole["outcome"]
