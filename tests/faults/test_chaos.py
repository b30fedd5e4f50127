"""`kvtier chaos` on `kvtier serve` with traffic: real vLLM, LMCache and control server."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.operator.chaos_faults import FAULTS
from tests.engine.served import Served, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(900)]


@contextlib.contextmanager
def traffic(served: Served) -> Iterator[list[str]]:
    """One small turn after the other; what went wrong with them."""
    problems: list[str] = []
    stop = threading.Event()

    def run() -> None:
        turn = 0
        while not stop.wait(0.1):
            turn += 1
            try:
                served.turn(f"traffic-{turn}", 130, ttl_s=0.0)
            except Exception as error:  # noqa: BLE001 - the test tells
                problems.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run, name="traffic")
    thread.start()
    try:
        yield problems
    finally:
        stop.set()
        thread.join()


def test_a_deployment_recovers_from_every_fault(
    model_dir: Path, run_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "kvtier.cli", "chaos", "--test-deployment", "--json"]
    command += ["--hold", "8s", "--wait", "3m", "--run-dir", str(run_dir)]
    with serving(model_dir, run_dir, tmp_path) as served:
        with traffic(served) as problems:
            done = subprocess.run(
                [*command, "--metrics", f"{served.url}/metrics"],
                capture_output=True,
                text=True,
                check=False,
            )
        assert problems == [], "no request fails for kvtier's sake"
        reports: list[dict[str, Any]] = json.loads(done.stdout)["faults"]
        for report in reports:
            print(report["fault"], report["recovered_s"], report["failures"])  # noqa: T201
        assert done.returncode == 0, done.stdout
        assert [report["fault"] for report in reports] == list(FAULTS)
        by_name = {report["fault"]: report for report in reports}
        for fault in ("lmcache-kill", "lmcache-restart", "lmcache-stop", "guardian-kill"):
            assert by_name[fault]["failures"]["tier_lost"] >= 1
        for fault in ("control-kill", "control-stop"):
            assert by_name[fault]["failures"] == {}
        # And the same engine stages and reloads as before.
        served.turn("after")
        while served.program("after").cpu_tokens < 640:
            pass
        served.client.release_program("after")
        for i in range(4):
            served.turn(f"other-{i}", 1000, ttl_s=0.0)
        before = served.metric("prompt_tokens_total", source="cpu")
        served.turn("after", 64)
        assert served.metric("prompt_tokens_total", source="cpu") - before >= 640
