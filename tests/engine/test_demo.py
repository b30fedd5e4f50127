"""A tiny demo on real servers: every arm does the recorded work, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from importlib import util
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.demo.arms import AGING_SHARE
from kvtier.setup.model import is_ready, model_dir
from tests.engine.short_model import write_short_model

SHM = Path("/dev/shm")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(not is_ready(model_dir()), reason="no model: run `make setup` first"),
]


def own_processes() -> set[int]:
    """Running children of this test, at any depth."""
    return {
        child.pid
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE
    }


def left_of_the_run(work_dir: Path) -> list[str]:
    """Processes that detached themselves, and shared memory."""
    left = [path.name for path in SHM.iterdir() if f"kvtier_demo_{os.getpid()}" in path.name]
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("KVTIER_RUN_DIR", "").startswith(str(work_dir)):
                left.append(" ".join(process.cmdline()))
    return left


def run_demo(tmp_path: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(
        app,
        [
            *("demo", "--programs", "2", "--turns", "2", "--work-dir", str(tmp_path / "work")),
            *("--json", str(tmp_path / "demo.json"), "--html", str(tmp_path / "demo.html")),
            *options,
        ],
    )
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads((tmp_path / "demo.json").read_text())
    return report


@pytest.mark.parametrize("layers", [3, pytest.param(None, marks=pytest.mark.long)])
def test_every_arm_does_the_same_work_and_reuses_what_it_can(
    tmp_path: Path, layers: int | None
) -> None:
    before = own_processes()
    model = model_dir()
    if layers is not None:
        model = tmp_path / "model"
        write_short_model(model_dir(), model, layers)
    # One program fits at a time. The first one's tool takes 9 s, and the second one comes meanwhile.
    report = run_demo(
        tmp_path,
        *("--size", "small", "--seed", "25", "--kv-tokens", "1152"),
        *("--cpu-tier-gib", "0.5", "--model", str(model)),
    )
    assert report["config"]["size"] == "small"
    assert own_processes() <= before
    assert left_of_the_run(tmp_path) == []

    assert report["same_work"] is True
    rows = {row["policy"]: row for row in report["results"]}
    assert list(rows) == ["vllm-lru", "offload-lru", "kvtier"]
    longest_s = rows["vllm-lru"]["max_ttft_s"]
    assert rows["kvtier"]["aging_s"] == pytest.approx(AGING_SHARE * longest_s, abs=0.06)
    for row in rows.values():
        assert row["work_digest"] == report["work_digest"]
        assert (row["programs"], row["completed"], len(row["turns"])) == (2, 2, 4)
        assert row["steps"] > 0
        assert row["prompt_tokens"] == sum(turn["prompt_tokens"] for turn in row["turns"])
        assert row["prompt_tokens"] == (
            row["gpu_hit_tokens"] + row["cpu_hit_tokens"] + row["computed_tokens"]
        )
        assert row["gpu_hit_tokens"] == sum(turn["gpu_tokens"] for turn in row["turns"])
        assert row["cpu_hit_tokens"] == sum(turn["cpu_tokens"] for turn in row["turns"])
        for turn in row["turns"]:
            assert turn["arrival_s"] < turn["first_token_s"] < turn["end_s"]
    assert rows["vllm-lru"]["cpu_hit_tokens"] == 0
    assert rows["offload-lru"]["cpu_hit_tokens"] > 0
    assert {entry["event"] for entry in rows["kvtier"]["decisions"]} >= {"pause"}

    page = (tmp_path / "demo.html").read_text()
    for turn in rows["kvtier"]["turns"]:
        assert turn["program"] in page


def test_a_server_that_cannot_start_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_bytes((model_dir() / name).read_bytes())
    before = own_processes()
    result = CliRunner().invoke(
        app, ["demo", "--arms", "plain", "--turns", "1", "--model", str(tmp_path / "model")]
    )
    assert result.exit_code == 1
    assert "vLLM ended with exit status" in result.output
    assert own_processes() <= before
