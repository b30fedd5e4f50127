"""Runs scenarios on vLLM's real scheduler.

    python -m tests.engine.pressure_scenarios SCENARIO... [--mode sync|async]

prints one JSON object a line. With `--serve` it reads `SCENARIO MODE` lines and answers each with
one such line: importing vLLM costs seconds, and a test session asks for many scenarios.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback

from tests.engine import (
    feature_scenarios,
    giving_up_scenarios,
    pin_scenarios,
    prefetch_scenarios,
    tier_scenarios,
)

ROOMS = (
    pin_scenarios,
    tier_scenarios,
    prefetch_scenarios,
    giving_up_scenarios,
    feature_scenarios,
)
SCENARIOS = {scenario.__name__: scenario for room in ROOMS for scenario in room.ALL}


def answer(name: str, mode: str) -> str:
    """Run a scenario; its facts as one line, or what it died of."""
    try:
        facts = SCENARIOS[name](is_async=mode == "async")
    except Exception:  # noqa: BLE001 - told to the test, which fails with it
        facts = {"error": traceback.format_exc()}
    return json.dumps({"scenario": name, "mode": mode, **facts})


def main() -> int:
    parser = argparse.ArgumentParser(description="Run scenarios on vLLM's real scheduler.")
    parser.add_argument("scenarios", nargs="*", help="default: all")
    parser.add_argument("--mode", choices=("sync", "async", "both"), default="both")
    parser.add_argument("--serve", action="store_true", help="answer lines of standard input")
    arguments = parser.parse_args()
    # vLLM's own handler writes to the standard output that it found when it was imported.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    if arguments.serve:
        # Whatever prints must not get between the lines of the answers.
        answers, sys.stdout = sys.stdout, sys.stderr
        for line in sys.stdin:
            answers.write(answer(*line.split()) + "\n")
            answers.flush()
        return 0
    modes = ("sync", "async") if arguments.mode == "both" else (arguments.mode,)
    failed = False
    for name in arguments.scenarios or SCENARIOS:
        for mode in modes:
            line = answer(name, mode)
            failed |= "error" in json.loads(line)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
