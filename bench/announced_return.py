"""What an announced tool return saves the returning turn: its reload.

    python bench/announced_return.py [--repeats 8] [--context-tokens 1536] [--json FILE]

`kvtier serve` on SmolLM2-135M. An agent pauses, its KV goes to the CPU tier and others take its place in GPU memory. Then
it returns, in turn: without a word, so that its KV is loaded while the request waits; and after `AnnounceToolReturn`,
which has loaded it before the request comes. What counts is the time to the first token of the returning turn
(one token is asked for), and how long the loads took by kvtier's own metric.

The aim: the announced turn's time to first token is shorter by at least the time of the reload (medians). The exit code
is 1 where that is not so.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvtier.linkbench.machine import machine
from kvtier.setup.model import ensure_model
from tests.engine.served import Served, serving

SILENT, ANNOUNCED = "silent", "announced"
NEW_TOKENS: Final = 32
FLOOD_TOKENS: Final = 1000
FLOODS: Final = 4
"""More than fit beside the agent: nothing of it is left in GPU memory."""
BLOCK_TOKENS: Final = 32
_FILE: Final[dict[str, Any]] = {"metavar": "FILE", "dir_okay": False}


def one_return(served: Served, name: str, context_tokens: int, *, announce: bool) -> dict[str, Any]:
    """An agent pauses and returns; what its return took."""
    served.turn(name, context_tokens)
    while served.program(name).cpu_tokens < context_tokens:
        time.sleep(0.01)
    served.client.release_program(name)
    for i in range(FLOODS):
        served.turn(f"{name}-other-{i}", FLOOD_TOKENS, ttl_s=0.0, stage=False)
    before = _counts(served)
    if announce:
        while served.program(name).gpu_pinned_tokens < context_tokens:
            served.client.announce_tool_return(name)
            time.sleep(0.05)
    begun_s = time.perf_counter()
    served.turn(name, NEW_TOKENS, max_tokens=1)
    ttft_s = time.perf_counter() - begun_s
    while (after := _counts(served))["loads"] == before["loads"]:
        time.sleep(0.05)
    found = {key: after[key] - before[key] for key in after}
    served.client.end_program(name)
    return found | {"ttft_s": ttft_s}


def _counts(served: Served) -> dict[str, float]:
    return {
        "from_cpu": served.metric("prompt_tokens_total", source="cpu"),
        "from_pin": served.metric("prompt_tokens_total", source="gpu_pin"),
        "loads": served.metric("copy_seconds_count", direction="load"),
        "load_s": served.metric("copy_seconds_sum", direction="load"),
    }


def main(
    *,
    repeats: Annotated[int, typer.Option(min=2, help="Returns of each kind.", metavar="N")] = 8,
    context_tokens: Annotated[
        int, typer.Option(min=1024, max=2048, help="Of the agent.", metavar="N")
    ] = 1536,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.", **_FILE)
    ] = None,
) -> None:
    """Measure what an announced tool return saves the returning turn.

    Exit code 1: the announced turn's time to first token is not shorter by the time of the reload.
    """
    console, progress = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    n_blocks = (context_tokens + FLOOD_TOKENS + 700) // BLOCK_TOKENS
    with tempfile.TemporaryDirectory(prefix="kvtier-return-") as folder:
        places = {name: Path(folder) / name for name in ("run", "work")}
        for place in places.values():
            place.mkdir(mode=0o700)
        progress.print("starting kvtier serve")
        with serving(
            ensure_model(),
            places["run"],
            places["work"],
            flags=("--dtype", "float32"),
            settings={"kvtier.dram_gb": 2.0},
            n_blocks=n_blocks,
        ) as served:
            for index in range(-1, repeats):
                for arm in (SILENT, ANNOUNCED):
                    name = f"{arm}-{index}"
                    result = one_return(served, name, context_tokens, announce=arm == ANNOUNCED)
                    progress.print(f"{name}: {result['ttft_s'] * 1e3:.0f} ms")
                    if index >= 0:  # the first one warms up
                        found[arm].append(result)
    rows = [_row(arm, results) for arm, results in found.items()]
    saved_ms = rows[0]["ttft_p50_ms"] - rows[1]["ttft_p50_ms"]
    table = Table("", *found, box=None)
    for name in rows[0]:
        table.add_row(name, *(f"{row[name]:.1f}" for row in rows))
    console.print(table)
    holds = saved_ms >= rows[0]["load_p50_ms"]
    text = "at least" if holds else "LESS than"
    console.print(
        f"the announced return's first token comes {saved_ms:.1f} ms sooner: {text} the reload's "
        f"{rows[0]['load_p50_ms']:.1f} ms"
    )
    if json_file is not None:
        options = {"repeats": repeats, "context_tokens": context_tokens}
        config = machine(torch.device("cpu"), ["python", "bench/announced_return.py"]) | options
        report = {"config": config, "results": dict(zip(found, rows, strict=True)), "all": found}
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    raise typer.Exit(int(not holds))


def _row(arm: str, results: list[dict[str, Any]]) -> dict[str, float]:
    source = "from_pin" if arm == ANNOUNCED else "from_cpu"
    return {
        "ttft_p50_ms": statistics.median(r["ttft_s"] for r in results) * 1e3,
        "ttft_min_ms": min(r["ttft_s"] for r in results) * 1e3,
        "ttft_max_ms": max(r["ttft_s"] for r in results) * 1e3,
        "load_p50_ms": statistics.median(r["load_s"] for r in results) * 1e3,
        "tokens_found": statistics.median(r[source] for r in results),
    }


if __name__ == "__main__":
    typer.run(main)
