"""What kvtier costs vLLM's scheduler: per step, and per finished turn.

    python bench/decision_cost.py [--json FILE] [--programs 200] [--context-tokens 100000]
                                  [--shared-tokens 0]

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
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.agent_load import Agents, Load
from bench.hook_timers import StepClock, Timers, quantiles, time_hooks
from tests.engine.engine_spec import BLOCK_TOKENS, EngineSpec
from tests.engine.scheduler_harness import STEP_S, Drive, Engine
from tests.engine.virtual_tier import VirtualTier

AIM_SHARE = 0.05
AIM_FINISHED_US = 1000.0
CHUNK_TOKENS = 256
"""The default on GPUs."""


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
    time_hooks(timers, engine, tier)
    clock = StepClock(engine.scheduler)
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


def _row(
    name: str, drive: Drive, agents: Agents, clock: StepClock, timers: Timers
) -> dict[str, Any]:
    total_s, kvtier_s = sum(clock.total_s), sum(clock.kvtier_s)
    own_s = total_s - kvtier_s
    hooks = {
        hook: {"calls": len(calls), "total_ms": sum(calls) * 1e3, **quantiles(calls)}
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
        "kvtier_step": quantiles(clock.kvtier_s),
        "step": quantiles(clock.total_s),
        "hooks": hooks,
    }


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
    numbers = (
        "programs",
        "turns",
        "context_tokens",
        "shared_tokens",
        "output_tokens",
        "gpu_blocks",
        "batch",
    )
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
