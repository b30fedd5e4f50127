"""The link benchmark: its cells are what they say, wrong copies are caught, and its files hold to their form."""

from __future__ import annotations

import ctypes
import io
import itertools
import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.copies.plan import plan_order
from kvtier.linkbench import command, measure, model_check, rivals
from kvtier.linkbench.arena import Arena, Memory, Transfer
from kvtier.linkbench.demo_reloads import demo_reloads
from kvtier.linkbench.matrix import (
    BLOCK_BYTES,
    CHUNK_BLOCKS,
    KIB,
    LAYOUTS,
    MIB,
    WAYS,
    Cell,
    block_tables,
    cells,
)
from kvtier.linkbench.measure import Measured, Plan, Row
from kvtier.linkbench.model_check import ModelCheck, Prediction
from kvtier.linkbench.paths import Calls, PathError, TorchPerBlock
from kvtier.linkbench.pen import PlotError
from kvtier.linkbench.plot import write_png
from kvtier.linkbench.report import summary, summary_table, tables, write_json
from kvtier.measuring.link import LinkMeasurement

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CPU = torch.device("cpu")
SMALL = 8 * KIB


@pytest.fixture(scope="module")
def memory() -> Memory:
    return Memory(CPU, 2 * MIB)


@pytest.fixture
def arena(memory: Memory) -> Arena:
    return memory.arena(SMALL)


@pytest.fixture
def without_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise PathError(f"{module} cannot be imported: not here")

    monkeypatch.setattr(rivals, "_import", missing)


def row(path: str, gbps: float, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "path": path,
        "direction": "d2h",
        "block_bytes": SMALL,
        "blocks": 16,
        "layout": "scattered",
        "load": "idle",
        "seconds": 0.1,
        "gbps": gbps,
        "ceiling_gbps": 10.0,
        "efficiency": gbps / 10.0,
        "submit_us": 3.0,
        "submit_us_per_run": 0.5,
        "load_slowdown": None,
        "rounds": 3,
    }
    return Row(**(fields | changes))


# --- cells ---------------------------------------------------------------------------------------


def test_the_matrix_has_every_size_layout_and_way() -> None:
    found = cells(128 * MIB)
    assert {cell.block_bytes for cell in found} == set(BLOCK_BYTES)
    assert (min(BLOCK_BYTES), max(BLOCK_BYTES)) == (8 * KIB, 4 * MIB)
    assert {(cell.layout, cell.way) for cell in found} == set(itertools.product(LAYOUTS, WAYS))
    assert all(cell.blocks % (2 * CHUNK_BLOCKS) == 0 for cell in found)
    largest = [max(c.n_bytes for c in found if c.block_bytes == size) for size in BLOCK_BYTES]
    assert set(largest) == {128 * MIB}
    assert len(cells(128 * MIB, quick=True)) < len(found) / 5
    with pytest.raises(ValueError, match="at least 67108864"):
        cells(32 * MIB)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_cell_has_as_many_runs_as_it_says(arena: Arena, layout: Any, way: Any) -> None:
    cell = Cell(SMALL, 32, layout, way)
    rounds = list(itertools.islice(measure._transfers(arena, cell), 12))
    for transfers in rounds:
        plans = [plan_order(arena.layout, arena.order(t), arena.host.numel()) for t in transfers]
        assert sum(plan.n_runs for plan in plans) == cell.n_runs
        assert sum(plan.n_bytes for plan in plans) == cell.n_bytes
        blocks = np.concatenate([t.block_ids for t in transfers])
        assert len(set(blocks.tolist())) == cell.blocks
    # The next round copies other blocks, or small copies would be copies within a cache.
    first, second = (set(transfers[0].block_ids.tolist()) for transfers in rounds[:2])
    assert not first & second
    assert rounds[0][0].first_slot != rounds[1][0].first_slot


def test_the_same_seed_gives_the_same_tables() -> None:
    one, two = (next(block_tables("scattered", 16, 64, seed=4)) for _ in range(2))
    np.testing.assert_array_equal(one, two)


# --- checking ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_rivals")
def test_every_path_here_copies_right(memory: Memory) -> None:
    measure.check_paths(memory.arena(SMALL, 64), Plan(CPU, MIB, 1), None)


