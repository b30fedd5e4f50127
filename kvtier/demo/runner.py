"""Runs the demo's arms one after the other, each on servers of its own."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtier.demo.arms import (
    AGING_S,
    AGING_SHARE,
    Arm,
    EngineConfig,
    engine_command,
    engine_environment,
    kvtier_transfer,
    stock_lmcache_command,
    stock_transfer,
)
from kvtier.demo.driver import ArmRun, Driver
from kvtier.demo.report import ArmResult, job_completion_s, read_decisions
from kvtier.demo.servers import ServerGroup, free_ports
from kvtier.server.launch import LOOPBACK, Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from kvtier.demo.progress import DemoProgress
    from kvtier.demo.workload import Workload

# How often a running arm looks whether its servers still live.
_WATCH_S = 0.5
_TIER_READY_GAUGE = "vllm:kvtier_tier_ready"


@dataclass(frozen=True, slots=True)
class DemoRun:
    """What to run, and the directory for logs and run-time files."""

    workload: Workload
    engine: EngineConfig
    arms: Sequence[Arm]
    work_dir: Path


def run_arms(run: DemoRun, progress: DemoProgress) -> list[ArmResult]:
    """Run every arm, kvtier's with a patience that suits the machine: see `aging_s`.

    Raises:
        ServerError: a server did not start, or ended while the programs ran.
        WorkError: a server did other work than recorded.
    """
    results: list[ArmResult] = []
    for arm in run.arms:
        results.append(_run_arm(run, arm, aging_s(results), progress))
    return results


def aging_s(before: Sequence[ArmResult]) -> float:
    """How long kvtier may let new programs wait, seconds.

    No turn is to wait for longer than the longest did on plain vLLM, where those that return wait longest. How long that
    is depends on the machine: a number of seconds that suits one lets every program age, or none, on another.

    Args:
        before: The arms that have run.
    """
    plain = [
        turn.ttft_s for result in before if result.arm is Arm.PLAIN for turn in result.run.turns
    ]
    # 0 would be: never.
    return max(0.1, round(AGING_SHARE * max(plain), 1)) if plain else AGING_S


def _run_arm(run: DemoRun, arm: Arm, patience_s: float, progress: DemoProgress) -> ArmResult:
    work_dir = run.work_dir / arm.value
    work_dir.mkdir()
    decision_log = work_dir / "decisions.jsonl"
    env = engine_environment(run.engine)
    # A private run directory: kvtier's LMCache server is this arm's alone.
    run_files = run.work_dir / "run"
    run_files.mkdir(mode=0o700, exist_ok=True)
    env["KVTIER_RUN_DIR"] = str(run_files)

    started_s = time.monotonic()
    with ServerGroup(work_dir) as servers:
        transfer: dict[str, object] | None = None
        if arm is Arm.STOCK:
            transfer = stock_transfer(_start_stock_lmcache(run.engine, servers, arm, progress))
        elif arm is Arm.KVTIER:
            transfer = kvtier_transfer(run.engine, decision_log, patience_s)
        (port,) = free_ports(1)
        url = f"http://{LOOPBACK}:{port}"
        command = engine_command(run.engine, port, transfer)
        _start_and_wait(servers, arm, "vLLM", command, env, f"{url}/health", progress)
        start_s = time.monotonic() - started_s

        progress.running(arm)
        driver = Driver(
            url,
            run.workload,
            lambda record, last: progress.turn(arm, record, last=last),
            # The stock arm's LMCache server was awaited too.
            ready_gauge=_TIER_READY_GAUGE if arm is Arm.KVTIER else None,
        )
        arm_run = asyncio.run(_run_watched(driver, servers.check))
    result = ArmResult(
        arm,
        arm_run,
        start_s,
        read_decisions(decision_log),
        aging_s=patience_s if arm is Arm.KVTIER else None,
    )
    jct_s = job_completion_s(arm_run.turns)
    progress.finished(arm, sum(jct_s.values()) / len(jct_s))
    return result


def _start_stock_lmcache(
    engine: EngineConfig, servers: ServerGroup, arm: Arm, progress: DemoProgress
) -> int:
    """Start the stock arm's ``lmcache server`` and return its port."""
    port, http_port, metrics_port = free_ports(3)
    endpoint = Endpoint(port, http_port, f"kvtier_demo_{os.getpid()}")
    command = stock_lmcache_command(engine, endpoint, metrics_port)
    env = engine_environment(engine) | {"OMP_NUM_THREADS": "1"}
    health = f"http://{LOOPBACK}:{http_port}/healthcheck"
    _start_and_wait(servers, arm, "LMCache", command, env, health, progress)
    return port


def _start_and_wait(
    servers: ServerGroup,
    arm: Arm,
    name: str,
    command: Sequence[str],
    env: Mapping[str, str],
    health_url: str,
    progress: DemoProgress,
) -> None:
    progress.starting(arm, name)
    server = servers.start(name, command, env)
    server.wait_healthy(health_url, lambda waited_s: progress.waiting(arm, name, waited_s))


async def _run_watched(driver: Driver, check: Callable[[], None]) -> ArmRun:
    """Run the programs; end early with the reason when a server has ended."""
    running = asyncio.create_task(driver.run())
    try:
        while not (await asyncio.wait({running}, timeout=_WATCH_S))[0]:
            check()
        if running.exception() is not None:
            # A server that died is the cause of a broken connection, so it is named first.
            check()
        return await running
    finally:
        running.cancel()
