"""What kvtier costs the scheduler as the programs that one engine holds grow from 10 to 10,000.

    python bench/load.py [--sizes 10,30,100,...] [--gap 180] [--json FILE] [--png FILE]

vLLM's real scheduler with the production connector, in virtual time, without a model. Each program takes a turn in three
minutes, so that ten times the programs bring ten times the turns, as more users would: what is asked is how kvtier's time
in a second of such work grows. (`--gap 60` brings a turn a minute: more than three turns a step with 10,000 programs.)
GPU memory holds a quarter of all contexts and the CPU tier three quarters, whatever the number, so pins are displaced, run out
and are broken, KV is staged, reloaded and dropped at every size alike. The CPU tier is the server's own bookkeeping; its
time is counted apart, as it is another process's. Time of vLLM's own (allocations that are tried again, the freeing of
blocks that pins put off) is not kvtier's. All are the thread's processor time. Garbage collection is off in a window.

Besides, at each size, quiet steps: all programs pause, and one stranger's request is decoded. What such a step costs is the
price of merely holding programs.

Exit code 1 where kvtier's time, or the CPU tier's, grows faster than n log n: where the whole 95 % interval of the
exponent, fitted to windows of 100 programs and more, lies above 1. Below that, steps that do nothing else weigh most.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.growth import fit, medians, n_log_n, write_png
from bench.held_programs import HeldLoad, HeldPrograms
from bench.hook_timers import TIER_CALLS, StepClock, Timers, time_hooks
from kvtier.replay.virtual_tier import VirtualTier
from tests.engine.engine_spec import BLOCK_TOKENS
from tests.engine.scheduler_harness import Drive, Engine

if TYPE_CHECKING:
    from bench.growth import Growth

SIZES = (10, 30, 100, 300, 1000, 3000, 10_000)
GAP_S = HeldLoad(0).gap_s
FIT_FROM = 100
WINDOWS = 8
WINDOW_TURNS = 100
"""At least so many turns in a window; one of every sixteen programs where that is more."""
QUIET_STEPS = 300
CHUNK_TOKENS = 256
BLOCK_BYTES = 1024


@dataclass(frozen=True)
class Window:
    """Some turns under way, in sums.

    Attributes:
        virtual_s: How long it lasted.
        turns: That ended.
        steps: Of the engine.
        kvtier_s: Spent in kvtier's hooks.
        tier_s: Spent in the CPU tier's bookkeeping.
        own_s: Spent by vLLM's scheduler itself.
    """

    virtual_s: float
    turns: int
    steps: int
    kvtier_s: float
    tier_s: float
    own_s: float


class Bench:
    """An engine that holds programs, and the clocks on it."""

    def __init__(self, load: HeldLoad) -> None:
        self.load = load
        n_slots = int(load.programs * load.tier_share * load.context_tokens) // CHUNK_TOKENS
        n_slots = max(n_slots, 2 * load.longest_tokens // CHUNK_TOKENS)
        tier = VirtualTier(n_slots, CHUNK_TOKENS // BLOCK_TOKENS * BLOCK_BYTES)
        self.engine = Engine(load.spec(CHUNK_TOKENS), tier)
        self.drive = Drive(self.engine, track_kv=False)
        self.programs = HeldPrograms(self.engine, load)
        # The processor's time, as others may use the machine, too.
        self._tier_timers, self._timers = Timers(time.thread_time), Timers(time.thread_time)
        for call in TIER_CALLS:
            self._tier_timers.wrap(tier, call)
        time_hooks(self._timers, self.engine, tier)
        self._clock = StepClock(self.engine.scheduler, time.thread_time)

    def run_turns(self, n_turns: int) -> Window:
        """Until so many turns have ended."""
        until = self.programs.finished + n_turns
        began = self._figures()
        gc.collect()
        gc.disable()
        while self.programs.finished < until:
            for request in self.programs.requests_due():
                self.engine.scheduler.add_request(request)
            if not self.drive.busy:
                self.engine.clock.now_s = self.programs.next_s
                continue
            self._step()
        gc.enable()
        return self._window(began)

    def run_quiet_steps(self) -> list[float]:
        """Kvtier's seconds in steps in which all programs pause, and one request is decoded."""
        self.drive.run()
        self.programs.collect(self.drive.output)
        request = self.engine.request("stranger", [7], QUIET_STEPS, kvtier={"pin": False})
        self.engine.scheduler.add_request(request)
        seconds = []
        gc.collect()
        gc.disable()
        while not request.is_finished():
            before_s = self._timers.total_s
            self.drive.step()
            seconds.append(self._timers.total_s - before_s)
        gc.enable()
        return seconds

    def close(self) -> None:
        """End the engine."""
        assert self.engine.connector.scheduler_half is not None, "kvtier has given up: see the log"
        self.engine.connector.shutdown()

    def held(self) -> dict[str, int]:
        """What kvtier keeps of how many programs."""
        half = self.engine.half
        return {
            "known": len(half.programs),
            "pinned": len({pin.program for pin in half.pins.pins()}),
            "staged": len(half.stager.copies),
            "waiting": half.admission.waiting,
        }

    def counted(self) -> dict[str, float]:
        """Kvtier's counters of turns' fates."""
        kinds = ("decisions|", "pin_releases|", "prompt_tokens|", "failures|")
        totals = self.engine.half.stats.totals
        return {key: value for key, value in sorted(totals.items()) if key.startswith(kinds)}

    def _step(self) -> None:
        before_s = self._timers.total_s
        self.drive.step()
        self._clock.close_step(self._timers.total_s - before_s)
        self.programs.collect(self.drive.output)

    def _figures(self) -> tuple[float, int, int, float, float, float]:
        own_s = sum(self._clock.total_s) - sum(self._clock.kvtier_s)
        self._clock.total_s.clear()
        self._clock.kvtier_s.clear()
        return (
            self.engine.clock.now_s,
            self.programs.finished,
            self.drive.steps,
            self._timers.total_s,
            self._tier_timers.total_s,
            own_s,
        )

    def _window(self, began: tuple[float, int, int, float, float, float]) -> Window:
        ended = self._figures()
        now_s, turns, steps, kvtier_s, tier_s = (
            b - a for a, b in zip(began[:5], ended[:5], strict=True)
        )
        return Window(now_s, int(turns), int(steps), kvtier_s, tier_s, ended[5] - tier_s)