@pytest.mark.parametrize("fault", ["nothing", "one byte", "too much"])
@pytest.mark.usefixtures("without_rivals")
def test_a_path_that_copies_wrongly_is_not_measured(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    class Faulty(TorchPerBlock):
        def prepare(self, transfers: Sequence[Transfer]) -> Any:
            good = super().prepare(transfers)

            def bad() -> None:
                if fault != "nothing":
                    good.start()
                if fault == "one byte":
                    transfer = transfers[-1]
                    block = int(transfer.block_ids[-1])
                    is_load = transfer.direction == "load"
                    last = transfer.first_slot * CHUNK_BLOCKS + len(transfer.block_ids) - 1
                    spot = self._arena.kv_bytes[block] if is_load else self._arena.host_blocks[last]
                    spot[-1] += 1
                if fault == "too much":
                    self._arena.host[-1] += 1

            return Calls([("store", bad)], self._streams)

    monkeypatch.setattr(measure, "TorchPerBlock", Faulty)
    with pytest.raises(PathError, match="torch per block: wrong bytes"):
        measure.check_paths(memory.arena(SMALL, 64), Plan(CPU, MIB, 1), None)


def test_vllms_operator_gets_the_address_of_every_block(arena: Arena) -> None:
    calls: list[tuple[int, bool]] = []

    def swap(
        sources: torch.Tensor,
        targets: torch.Tensor,
        sizes: torch.Tensor,
        *,
        is_src_access_order_any: bool,
    ) -> None:
        calls.append((len(sizes), is_src_access_order_any))
        for source, target, n in zip(sources, targets, sizes, strict=True):
            ctypes.memmove(int(target), int(source), int(n))

    path = object.__new__(rivals.SwapBlocksPath)
    path._arena, path._swap, path._streams = arena, swap, measure.Ceiling(arena, 1, 1)._streams
    for way in ("d2h", "h2d"):
        measure._check(path, arena, Cell(SMALL, 16, "scattered", way))  # type: ignore[arg-type]
    assert calls == [(16, False), (16, True)]
    with pytest.raises(PathError, match="between a GPU and host memory"):
        rivals.SwapBlocksPath(arena)


# --- measuring -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_rivals")
def test_a_run_measures_all_cells_and_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = [Cell(SMALL, 16, "scattered", "d2h"), Cell(SMALL, 32, "contiguous", "both")]
    monkeypatch.setattr(measure, "cells", lambda *_, **__: few)
    monkeypatch.setattr(measure, "_LOADED_BLOCK_BYTES", (SMALL,))
    monkeypatch.setattr(measure, "_WINDOW_S", 0.0)
    told: list[tuple[Cell, int, int]] = []
    measured = measure.run_plan(
        Plan(CPU, MIB, rounds=2, beside_load=False), lambda *a: told.append(a)
    )
    assert [(i, n) for _, i, n in told] == [(0, 2), (1, 2)]
    names = {"ceiling", "kvtier", "torch per block"}
    assert {(r.path, r.blocks) for r in measured.rows} == {
        (n, c.blocks) for n in names for c in few
    }
    assert set(measured.missing) == {"lmcache", "vllm"}
    for found in measured.rows:
        n_bytes = 2 * MIB if found.path == "ceiling" else found.blocks * SMALL
        assert found.gbps == pytest.approx(n_bytes / found.seconds / 1e9)
        assert found.efficiency == pytest.approx(found.gbps / found.ceiling_gbps)
        assert 0 < found.submit_us <= found.seconds * 1e6
        assert 0 < found.submit_us_per_run <= found.submit_us
        assert 2 <= found.rounds <= 8


def test_rounds_go_on_until_the_two_fastest_agree() -> None:
    assert not measure._is_settled([(1.0, 0.0, 0.0)])
    assert not measure._is_settled([(1.0, 0.0, 0.0), (1.1, 0.0, 0.0)])
    assert measure._is_settled(
        [(3.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.02, 0.0, 0.0), (9.0, 0.0, 0.0)]
    )


def test_beside_a_load_the_loads_slowdown_is_reported(arena: Arena) -> None:
    class Load:
        def __init__(self) -> None:
            # Alone and beside, for two paths; alone the best of all counts.
            self.rates = iter([100.0, 50.0, 90.0, 80.0] * 3)

        def begin(self) -> None:
            pass

        def end(self) -> float:
            return next(self.rates)

        def close(self) -> None:
            pass

    paths = [measure.Ceiling(arena, 1, MIB), TorchPerBlock(arena)]
    cell = Cell(SMALL, 16, "scattered", "d2h")
    rows = measure.loaded_rows(paths, arena, cell, Load())
    assert {r.path: r.load_slowdown for r in rows} == {"ceiling": 2.0, "torch per block": 1.25}
    assert {r.load for r in rows} == {"decode"}


def test_the_load_reads_memory_until_it_is_told_to_end() -> None:
    load = measure.decode_load(CPU)
    for _ in range(2):
        load.begin()
        while not load._control[1]:  # type: ignore[attr-defined]
            pass
        assert load.end() > 0
    load.close()


def test_the_models_error_is_of_the_measured_time(monkeypatch: pytest.MonkeyPatch) -> None:
    link = LinkMeasurement(0.0, ((SMALL, 1e9),))
    monkeypatch.setattr(model_check, "measure_link", lambda _, **__: {"store": link, "load": link})
    monkeypatch.setattr(model_check, "QUICK_BLOCK_BYTES", (SMALL,))
    monkeypatch.setattr(model_check, "SMALL_COUNTS", (16,))
    found = model_check.check_model(Plan(CPU, MIB, rounds=1, quick=True))
    assert [(p.blocks, p.layout) for p in found.predictions] == [
        (16, "runs4"),
        (16, "scattered"),
        (128, "runs4"),
        (128, "scattered"),
    ]
    for p in found.predictions:
        assert p.predicted_s == pytest.approx(p.blocks * SMALL / 1e9)
        assert p.measured_s > 0
    three = [Prediction(SMALL, 16, "scattered", p, 1.0) for p in (0.9, 1.5, 1.2)]
    assert ModelCheck(tuple(three)).median_error == pytest.approx(0.2)


def loaded(seconds: float, predicted_s: float, *, ok: bool = True) -> dict[str, Any]:
    fields = {"event": "loaded", "tokens": 64, "seconds": seconds, "predicted_s": predicted_s}
    return fields | {"ok": ok}


def test_a_demos_reloads_are_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    mine = [loaded(1.0, 0.9), loaded(2.0, 3.0), {"event": "pause"}, loaded(1.0, 9.0, ok=False)]
    results = [{"decisions": []}, {"decisions": [*mine, loaded(4.0, 5.0)]}]
    path.write_text(json.dumps({"results": results}))
    found = demo_reloads(path)
    assert found.reloads == ((64, 0.9, 1.0), (64, 3.0, 2.0), (64, 5.0, 4.0))
    assert found.median_error == pytest.approx(0.25)
    assert found.median_ratio == pytest.approx(1.25)
    # At 3/8 of the first one's rate the last two, 1/2 and 1/4 of it, are off by a third each.
    assert found.scatter == pytest.approx(1 / 3)
    check = ModelCheck((Prediction(SMALL, 16, "runs4", 1.0, 2.0),), found)
    assert check.as_object()["demo"]["reloads"][0]["predicted_s"] == 0.9


@pytest.mark.parametrize(
    "text", ["", "[]", '{"results": [{}]}', '{"results": [{"decisions": [{"event": "loaded"}]}]}']
)
def test_a_file_that_is_of_no_demo_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "demo.json").write_text(text)
    with pytest.raises(PathError, match=r"demo\.json is not of kvtier demo"):
        demo_reloads(tmp_path / "demo.json")
    (tmp_path / "demo.json").write_text('{"results": []}')
    with pytest.raises(PathError, match="has reloaded nothing"):
        demo_reloads(tmp_path / "demo.json")


