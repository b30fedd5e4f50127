"""Copies beside a running engine: what they cost the engine, and what the engine costs them.

    python bench/beside_engine.py [--rounds 7] [--minutes 10] [--json FILE] [--python-copies]

Real vLLM on the CPU, in this process, decodes and prefills a batch while kvtier's copy engine stages
or reloads; orders are submitted between the engine's steps, as kvtier's worker half does, and `--depth` of them
are queued, so many that the copies hardly ever pause. In turn with it, in each round: the engine alone, and the engine
beside a compiled ``memcpy`` loop that moves as many bytes a second, or as many as it can, and never touches Python.

Two limits are checked; the exit code is 1 where one does not hold:
  - a reload or a stage takes at most twice its time alone (medians);
  - the engine loses no more throughput than beside the ``memcpy`` loop, plus 5 % of that (median over the rounds, in
    each of which one follows the other: virtual machines change their speed within minutes).

The engine computes with `--threads` threads, so that a core is left for copies, as `kvtier serve` does. Without that
this would show how the system shares a core, not what copies cost. How many cores the engine alone keeps busy is told.

A window begins when other processes take less than a tenth of the machine, and is repeated if they took
more in it; after `--minutes` it gives up.

With `--python-copies` the copy engine loops over the same runs in Python, which contends with the
engine for the interpreter lock: then the second limit must fail, or this benchmark would show nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.memcpy_loop import MemcpyLoop
from bench.quiet import MOST_OTHERS, Windows
from kvtier.copies.kernel import CopyKernel, compiled_kernel, python_kernel
from kvtier.copy_engine import CopyJob, CopyOrder, CpuCopyEngine, Direction, KVLayout
from kvtier.linkbench.machine import machine
from kvtier.setup.model import ensure_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BLOCK_TOKENS: Final = 32
CHUNK_BLOCKS: Final = 2
LAYERS, HEADS, HEAD_SIZE = 30, 3, 64  # SmolLM2-135M
MOST_TIMES_ALONE: Final = 2.0
MOST_EXTRA_LOSS: Final = 0.05
TIMEOUT_S: Final = 120.0
ALONE, STAGE, RELOAD = "engine alone", "kvtier stages", "kvtier reloads"
_DIRECTION: Final[dict[str, Direction]] = {STAGE: "store", RELOAD: "load"}


class StampedEngine(CpuCopyEngine):
    """The copy engine; notes when each order began and when its result was there."""

    def __init__(self, layout: KVLayout, region: Any, kernel: CopyKernel) -> None:
        """See `CpuCopyEngine`."""
        self.took_s: list[float] = []
        self._last_s = 0.0
        super().__init__(layout, region, kernel=kernel, max_store_backlog_bytes=1 << 50)

    def _finish(self, job: CopyJob, error: str = "") -> None:
        now_s = time.monotonic()
        # From when it could begin: submitted, and the one before it done.
        self.took_s.append(now_s - max(job.submitted_s, self._last_s))
        self._last_s = now_s
        super()._finish(job, error)


class Copies:
    """Keeps so many orders of a context's size queued.

    Args:
        tokens: of one context; its blocks are scattered over the scratch KV cache, which has the
            model's layers and block size.
        kernel: copies.
        depth: orders queued or running.
    """

    def __init__(self, tokens: int, kernel: CopyKernel, depth: int) -> None:
        blocks = tokens // BLOCK_TOKENS
        pool = 4 * blocks
        self._caches = {
            str(i): torch.ones(pool, HEADS, BLOCK_TOKENS, 2 * HEAD_SIZE) for i in range(LAYERS)
        }
        layout = KVLayout.from_kv_caches(self._caches, num_blocks=pool)
        slot = layout.slot_bytes(CHUNK_BLOCKS)
        n_slots = blocks // CHUNK_BLOCKS
        self._region = np.ones(2 * n_slots * slot, np.uint8)
        self._slots = [[(half * n_slots + i) * slot for i in range(n_slots)] for half in (0, 1)]
        self._ids = np.random.default_rng(0).permutation(pool)
        self._blocks = blocks
        self._depth = depth
        self._count = 0
        self._running = 0
        self.moved_s: list[float] = []
        self.order_bytes = blocks * layout.block_bytes_total
        self.engine = StampedEngine(layout, self._region, kernel)

    def top_up(self, direction: Direction) -> None:
        """Take results, submit as many orders."""
        for result in self.engine.poll():
            if not result.ok:
                raise SystemExit(result.error)
            self.moved_s.append(result.seconds)
            self._running -= 1
        while self._running < self._depth:
            self._submit(direction)

    def _submit(self, direction: Direction) -> None:
        start = self._count * self._blocks % len(self._ids)
        order = CopyOrder(
            order_id=self._count,
            direction=direction,
            request_id="bench",
            block_ids=self._ids[start : start + self._blocks],
            slots=self._slots[self._count % 2],
            chunk_blocks=CHUNK_BLOCKS,
        )
        self._count += 1
        self._running += 1
        self.engine.submit(order, time.monotonic())

    def settle(self) -> None:
        """Wait for what is queued."""
        self.engine.drain(TIMEOUT_S)
        self.engine.poll()
        self._running = 0

    def alone_s(self, direction: Direction, count: int) -> list[float]:
        """Seconds of orders with nothing else going on, one at a time."""
        self.engine.took_s = []
        for _ in range(count):
            self._submit(direction)
            self.settle()
        return self.engine.took_s


class Batch:
    """A fixed piece of work for the engine: prompts to prefill while others decode."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Start vLLM in this process."""
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
        )
        vllm = importlib.import_module("vllm")
        self._llm = vllm.LLM(
            str(ensure_model()),
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=4,
            max_num_batched_tokens=256,
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.4,
            disable_log_stats=True,
        )
        self._parameters = vllm.SamplingParams(max_tokens=options.output_tokens, ignore_eos=True)
        self._prompts = [
            [3 + (7 * i + 11 * j) % 4000 for j in range(options.prompt_tokens)]
            for i in range(options.requests)
        ]
        self.tokens = options.requests * (options.prompt_tokens + options.output_tokens)
        self._count = 0

    def run_s(self, between: Callable[[], None]) -> float:
        """Seconds for the work; ``between`` is called before each step."""
        engine = self._llm.llm_engine
        for prompt in self._prompts:
            self._count += 1
            engine.add_request(str(self._count), {"prompt_token_ids": prompt}, self._parameters)
        started_s = time.perf_counter()
        while engine.has_unfinished_requests():
            between()
            engine.step()
        return time.perf_counter() - started_s


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str], int]:
    """All rounds; the rows, which limits do not hold, and how many windows were repeated."""
    batch = Batch(options)
    kernel = python_kernel() if options.python_copies else compiled_kernel()
    copies = Copies(options.context_tokens, kernel, options.depth)
    memcpy = MemcpyLoop(copies.order_bytes)
    batch.run_s(lambda: None)  # warms up
    found = Windows(options.minutes)
    busy_s: list[float] = []

    def alone() -> None:
        before_s = time.process_time()
        found.seconds[ALONE].append(batch.run_s(lambda: None))
        busy_s.append(time.process_time() - before_s)

    def copies_alone(name: str) -> None:
        found.copy_s[_alone(name)] += copies.alone_s(_DIRECTION[name], 10)[2:]

    def copies_beside(name: str) -> None:
        took: list[float] = []
        copies.engine.took_s = took
        copies.moved_s = []
        seconds = batch.run_s(lambda: copies.top_up(_DIRECTION[name]))
        n_done = len(took)
        copies.settle()
        found.copy_s[_moving(name)] += copies.moved_s
        found.seconds[name].append(seconds)
        found.copy_s[name] += took[:n_done]
        found.bytes_per_s[name].append(n_done * copies.order_bytes / seconds)

    def memcpy_beside(name: str) -> None:
        beside, rate = _beside(name), found.bytes_per_s[name][-1]
        memcpy.start(rate)
        time.sleep(0.2)
        found.copy_s[_alone(beside)].append(memcpy.stop()[1])
        memcpy.start(rate)
        seconds = batch.run_s(lambda: None)
        n_bytes, memcpy_s = memcpy.stop()
        found.copy_s[beside].append(memcpy_s)
        found.bytes_per_s[beside].append(n_bytes / seconds)
        found.seconds[beside].append(seconds)

    for _ in range(options.rounds):
        found.run(alone)
        for name in _DIRECTION:
            found.run(lambda name=name: copies_alone(name))  # type: ignore[misc]
            found.run(lambda name=name: copies_beside(name))  # type: ignore[misc]
            found.run(lambda name=name: memcpy_beside(name))  # type: ignore[misc]
    copies.engine.close()
    rows, broken = _rows(batch, found, copies.order_bytes)
    rows[0]["busy_cores"] = busy_s[-1] / found.seconds[ALONE][-1]
    return rows, broken, found.disturbed