def measure(n_programs: int, gap_s: float) -> dict[str, Any]:
    """One number of programs, which pause for so long in the mean."""
    load = HeldLoad(n_programs, gap_s=gap_s)
    bench = Bench(load)
    began_s = time.perf_counter()
    # Every program has begun, and half of them have taken another turn.
    bench.run_turns(max(n_programs * 3 // 2, WINDOW_TURNS))
    n_turns = max(WINDOW_TURNS, n_programs // 16)
    windows = []
    for i in range(WINDOWS):
        windows.append(bench.run_turns(n_turns))
        _say(f"{n_programs} programs: window {i + 1} of {WINDOWS}", bench.programs.finished)
    held = bench.held()
    quiet = bench.run_quiet_steps()
    counted = bench.counted()
    bench.close()
    return {
        "programs": n_programs,
        "gpu_blocks": bench.engine.spec.blocks,
        "preemptions": bench.drive.preemptions,
        "held": held,
        "windows": [asdict(window) for window in windows],
        "quiet_step_us": statistics.median(quiet) * 1e6,
        "quiet_step_max_us": max(quiet) * 1e6,
        "counted": counted,
        "wall_s": time.perf_counter() - began_s,
    }


def figures(rows: list[dict[str, Any]], name: str, per: str) -> list[tuple[int, float]]:
    """Of every window, its programs and the one sum over the other."""
    return [(row["programs"], w[name] / w[per]) for row in rows for w in row["windows"]]


def growths(rows: list[dict[str, Any]]) -> dict[str, Growth]:
    """How kvtier's time in a second of work grows, and the CPU tier's: 1 is as n log n."""
    found = {}
    for name in ("kvtier_s", "tier_s"):
        points = [(n, y) for n, y in figures(rows, name, "virtual_s") if n >= FIT_FROM]
        if len({n for n, _ in points}) > 1:
            found[name] = fit(points, n_log_n)
    return found


def _print(rows: list[dict[str, Any]], found: dict[str, Growth]) -> None:
    from rich.console import Console  # noqa: PLC0415 - only for the table
    from rich.table import Table  # noqa: PLC0415

    console = Console(width=max(118, Console().width))
    table = Table(title="Programs held by one engine; medians of windows, microseconds")
    columns = ("programs", "pinned", "staged", "waiting", "turns/s", "kvtier/s", "a turn", "a step")
    for column in (*columns, "quiet step", "tier/s", "a turn", "vLLM/s"):
        table.add_column(column, justify="right")
    shares = {
        (name, per): dict(medians(figures(rows, name, per)))
        for name in ("kvtier_s", "tier_s", "own_s", "turns")
        for per in ("virtual_s", "turns", "steps")
    }
    for row in rows:
        n = row["programs"]
        table.add_row(
            f"{row['held']['known']:,}",
            f"{row['held']['pinned']:,}",
            f"{row['held']['staged']:,}",
            f"{row['held']['waiting']:,}",
            f"{shares['turns', 'virtual_s'][n]:.2f}",
            f"{shares['kvtier_s', 'virtual_s'][n] * 1e6:,.0f}",
            f"{shares['kvtier_s', 'turns'][n] * 1e6:,.0f}",
            f"{shares['kvtier_s', 'steps'][n] * 1e6:,.0f}",
            f"{row['quiet_step_us']:.1f}",
            f"{shares['tier_s', 'virtual_s'][n] * 1e6:,.0f}",
            f"{shares['tier_s', 'turns'][n] * 1e6:,.0f}",
            f"{shares['own_s', 'virtual_s'][n] * 1e6:,.0f}",
        )
    console.print(table)
    for name, growth in found.items():
        console.print(
            f"{name} in a second of work grows as (n log n)^{growth.exponent:.2f} "
            f"[{growth.low:.2f}, {growth.high:.2f}] from {FIT_FROM} programs on"
        )


def _say(what: str, n_turns: int) -> None:
    print(f"{what}, {n_turns} turns so far", file=sys.stderr, flush=True)


def _draw(path: Path, rows: list[dict[str, Any]]) -> None:
    seconds = {
        "kvtier": figures(rows, "kvtier_s", "virtual_s"),
        "CPU tier": figures(rows, "tier_s", "virtual_s"),
        "vLLM's own": figures(rows, "own_s", "virtual_s"),
    }
    turn = {
        "kvtier, a turn": [(n, y * 1e6) for n, y in figures(rows, "kvtier_s", "turns")],
        "CPU tier, a turn": [(n, y * 1e6) for n, y in figures(rows, "tier_s", "turns")],
        "quiet step": [(row["programs"], row["quiet_step_us"]) for row in rows],
    }
    fields = [("seconds in a second of work", seconds, True), ("microseconds", turn, False)]
    write_png(path, "kvtier on the scheduler's thread, by programs held", fields)


def main() -> int:
    """Measure, print a table, and write JSON and a picture where asked."""
    parser = argparse.ArgumentParser(description="kvtier's cost as the programs held grow.")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of programs")
    parser.add_argument(
        "--gap", type=float, default=GAP_S, metavar="S", help=f"mean pause of a program ({GAP_S:g})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them (needs Pillow)")
    told = parser.parse_args()
    rows = [measure(int(size), told.gap) for size in told.sizes.split(",")]
    found = growths(rows)
    _print(rows, found)
    if told.json is not None:
        load = asdict(HeldLoad(0, gap_s=told.gap)) | {"programs": [row["programs"] for row in rows]}
        facts = {name: growth._asdict() for name, growth in found.items()}
        text = json.dumps({"config": load, "rows": rows, "growth": facts}, indent=1)
        told.json.write_text(text + "\n", encoding="utf-8")
    if told.png is not None:
        _draw(told.png, rows)
    return int(any(growth.low > 1.0 for growth in found.values()))


if __name__ == "__main__":
    sys.exit(main())
