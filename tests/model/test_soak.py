"""A few minutes of an overloaded engine in an unreliable world leave nothing behind; hours of it: `bench/soak.py`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from bench.soak import faults, judge
from tests.engine.vllm_versions import REPO, environment, installed_version

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not installed_version(), reason="vLLM is not installed"),
]


def test_a_short_soak_leaves_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "bench/soak.py", "--hours", "0.1"],
        cwd=REPO,
        env={**os.environ, **environment(installed_version())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout)
    assert facts["left"] == {}
    assert facts["wrong"] == []
    assert facts["turns"] > 100
    assert facts["preemptions"] > 0
    happened = facts["happened"]
    assert {"abort", "reset_all", "lose_tier", "command", "flood"} <= happened.keys()
    seen = facts["seen"]
    assert seen["prompt_tokens|cpu"] > 0
    assert seen["failures|tier_lost"] == 2


def periods(**grows: float) -> list[Any]:
    """Eight hours; what is named grows by so much of itself over them."""
    chance = random.Random(1)
    made = []
    for i in range(160):
        asked, programs = chance.gauss(40, 2), round(chance.gauss(60, 8))
        base = {
            # Longer answers bring more tokens.
            "tokens": chance.gauss(8000, 100) * asked / 40,
            "rss_bytes": 600e6 + chance.gauss(0, 1e5),
            "objects": 670_000 + chance.gauss(0, 300),
            "allocated": 2_480_000 + chance.gauss(0, 2000),
            "remembered": 15_000 + 50 * programs + chance.gauss(0, 200),
        }
        grown = {name: value * (1 + grows.get(name, 0.0) * i / 160) for name, value in base.items()}
        ended = {"turns": 500, "asked": 500 * asked, "prompts": 500 * chance.gauss(450, 10)}
        made.append(SimpleNamespace(**grown, **ended, programs=programs))
    return made


def test_what_only_goes_up_and_down_is_no_fault() -> None:
    assert faults(judge(periods(), 20.0), {}) == []


@pytest.mark.parametrize(
    ("grows", "said"),
    [
        ({"rss_bytes": 0.01}, "rss_bytes may grow"),
        ({"objects": 0.01}, "objects may grow"),
        ({"allocated": 0.01}, "allocated may grow"),
        ({"remembered": 0.05}, "what kvtier remembers grows"),
        ({"tokens": -0.05}, "throughput has changed by -"),
        ({"tokens": 0.05}, "throughput has changed by +"),
    ],
)
def test_what_changes_from_hour_to_hour_is_a_fault(grows: dict[str, float], said: str) -> None:
    (found,) = faults(judge(periods(**grows), 20.0), {})
    assert found.startswith(said)


def test_what_is_left_is_a_fault() -> None:
    assert faults({}, {"locks": 1}) == ["left at the end: {'locks': 1}"]
