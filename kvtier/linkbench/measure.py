"""Measures every path in every cell, all paths in turn in each round, so that noise hits all alike."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from kvtier.linkbench.arena import Arena, Memory, Transfer
from kvtier.linkbench.decode_load import DecodeLoad, decode_load
from kvtier.linkbench.matrix import CHUNK_BLOCKS, KIB, LAYOUTS, MIB, WAYS, Cell, block_tables, cells
from kvtier.linkbench.paths import (
    CEILING,
    Ceiling,
    Path,
    PathError,
    TorchPerBlock,
    Ways,
    kvtier_paths,
    measured_ways,
)
from kvtier.linkbench.rivals import LMCachePath, SwapBlocksPath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_CHECK_BLOCKS: Final = 4 * CHUNK_BLOCKS
_SETTLED: Final = 0.03
_MOST_ROUNDS: Final = 4
_WINDOW_S: Final = 0.15
"""How long a path copies beside the load at a time, and the load runs alone."""
_WINDOWS: Final = 3
_LOADED_BLOCK_BYTES: Final = (32 * KIB, MIB)
_SEED: Final = 0


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        device: of the KV cache.
        total_bytes: of the largest copy of each block size. Twice of it is taken on each side.
        rounds: of every path in every cell, at least; up to `_MOST_ROUNDS` times as many until the two
            fastest of each path are within `_SETTLED` of each other. The fastest counts.
        threads: of torch, LMCache and the ceiling's ``memcpy``, on CPU.
        quick: few cells.
        beside_load: whether some large cells are measured beside a decode-like load too.
    """

    device: torch.device
    total_bytes: int
    rounds: int
    threads: int = 1
    quick: bool = False
    beside_load: bool = True


@dataclass
class Row:
    """One path in one cell; the fields of the JSON.

    Attributes:
        path: name of the path.
        direction: see `matrix.Way`.
        block_bytes, blocks, layout: the cell.
        load: "idle", or "decode" beside a load bound by the device's memory.
        seconds: fastest round, from before the submission until all bytes are there. Beside a load: the
            mean of the fastest of some windows.
        gbps: bytes over seconds, 1e9 bytes a second.
        ceiling_gbps: one large copy in the same rounds.
        efficiency: gbps / ceiling_gbps.
        submit_us: microseconds until the caller was free for other work, in the fastest round.
        submit_us_per_run: the same and what other threads took to submit, for each run after merging.
            Of paths that copy while they submit, as all but kvtier's do on CPU, it is no submitting.
        load_slowdown: time of the load over its time alone; None when idle.
        rounds: how many rounds.
    """

    path: str
    direction: str
    block_bytes: int
    blocks: int
    layout: str
    load: str
    seconds: float
    gbps: float
    ceiling_gbps: float
    efficiency: float
    submit_us: float
    submit_us_per_run: float
    load_slowdown: float | None
    rounds: int

    def as_object(self) -> dict[str, Any]:
        """The row for JSON."""
        return asdict(self)


@dataclass
class Measured:
    """Everything that was found.

    Attributes:
        rows: see `Row`.
        missing: path and why it was not measured.
    """

    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def run_plan(plan: Plan, told: Callable[[Cell, int, int], None]) -> Measured:
    """Check and measure.

    Args:
        plan: what.
        told: called with each cell before it is measured, its index and the number of cells.

    Raises:
        PathError: a path copied wrongly or failed.
    """
    all_cells = cells(plan.total_bytes, quick=plan.quick)
    torch.set_num_threads(plan.threads)
    memory = Memory(plan.device, 2 * plan.total_bytes)
    measured = Measured()
    ways = measured_ways(plan.device)
    load = decode_load(plan.device) if plan.beside_load else None
    done = 0
    for block_bytes in sorted({cell.block_bytes for cell in all_cells}):
        check_paths(memory.arena(block_bytes, _CHECK_BLOCKS), plan, ways)
        arena = memory.arena(block_bytes)
        paths = all_paths(arena, plan, ways, measured.missing)
        try:
            mine = [cell for cell in all_cells if cell.block_bytes == block_bytes]
            largest = max(cell.blocks for cell in mine)
            for cell in mine:
                told(cell, done, len(all_cells))
                done += 1
                measured.rows += idle_rows(paths, arena, cell, plan.rounds)
                if load is not None and cell.blocks == largest and _is_loaded(cell):
                    measured.rows += loaded_rows(paths, arena, cell, load)
        finally:
            for path in paths:
                path.close()
    if load is not None:
        load.close()
    return measured


def all_paths(arena: Arena, plan: Plan, ways: Ways | None, missing: dict[str, str]) -> list[Path]:
    """Every path that can be had, the ceiling first; the others' reasons go into ``missing``."""
    n_bytes = arena.kv_bytes.numel()
    paths: list[Path] = [Ceiling(arena, plan.threads, n_bytes), *kvtier_paths(arena, ways)]
    paths.append(TorchPerBlock(arena))
    for rival in (LMCachePath, SwapBlocksPath):
        try:
            paths.append(rival(arena))
        except PathError as error:
            missing[rival.name] = str(error)
    return paths


def check_paths(arena: Arena, plan: Plan, ways: Ways | None) -> None:
    """Hold every path against a naive reference, byte for byte and both ways.

    Raises:
        PathError: a byte is wrong; the message says of which path.
    """
    for path in all_paths(arena, plan, ways, {}):
        try:
            if path.name != CEILING:
                for layout in LAYOUTS:
                    for way in WAYS:
                        _check(path, arena, Cell(arena.block_bytes, 2 * CHUNK_BLOCKS, layout, way))
        finally:
            path.close()


