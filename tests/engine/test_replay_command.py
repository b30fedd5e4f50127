"""`kvtier replay` as a user runs it, on vLLM's own scheduler."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
CONTRACT = {
    *("policy", "programs", "completed", "mean_jct_s", "p50_jct_s", "p95_jct_s", "p99_jct_s"),
    *("mean_ttft_s", "p99_ttft_s", "max_ttft_s", "preemptions", "gpu_hit_tokens"),
    *("cpu_hit_tokens", "recomputed_tokens", "steps"),
}
# Two programs of up to 20,000 tokens, each of which has the machine for itself. GPU memory holds one.
WORDS = (
    *("synthetic:swe-bench", "--programs", "2", "--rate", "0.0005"),
    *("--model", "smollm2-135m", "--gpu-kv-gb", "0.8", "--dram-gb", "2"),
    *("--max-input-tokens", "20000", "--policy", "vllm-lru,kvtier,ideal", "--no-wall-clock"),
)


def replay(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvtier.cli", "replay", *words],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_a_replay_is_shown_written_and_the_same_again(tmp_path: Path) -> None:
    json_file, html_file = tmp_path / "out.json", tmp_path / "out.html"
    done = replay(*WORDS, "--json", str(json_file), "--html", str(html_file))
    assert done.returncode == 0, done.stderr
    assert "job completion, mean (s)" in done.stdout
    # Progress, and nothing of what vLLM has to say.
    assert set(done.stderr.splitlines()) == {
        f"{policy}: {what}"
        for policy in ("vllm-lru", "kvtier", "ideal")
        for what in ("replaying 2 programs", "2 programs have ended")
    }
    report = json.loads(json_file.read_text())
    rows: dict[str, dict[str, Any]] = {row["policy"]: row for row in report["results"]}
    assert list(rows) == ["vllm-lru", "kvtier", "ideal"]
    for row in rows.values():
        assert set(row) >= CONTRACT
        assert (row["programs"], row["completed"]) == (2, 2)
        assert row["mean_jct_s"] > 0
        assert row["steps"] > 0
        # Nobody disturbs anybody.
        assert row["p99_slowdown"] == pytest.approx(1.0, rel=0.02)
    # With memory for all, a program alone takes what the roofline says, and computes nothing twice.
    assert rows["ideal"]["p99_slowdown"] == pytest.approx(1.0, rel=1e-6)
    assert rows["ideal"]["recomputed_tokens"] == 0
    assert rows["ideal"]["preemptions"] == 0
    assert any(key.startswith("decisions|") for key in rows["kvtier"]["counters"])
    assert "Programs over time" in html_file.read_text()

    again = tmp_path / "again.json"
    assert replay(*WORDS, "--jobs", "2", "--json", str(again)).returncode == 0
    assert again.read_bytes() == json_file.read_bytes()