# --- reports -------------------------------------------------------------------------------------


def test_the_json_holds_to_its_contract(tmp_path: Path) -> None:
    measured = Measured([row("ceiling", 10.0), row("kvtier", 9.0)], {"vllm": "why"})
    check = ModelCheck((Prediction(SMALL, 16, "runs4", 1.0, 2.0),))
    write_json(tmp_path / "out.json", {"date": "today"}, measured, check)
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["config"] == {"date": "today"}
    contract = {"path", "direction", "block_bytes", "blocks", "layout", "gbps", "ceiling_gbps"}
    assert contract | {"efficiency", "submit_us"} <= set(data["results"][1])
    assert data["missing"] == {"vllm": "why"}
    assert data["model"]["median_error"] == 0.5
    assert data["model"]["predictions"][0]["error"] == 0.5


def test_the_summary_compares_cell_by_cell() -> None:
    rows = [
        row("ceiling", 10.0),
        row("kvtier", 9.0),
        row("lmcache", 3.0),
        row("kvtier", 8.0, blocks=32),
        row("lmcache", 8.0, blocks=32),
        row("lmcache", 99.0, load="decode", load_slowdown=2.0),
    ]
    own, other = summary(rows)
    assert (own["path"], own["efficiency_min"]) == ("kvtier", 0.8)
    assert own["submit_us_per_run_median"] == 0.5
    assert own["efficiency_median"] == pytest.approx(0.85)
    assert (other["kvtier_over_path_min"], other["kvtier_over_path_median"]) == (1.0, 2.0)
    console = Console(width=160, record=True, file=io.StringIO())
    for table in (*tables(rows), summary_table(rows)):
        console.print(table)
    text = console.export_text()
    assert "9.0 (90%)" in text
    assert "99.0 (2.00x)" in text
    assert "2.00x" in text


