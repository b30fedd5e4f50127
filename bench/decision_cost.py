"""What kvtier costs vLLM's scheduler: per step, and per finished turn.

    python bench/decision_cost.py [--json FILE] [--programs 200] [--context-tokens 100000]

Runs vLLM's real scheduler in virtual time with agent programs of long contexts, three times: without
a connector, with kvtier pinning only, and with kvtier and a CPU tier. The tier is a stand-in whose
time is taken off: in production it is another process. Block hashes are synthetic. In the runs with
kvtier each hook is timed, so a step's time splits exactly into kvtier's and the scheduler's own. Two
things that hooks do count as the scheduler's, as it would do them without kvtier: allocations that are
tried again, and vLLM's own freeing of blocks, which pins only put off. Garbage collection is off.

Aims: kvtier under 5 % of an engine's step (taken as 20 ms, a decode step of a mid-size model), a
finished turn under 1 ms. They are printed, not enforced: the machine decides. kvtier's part of the
scheduler's own time is told too; without a connector that time is spent on other steps, as what was
evicted is computed again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.agent_load import Agents, Load
from bench.hooks import HOOKS
from tests.engine.engine_spec import BLOCK_TOKENS, EngineSpec
from tests.engine.scheduler_harness import STEP_S, Drive, Engine
from tests.engine.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from collections.abc import Callable

AIM_SHARE = 0.05
AIM_FINISHED_US = 1000.0
CALIBRATION_CALLS = 10_000
CHUNK_TOKENS = 256
"""The default on GPUs."""


class Timers:
    """Seconds spent in kvtier's hooks, by hook, one entry a call, less the timer's own."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = defaultdict(list)
        self.total_s = 0.0
        self._depth = 0
        self._excluded_s = 0.0
        self._is_excluding = False
        self._own_s = 0.0
        self._calibrate()

    def wrap(self, owner: Any, name: str) -> None:
        """Time a method of `owner`; a hook inside a hook is counted once."""
        setattr(owner, name, self._timed(name, getattr(owner, name)))

    def exclude(self, owner: Any, name: str) -> None:
        """Take the time of a method that hooks call off theirs."""
        setattr(owner, name, self._excluded(getattr(owner, name)))

    def wrap_make_room(self, half: Any) -> None:
        """Time `make_room` without the allocations that it retries: those are the scheduler's."""
        make_room = half.make_room

        def without_retries(request: Any, retry: Callable[[], Any], need: Callable[[], int]) -> Any:
            return make_room(request, self._excluded(retry), need)

        half.make_room = self._timed("make_room", without_retries)

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        calls = self.calls[name]

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            excluded_s = self._excluded_s
            started_s = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - started_s - (self._excluded_s - excluded_s)
                seconds -= self._own_s
                self._depth -= 1
                calls.append(seconds)
                if not self._depth:
                    self.total_s += seconds

        return timed

    def _excluded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_excluding:
                return method(*args, **kwargs)
            self._is_excluding = True
            started_s = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._excluded_s += time.perf_counter() - started_s
                self._is_excluding = False

        return timed

    def _calibrate(self) -> None:
        """What the timer reports of a call that does nothing."""
        nothing = self._timed("nothing", lambda: None)
        for _ in range(CALIBRATION_CALLS):
            nothing()
        self._own_s = statistics.median(self.calls.pop("nothing"))
        self.total_s = 0.0


def measure(name: str, load: Load) -> dict[str, Any]:
    """Run the load under one setting.

    Args:
        name: `no connector`, `pin only` or `pin and stage`.
        load: The workload.

    Returns:
        One row: times in microseconds.
    """
    spec = EngineSpec(
        is_async=load.is_async,
        blocks=load.gpu_blocks,
        settings={
            "no connector": None,
            "pin only": {"kvtier.tier": "off"},
            "pin and stage": {"kvtier.chunk_tokens": CHUNK_TOKENS},
        }[name],
        max_context=load.context_tokens
        + load.turns * (load.turn_tokens + load.output_tokens)
        + BLOCK_TOKENS,
        max_batch=load.batch,
        batch_tokens=load.step_tokens,
    )
    tier = VirtualTier(n_slots=1 << 20) if name == "pin and stage" else None
    engine = Engine(spec, tier)
    drive, agents, timers = Drive(engine, track_kv=False), Agents(engine, load), Timers()
    if engine.connector is not None:
        for hook in HOOKS:
            timers.wrap(engine.connector, hook)
        timers.wrap_make_room(engine.half)
    if tier is not None:
        for call in ("lookup", "trim", "reserve", "commit", "drop", "poll"):
            timers.exclude(tier, call)
    if engine.connector is not None:
        timers.exclude(engine.scheduler.kv_cache_manager.block_pool, "free_blocks")
    clock = _StepClock(engine.scheduler)
    # A collection would be booked on whichever hook happens to allocate next.
    gc.collect()
    gc.disable()
    while not agents.done:
        for request in agents.requests_due():
            engine.scheduler.add_request(request)
        hooks_before_s = timers.total_s
        drive.step()
        clock.close_step(timers.total_s - hooks_before_s)
        agents.collect(drive.output)
    gc.enable()
    drive.run()
    row = _row(name, drive, agents, clock, timers)
    if engine.connector is not None:
        assert engine.connector.scheduler_half is not None, "kvtier has given up: see the log"
        totals = engine.half.stats.totals
        row["prompt_tokens"] = {
            k.split("|")[1]: int(v) for k, v in totals.items() if k.startswith("prompt_tokens")
        }
        engine.connector.shutdown()
    return row


