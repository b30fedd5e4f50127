"""Hours of an overloaded engine in an unreliable world, in virtual time: nothing leaks, and nothing slows down.

    python bench/soak.py [--hours 8] [--seed 1] [--json FILE]

The world is the model checker's (`tests/model`): vLLM's real scheduler, block pool and cache manager, kvtier's scheduler
half, and the server's own bookkeeping in the CPU tier, where every block and slot carries a tag of what it holds. More
requests wait than run at any time. In every three minutes come: the loss of the CPU tier for ten seconds (the same server
comes back, or an empty one), copies and answers that fail, come late, twice or in another order, in twelve kinds of
weather, resets of the prefix cache with requests running, with new weights and without, floods of strangers,
aborts, and commands of clients and operators. References are compared every ten seconds, and what is read, always.

Judged are, the first tenth of the run left out, in which windows fill:

- what is left when all programs have been forgotten: no block, lock, copy or unanswered command, and of all containers that
  kvtier's scheduler half leads to no entry more than at the start, but for fixed windows (measurements, counters);
- memory: the process's, and Python's objects and allocations, which tell a leak from fragmentation. The upper end of the 95 %
  interval of what they grow in the run may be 0.5 % of the mean. What kvtier remembers goes up and down with the programs that
  live, by more than that: for the number of them the line is corrected, and its interval must reach down to 0;
- throughput: by how much the line through all periods changes from the first tenth to the last, at most 3 %. Two tenths
  alone differ by some percent through what they happened to be asked: turns with long answers bring more tokens, those with
  long prompts fewer. So the line is corrected for the tokens asked for and the prompt of the mean turn, and what
  the bare tenths say is told, too.

Exit code 1 where something is not so. Below two hours only what is left is judged.
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
from typing import TYPE_CHECKING, Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.model.__main__ import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.model.soak import Period

JUDGED_HOURS: Final = 2.0
WARM_PERIODS: Final = 16
MOST_DRIFT: Final = 0.03
MOST_GROWTH: Final = 0.005
"""Of the mean, in the whole run."""
GROWTHS: Final = ("rss_bytes", "objects", "allocated")


def judge(periods: list[Period], per_hour: float) -> dict[str, Any]:
    """Throughput and memory over the run but for its first tenth.

    Args:
        periods: All.
        per_hour: How many are in an hour.
    """
    tenth = len(periods) // 10
    judged = periods[tenth:]
    asked = [
        [period.asked / period.turns for period in judged],
        [period.prompts / period.turns for period in judged],
    ]
    # From the middle of the first tenth to that of the last.
    span = len(judged) - tenth
    tokens = _line([period.tokens for period in judged], asked)
    first, last = judged[:tenth], judged[-tenth:]
    growth = {}
    for name in (*GROWTHS, "remembered"):
        others = [[period.programs for period in judged]] if name == "remembered" else []
        line = _line([getattr(period, name) for period in judged], others)
        growth[name] = {
            "mean": line.mean,
            "slope_per_hour": line.slope * per_hour,
            "low_per_hour": (line.slope - line.half) * per_hour,
            "high_per_hour": (line.slope + line.half) * per_hour,
            "most_in_run": (line.slope + line.half) * len(judged) / line.mean,
        }
    return {
        "throughput": {
            "change": tokens.slope * span / tokens.mean,
            "low": (tokens.slope - tokens.half) * span / tokens.mean,
            "high": (tokens.slope + tokens.half) * span / tokens.mean,
            "tenths": sum(p.tokens for p in last) / sum(p.tokens for p in first) - 1,
        },
        "growth": growth,
    }


class Line(NamedTuple):
    """A straight line through a figure of each period: its mean, slope, and half of the slope's 95 % interval."""

    mean: float
    slope: float
    half: float


def _line(values: Sequence[float], others: Sequence[Sequence[float]]) -> Line:
    """Fit it; what `others` explain is none of its slope."""
    import numpy as np  # noqa: PLC0415 - slow to load
    from scipy import stats  # noqa: PLC0415

    n = len(values)
    terms = np.column_stack([np.ones(n), np.arange(n), *others])
    figures = np.asarray(values, dtype=float)
    fitted, *_ = np.linalg.lstsq(terms, figures, rcond=None)
    left, free = figures - terms @ fitted, n - terms.shape[1]
    error = float(np.sqrt(left @ left / free * np.linalg.inv(terms.T @ terms)[1, 1]))
    return Line(figures.mean(), float(fitted[1]), float(stats.t.ppf(0.975, free)) * error)


def faults(judged: dict[str, Any], left: dict[str, int]) -> list[str]:
    """What is wrong, in words."""
    found = [f"left at the end: {left}"] if left else []
    if not judged:
        return found
    change = judged["throughput"]["change"]
    if abs(change) > MOST_DRIFT:
        found.append(f"throughput has changed by {change:+.1%}")
    for name in GROWTHS:
        most = judged["growth"][name]["most_in_run"]
        if most > MOST_GROWTH:
            found.append(f"{name} may grow by {most:.1%} in the run")
    if judged["growth"]["remembered"]["low_per_hour"] > 0:
        found.append("what kvtier remembers grows")
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