def _check(path: Path, arena: Arena, cell: Cell) -> None:
    transfers = next(_transfers(arena, cell))
    # A path that copies nothing must not pass by finding the right bytes there.
    arena.host.random_()
    expected = arena.expected(transfers)
    if arena.equals(expected):
        raise AssertionError
    copy = path.prepare(transfers)
    copy.start()
    copy.wait()
    if not arena.equals(expected):
        raise PathError(f"{path.name}: wrong bytes ({cell.layout} blocks, {cell.way})")


def _transfers(arena: Arena, cell: Cell) -> Iterator[list[Transfer]]:
    """Transfers of one round after the other, over ever new blocks and slots."""
    slots_used = cell.blocks // CHUNK_BLOCKS
    n_slots = arena.n_blocks // CHUNK_BLOCKS
    first = 0
    for ids in block_tables(cell.layout, cell.blocks, arena.n_blocks, _SEED):
        if first + slots_used > n_slots:
            first = 0
        if cell.way == "both":
            half = cell.blocks // 2
            middle = first + half // CHUNK_BLOCKS
            yield [Transfer("load", ids[:half], first), Transfer("store", ids[half:], middle)]
        else:
            yield [Transfer("store" if cell.way == "d2h" else "load", ids, first)]
        first += slots_used


def _timed(path: Path, transfers: Sequence[Transfer]) -> tuple[float, float, float]:
    """Seconds of a copy, until the caller was free, and that other threads took to submit."""
    copy = path.prepare(transfers)
    started_s = time.perf_counter()
    copy.start()
    submitted_s = time.perf_counter()
    copy.wait()
    return time.perf_counter() - started_s, submitted_s - started_s, copy.issue_s


def idle_rows(paths: Sequence[Path], arena: Arena, cell: Cell, rounds: int) -> list[Row]:
    """All paths in turn, so many rounds and one before that only warms up."""
    transfers = _transfers(arena, cell)
    times: dict[str, list[tuple[float, float, float]]] = {path.name: [] for path in paths}
    for i in range(_MOST_ROUNDS * rounds + 1):
        if i > rounds and all(map(_is_settled, times.values())):
            break
        # A path that is always first would always find the caches of the last one.
        for path in [*paths[i % len(paths) :], *paths[: i % len(paths)]]:
            taken = _timed(path, next(transfers))
            if i:
                times[path.name].append(taken)
    best = {name: min(taken) for name, taken in times.items()}
    large = arena.kv_bytes.numel()
    ceiling_gbps = large / best[CEILING][0] / 1e9
    rows = []
    for name, (seconds, submit_s, issue_s) in best.items():
        n_bytes = large if name == CEILING else cell.n_bytes
        rows.append(
            _row(
                cell,
                name,
                n_bytes,
                seconds,
                submit_s,
                issue_s,
                ceiling_gbps,
                load=None,
                rounds=len(times[name]),
            )
        )
    return rows


def _is_settled(times: list[tuple[float, float, float]]) -> bool:
    """Whether another round would hardly find a faster one: nobody disturbed the two fastest."""
    fastest = sorted(seconds for seconds, _, _ in times)[:2]
    return len(fastest) > 1 and fastest[1] <= fastest[0] * (1 + _SETTLED)


def _is_loaded(cell: Cell) -> bool:
    return (
        cell.block_bytes in _LOADED_BLOCK_BYTES
        and cell.layout == "scattered"
        and cell.way != "both"
    )


def loaded_rows(paths: Sequence[Path], arena: Arena, cell: Cell, load: DecodeLoad) -> list[Row]:
    """Every path for a while beside the load, and the load alone before it, in turn."""
    transfers = _transfers(arena, cell)
    alone_per_s = 0.0
    best: dict[str, tuple[float, float, float]] = {}
    beside_per_s = dict.fromkeys((path.name for path in paths), 0.0)
    copied = dict.fromkeys((path.name for path in paths), 0)
    for _ in range(_WINDOWS):
        for path in paths:
            load.begin()
            time.sleep(_WINDOW_S)
            alone_per_s = max(alone_per_s, load.end())
            copies: list[tuple[float, float, float]] = []
            load.begin()
            until_s = time.perf_counter() + _WINDOW_S
            while time.perf_counter() < until_s or not copies:
                copies.append(_timed(path, next(transfers)))
            beside_per_s[path.name] = max(beside_per_s[path.name], load.end())
            copied[path.name] += len(copies)
            seconds, submits, issues = map(statistics.fmean, zip(*copies, strict=True))
            mean = seconds, submits, issues
            best[path.name] = min(best.get(path.name, mean), mean)
    large = arena.kv_bytes.numel()
    ceiling_gbps = large / best[CEILING][0] / 1e9
    return [
        _row(
            cell,
            name,
            large if name == CEILING else cell.n_bytes,
            seconds,
            submit_s,
            issue_s,
            ceiling_gbps,
            load=alone_per_s / beside_per_s[name],
            rounds=copied[name],
        )
        for name, (seconds, submit_s, issue_s) in best.items()
    ]


def _row(
    cell: Cell,
    name: str,
    n_bytes: int,
    seconds: float,
    submit_s: float,
    issue_s: float,
    ceiling_gbps: float,
    *,
    load: float | None,
    rounds: int,
) -> Row:
    gbps = n_bytes / seconds / 1e9
    return Row(
        path=name,
        direction=cell.way,
        block_bytes=cell.block_bytes,
        blocks=cell.blocks,
        layout=cell.layout,
        load="idle" if load is None else "decode",
        seconds=seconds,
        gbps=gbps,
        ceiling_gbps=ceiling_gbps,
        efficiency=gbps / ceiling_gbps,
        submit_us=submit_s * 1e6,
        submit_us_per_run=(submit_s + issue_s) * 1e6 / (1 if name == CEILING else cell.n_runs),
        load_slowdown=load,
        rounds=rounds,
    )
