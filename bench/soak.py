"""Hours of an overloaded engine in an unreliable world, in virtual time: nothing leaks, and nothing slows down.

    python bench/soak.py [--hours 8] [--seed 1] [--json FILE]

The world is the model checker's (`tests/model`): vLLM's real scheduler, block pool and cache manager, kvtier's scheduler
half, and the server's own bookkeeping in the CPU tier, where every block and slot carries a tag of what it holds. More
requests wait than run at any time. In every six minutes come: the loss of the CPU tier for twenty seconds (the same server
comes back, or an empty one), copies and answers that fail, come late, twice or in another order, in twelve kinds of
weather, resets of the prefix cache with requests running, with new weights and without, floods of strangers,
aborts, and commands of clients and operators. References are compared every ten seconds, and what is read, always.

Judged at the end: no block, lock or copy is left, memory does not grow (Python's, the process's, and the entries
of all that kvtier remembers), and the last tenth's throughput is that of the first one after the warm-up, which is
a tenth. Exit code 1 where something is not so. Below two hours only leaks are judged.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.model.__main__ import ENVIRONMENT

if TYPE_CHECKING:
    from tests.model.soak import Period

JUDGED_HOURS: Final = 2.0
WARM_PERIODS: Final = 8
MOST_DRIFT: Final = 0.03
MOST_GROWTH: Final = 0.02
"""Of the mean, in the whole run: less cannot be told from noise."""


def judge(periods: list[Period], per_hour: float) -> dict[str, Any]:
    """Throughput of the last tenth against the second, and how memory grows in the run but for its first tenth.

    Args:
        periods: All.
        per_hour: How many are in an hour.
    """
    from scipy import stats  # noqa: PLC0415 - slow to load

    tenth = len(periods) // 10
    first, last = periods[tenth : 2 * tenth], periods[-tenth:]
    drift = {
        name: sum(getattr(p, name) for p in last) / sum(getattr(p, name) for p in first) - 1
        for name in ("tokens", "turns")
    }
    judged, growth = periods[tenth:], {}
    for name in ("rss_bytes", "objects", "remembered"):
        values = [getattr(period, name) for period in judged]
        line = stats.linregress(range(len(values)), values)
        half = float(stats.t.ppf(0.975, len(values) - 2)) * float(line.stderr)
        mean = sum(values) / len(values)
        growth[name] = {
            "mean": mean,
            "slope_per_hour": float(line.slope) * per_hour,
            "low_per_hour": (float(line.slope) - half) * per_hour,
            "high_per_hour": (float(line.slope) + half) * per_hour,
            "most_in_run": (float(line.slope) + half) * len(values) / mean,
        }
    return {"drift": drift, "growth": growth}


def faults(judged: dict[str, Any], left: dict[str, int]) -> list[str]:
    """What is wrong, in words."""
    found = [f"left at the end: {left}"] if left else []
    drift = judged.get("drift", {}).get("tokens", 0.0)
    if abs(drift) > MOST_DRIFT:
        found.append(f"throughput has changed by {drift:+.1%}")
    for name, growth in judged.get("growth", {}).items():
        if growth["most_in_run"] > MOST_GROWTH:
            found.append(f"{name} may grow by {growth['most_in_run']:.1%} in the run")
    return found


def main() -> int:
    """Run, say what was seen, and write it where asked."""
    parser = argparse.ArgumentParser(description="Hours of an overloaded engine in virtual time.")
    parser.add_argument("--hours", type=float, default=8.0, help="of virtual time (8)")
    parser.add_argument("--seed", type=int, default=1, help="of all chance (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures")
    told = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # A seed is a run only where strings hash the same.
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **ENVIRONMENT}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)  # noqa: S606
    logging.disable(logging.WARNING)
    from tests.model.soak import PERIOD_S, Soak  # noqa: PLC0415 - imports vLLM

    began_s = time.monotonic()
    soak = Soak(told.seed)
    periods: list[Period] = []
    early: Counter[str] = Counter()
    for i in range(max(1, round(told.hours * 3600 / PERIOD_S))):
        periods.append(soak.period())
        one = periods[-1]
        early = early or (soak.census if i >= WARM_PERIODS else early)
        print(
            f"{(i + 1) * PERIOD_S / 3600:5.1f} h  {one.tokens / PERIOD_S:6.2f} tokens/s  "
            f"{one.turns} turns  {one.preemptions} preemptions  {one.rss_bytes >> 20} MiB  "
            f"{one.remembered} entries",
            file=sys.stderr,
            flush=True,
        )
    late = soak.census
    left = soak.end()
    judged = judge(periods, 3600.0 / PERIOD_S) if told.hours >= JUDGED_HOURS else {}
    wrong = faults(judged, left)
    facts = {
        "hours": len(periods) * PERIOD_S / 3600,
        "seed": told.seed,
        "wall_s": time.monotonic() - began_s,
        "steps": soak.drive.steps,
        "turns": sum(period.turns for period in periods),
        "preemptions": soak.drive.preemptions,
        "happened": dict(soak.happened),
        "seen": {key: int(n) for key, n in sorted(soak.half.stats.totals.items())},
        "remembers_most_of": dict(late.most_common(8)),
        "remembers_more_of": dict((late - early).most_common(8)),
        "left": left,
        "judged": judged,
        "wrong": wrong,
    }
    print(json.dumps(facts, indent=1))
    if told.json is not None:
        text = json.dumps({**facts, "periods": [asdict(period) for period in periods]}, indent=1)
        told.json.write_text(text + "\n", encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
