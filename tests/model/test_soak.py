"""A few minutes of an overloaded engine in an unreliable world leave nothing behind; hours of it: `bench/soak.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.engine.vllm_versions import REPO, environment, installed_version

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not installed_version(), reason="vLLM is not installed"),
]


def test_a_short_soak_leaves_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "bench/soak.py", "--hours", "0.2"],
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