class _StepClock:
    """Time inside the scheduler's own entry points, step by step."""

    def __init__(self, scheduler: Any) -> None:
        self._current_s = 0.0
        self._inside = False
        self.total_s: list[float] = []
        self.kvtier_s: list[float] = []
        for name in ("schedule", "update_from_output", "has_requests", "has_unfinished_requests"):
            self._wrap(scheduler, name)

    def _wrap(self, scheduler: Any, name: str) -> None:
        method = getattr(scheduler, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside = True
            started_s = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._current_s += time.perf_counter() - started_s
                self._inside = False

        setattr(scheduler, name, timed)

    def close_step(self, kvtier_s: float) -> None:
        """End a step, of which `kvtier_s` were kvtier's."""
        self.total_s.append(self._current_s)
        self.kvtier_s.append(kvtier_s)
        self._current_s = 0.0


def _row(
    name: str, drive: Drive, agents: Agents, clock: _StepClock, timers: Timers
) -> dict[str, Any]:
    total_s, kvtier_s = sum(clock.total_s), sum(clock.kvtier_s)
    own_s = total_s - kvtier_s
    hooks = {
        hook: {"calls": len(calls), "total_ms": sum(calls) * 1e3, **_quantiles(calls)}
        for hook, calls in sorted(timers.calls.items())
    }
    return {
        "setting": name,
        "steps": drive.steps,
        "turns": agents.finished,
        "preemptions": drive.preemptions,
        "virtual_s": drive.steps * STEP_S,
        "scheduler_us_per_step": own_s / drive.steps * 1e6,
        "kvtier_us_per_step": kvtier_s / drive.steps * 1e6,
        "share_of_scheduler": kvtier_s / own_s,
        "share_of_step": kvtier_s / (drive.steps * STEP_S),
        "kvtier_step": _quantiles(clock.kvtier_s),
        "step": _quantiles(clock.total_s),
        "hooks": hooks,
    }


def _quantiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:  # noqa: PLR2004 - statistics.quantiles needs two
        value = seconds[0] * 1e6 if seconds else 0.0
        return {"p50_us": value, "p99_us": value, "max_us": value}
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_us": cuts[49] * 1e6, "p99_us": cuts[98] * 1e6, "max_us": max(seconds) * 1e6}


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console  # noqa: PLC0415 - only for the table
    from rich.table import Table  # noqa: PLC0415

    console = Console(width=max(100, Console().width))
    table = Table(title="Scheduler time per step, microseconds")
    for column in ("setting", "steps", "turns", "own", "kvtier", "of own", "of 20 ms", "p99 step"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for row in rows:
        table.add_row(
            row["setting"],
            str(row["steps"]),
            str(row["turns"]),
            f"{row['scheduler_us_per_step']:.0f}",
            f"{row['kvtier_us_per_step']:.1f}",
            f"{row['share_of_scheduler']:.1%}",
            f"{row['share_of_step']:.1%}",
            f"{row['step']['p99_us']:.0f}",
        )
    console.print(table)
    for row in rows:
        if not row["hooks"]:
            continue
        hooks = Table(title=f"Hooks: {row['setting']}")
        for column in ("hook", "calls", "total ms", "p50 us", "p99 us", "max us"):
            hooks.add_column(column, justify="left" if column == "hook" else "right")
        for hook, told in row["hooks"].items():
            hooks.add_row(
                hook,
                str(told["calls"]),
                f"{told['total_ms']:.1f}",
                *(f"{told[key]:.1f}" for key in ("p50_us", "p99_us", "max_us")),
            )
        console.print(hooks)
        finished = row["hooks"]["request_finished_all_groups"]
        console.print(
            f"{row['setting']}: {row['share_of_step']:.1%} of a {STEP_S * 1e3:.0f} ms step (aim: "
            f"under {AIM_SHARE:.0%}), finished turn p50 {finished['p50_us']:.0f} us, p99 "
            f"{finished['p99_us']:.0f} us (aim: under {AIM_FINISHED_US:.0f} us)"
        )


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description="Cost of kvtier on the scheduler's thread.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write config and results")
    numbers = ("programs", "turns", "context_tokens", "output_tokens", "gpu_blocks", "batch")
    for name in numbers:
        default = getattr(Load, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"default {default}")
    parser.add_argument("--sync", action="store_true", help="the synchronous scheduler")
    told = parser.parse_args()
    load = Load(**{name: getattr(told, name) for name in numbers}, is_async=not told.sync)
    rows = []
    for name in ("no connector", "pin only", "pin and stage"):
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        rows.append(measure(name, load))
    _print(rows)
    if told.json is not None:
        text = json.dumps({"config": asdict(load), "results": rows}, indent=1)
        told.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