def test_the_picture_has_a_field_for_each_layout_and_way(tmp_path: Path) -> None:
    rows = [
        row(path, 5.0 + i, layout=layout, direction=way, block_bytes=size)
        for i, path in enumerate(("ceiling", "kvtier", "lmcache"))
        for layout in LAYOUTS
        for way in ("d2h", "h2d")
        for size in (SMALL, MIB)
    ]
    write_png(tmp_path / "out.png", rows, "a machine")
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG"
        assert image.size == (3 * 380 * 2, (60 + 2 * 250) * 2)
        colours = {colour for _, colour in image.getcolors(1 << 16) or []}
    assert {(0x0B, 0x6B, 0xCB), (0xC4, 0x32, 0x0A), (0x88, 0x88, 0x88)} <= colours


def test_no_picture_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlotError, match="nothing was measured"):
        write_png(tmp_path / "out.png", [], "")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(PlotError, match="pip install pillow"):
        write_png(tmp_path / "out.png", [row("kvtier", 1.0)], "")


# --- the command ---------------------------------------------------------------------------------


def test_the_command_writes_what_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def run(plan: Plan, told: Any) -> Measured:
        plans.append(plan)
        told(Cell(SMALL, 16, "scattered", "d2h"), 0, 1)
        return Measured([row("ceiling", 10.0), row("kvtier", 9.0)], {"vllm": "no GPU here"})

    monkeypatch.setattr(command, "run_plan", run)
    files = ["--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png")]
    monkeypatch.setattr(sys, "argv", ["kvtier", "bench", "link", "--quick", *files])
    result = CliRunner().invoke(app, ["bench", "link", "--quick", "--device", "cpu", *files])
    assert result.exit_code == 0, result.output
    assert "measuring blocks of 8 KiB" in result.output
    assert "vllm: not measured: no GPU here" in result.output
    assert (tmp_path / "a.png").stat().st_size > 1000
    config = json.loads((tmp_path / "a.json").read_text())["config"]
    assert config["command"] == "kvtier bench link --quick --json FILE --png FILE"
    assert {"date", "cpu", "gpu", "driver", "versions", "total_bytes", "rounds"} <= set(config)
    assert plans == [Plan(CPU, 128 * MIB, rounds=3, quick=True)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "tpu"], "accepted are auto, cpu, cuda and cuda:N"),
        (["--total-mib", "8"], "greater than or equal to 64"),
        (["--json", "/nowhere/a.json", "--device", "cpu"], "No such file"),
    ],
)
def test_what_cannot_be_done_is_told(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_plan", lambda *_: Measured([row("kvtier", 1.0)]))
    result = CliRunner().invoke(app, ["bench", "link", *words])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