def _alone(name: str) -> str:
    return f"{name}, alone"


def _moving(name: str) -> str:
    return f"{name}, bytes moving"


def _beside(name: str) -> str:
    return f"memcpy, as {name}"


def _rows(batch: Batch, found: Windows, copy_bytes: int) -> tuple[list[dict[str, Any]], list[str]]:
    rows: list[dict[str, Any]] = []
    broken = []
    for name, work_s in found.seconds.items():
        rates = found.bytes_per_s.get(name)
        row: dict[str, Any] = {
            "beside": name,
            "tokens_per_s": batch.tokens / statistics.median(work_s),
            "throughput_loss": statistics.median(_losses(work_s, found.seconds[ALONE])),
            "gb_per_s": statistics.median(rates) / 1e9 if rates else 0.0,
            "work_s": work_s,
        }
        if name in found.copy_s:
            alone = statistics.median(found.copy_s[_alone(name)])
            beside = statistics.median(found.copy_s[name])
            row |= {
                "copies": len(found.copy_s[name]),
                "copy_alone_ms": alone * 1e3,
                "copy_ms": beside * 1e3,
                "times_alone": beside / alone,
            }
        if name in _DIRECTION:
            by_round = _losses(work_s, found.seconds[_beside(name)])
            extra = statistics.median(by_round)
            moving = statistics.median(found.copy_s[_moving(name)])
            row |= {"bytes_moving_ms": moving * 1e3, "loss_over_memcpy": extra}
            row |= {
                "loss_over_memcpy_by_round": by_round,
                "copying_share": statistics.median(rates or [0.0]) * beside / copy_bytes,
            }
            if beside > MOST_TIMES_ALONE * alone:
                broken.append(f"{name}: a copy takes {beside / alone:.1f} times its time alone")
            if extra > MOST_EXTRA_LOSS:
                broken.append(f"{name}: the engine loses {extra:.1%} more than beside memcpy")
        rows.append(row)
    return rows, broken


