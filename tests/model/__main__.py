"""Checks kvtier's invariants on vLLM's real scheduler, in random lives.

    python -m tests.model --steps 10_000_000 --seed 1 --state run.json
    python -m tests.model --seed 1 --life 4711
    python -m tests.model --defects
    python -m tests.model --examples 200 --planted NAME

The first runs life after life until so many transitions are done, and goes on from FILE where it was stopped.
The second repeats one life, and says where it breaks. The third plants defects: each must be caught.
In the fourth hypothesis chooses the events of so many lives, and makes what breaks one short; then
of as many with a defect, which must be found.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, Final

from tests.model.outcome import Run

ENVIRONMENT: Final = {
    # A seed is a life only where strings hash the same: vLLM walks over sets of request ids.
    "PYTHONHASHSEED": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


def main() -> int:
    arguments = _arguments()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        command = [sys.executable, "-m", "tests.model", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})
    # What kvtier warns of is its life here; its errors are collected.
    logging.disable(logging.WARNING)
    logging.getLogger("kvtier").propagate = False
    from tests.model.run import live  # noqa: PLC0415 - imports vLLM

    if arguments.life is not None:
        sys.stdout.write(
            f"{json.dumps(live(arguments.seed, arguments.life, raises=True).plain())}\n"
        )
        return 0
    facts: dict[str, Any] = {}
    failed = False
    if arguments.steps:
        run = Run(arguments.seed, arguments.state, live)
        run.until(arguments.steps)
        facts = run.facts()
        failed = bool(run.outcome.broken)
    if arguments.examples:
        from tests.model.machine import explore, explore_with  # noqa: PLC0415

        facts["machine"] = explore(arguments.examples)
        failed |= bool(facts["machine"]["broken"])
        if arguments.planted:
            facts["planted"] = explore_with(arguments.planted, arguments.examples)
            failed |= not facts["planted"]["broken"]
    if arguments.defects:
        from tests.model.defects import catch_all  # noqa: PLC0415

        facts["defects"] = catch_all(arguments.defects)
        failed |= not all(defect["caught"] for defect in facts["defects"].values())
    sys.stdout.write(f"{json.dumps(facts, indent=None if arguments.json else 1)}\n")
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.model", description="Check kvtier's invariants in random lives."
    )
    parser.add_argument("--steps", type=int, default=0, help="transitions; 0: none")
    parser.add_argument("--seed", type=int, default=1, help="of the run (1)")
    parser.add_argument("--state", type=Path, help="keep the run here, and go on from there")
    parser.add_argument("--life", type=int, help="repeat this life of the run alone")
    parser.add_argument(
        "--defects", nargs="*", help="plant these defects, or all; each must be caught"
    )
    parser.add_argument("--examples", type=int, default=0, help="lives that hypothesis chooses")
    parser.add_argument("--planted", help="a defect that it must find, too")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args()
    if arguments.defects == []:
        arguments.defects = ["all"]
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