def _losses(work_s: Sequence[float], others_s: Sequence[float]) -> list[float]:
    """Part of the throughput lost against other windows of the same rounds, round by round."""
    return [1 - b / a for a, b in zip(work_s, others_s, strict=True)]


def _with_range(losses: Sequence[float] | None) -> str:
    if not losses:
        return ""
    return f"{statistics.median(losses):+.1%} ({min(losses):+.0%} to {max(losses):+.0%})"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table."""
    columns = ("beside", "tokens/s", "loss", "over memcpy", "GB/s", "a copy, ms", "alone", "times")
    table = Table(*columns, box=None)
    for row in rows:
        copy = [""] * 3
        if "copy_ms" in row:
            copy = [f"{row['copy_ms']:.1f}", f"{row['copy_alone_ms']:.1f}"]
            copy.append(f"{row['times_alone']:.2f}")
        table.add_row(
            row["beside"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['throughput_loss']:.1%}",
            _with_range(row.get("loss_over_memcpy_by_round")),
            f"{row['gb_per_s']:.2f}",
            *copy,
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> int:
    """Run and print; 1 if a limit does not hold."""
    parser = argparse.ArgumentParser(description="Copies beside a running engine")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=10, help="give up after, if never quiet")
    parser.add_argument("--requests", type=int, default=4, help="of a round, four at a time")
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--context-tokens", type=int, default=4096, help="of one copy")
    parser.add_argument("--depth", type=int, default=64, help="copies queued before each step")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--python-copies", action="store_true", help="must fail the second limit")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(options.threads):
        # OpenMP has read it by now, with torch: what vLLM compiles would use all cores whatever is set later.
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - itself
    rows, broken, disturbed = measure(options)
    show(rows)
    print(f"the engine alone keeps {rows[0]['busy_cores']:.2f} cores busy")
    print(
        f"{disturbed} windows were repeated, others took more than {MOST_OTHERS:.0%} of the machine"
    )
    for text in broken:
        print(text)
    print("the limits do not hold" if broken else "the limits hold")
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        config = machine(torch.device("cpu"), ["python", "bench/beside_engine.py"]) | settings
        report = {"config": config, "results": rows, "broken": broken, "disturbed": disturbed}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(broken))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # vLLM's native threads do not end by themselves
