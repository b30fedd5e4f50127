"""`kvtier calibrate`: what it measures, how long it goes on, what it keeps and what it shows."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kvtier.calibration import (
    CalibrationError,
    LinkMeasurement,
    MoverMeasurement,
    PrefillSample,
    fastest,
    load_profile,
    machine_profile_path,
    profile_of,
)
from kvtier.cli import app
from kvtier.linkbench.matrix import MIB
from kvtier.measuring import command, prefill
from kvtier.measuring.ceiling import measure_ceilings
from kvtier.measuring.link import measure_movers
from kvtier.measuring.prefill import EngineLimits, grid, measure_prefill
from kvtier.measuring.show import crossover, profile_lines, profile_tables

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CPU = torch.device("cpu")
LIMITS = EngineLimits(context_tokens=4096, step_tokens=1024, block_tokens=16, vocabulary=1000)
DMA = LinkMeasurement(1e-5, ((4096, 1e9), (65536, 4e10)))
KERNEL = LinkMeasurement(3e-5, ((4096, 2e10), (65536, 3e10)))
MOVERS = (
    MoverMeasurement("store", "dma", DMA),
    MoverMeasurement("store", "kernel", DMA),
    MoverMeasurement("load", "dma", DMA),
    MoverMeasurement("load", "kernel", KERNEL),
)


class FakeEngine:
    """Prefills in 1 ms a new token, and remembers prompts by blocks of 16."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.seen: set[tuple[int, ...]] = set()
        self.prompts: list[list[int]] = []
        self.remembers = True

    def prefill_s(self, prompt: Sequence[int]) -> tuple[float, int]:
        self.prompts.append(list(prompt))
        cached = max(
            (n for n in range(0, len(prompt), 16) if tuple(prompt[:n]) in self.seen), default=0
        )
        if self.remembers:
            self.seen |= {tuple(prompt[:n]) for n in range(16, len(prompt) + 1, 16)}
        seconds = 0.001 * (len(prompt) - cached)
        self.now_s += seconds
        return seconds, cached


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    clock = SimpleNamespace(perf_counter=lambda: fake.now_s)
    monkeypatch.setattr(prefill, "time", clock)
    return fake


# --- prefill -------------------------------------------------------------------------------------


def test_the_grid_stays_within_the_engine_and_begins_with_what_is_cheap() -> None:
    pairs = grid(LIMITS)
    assert pairs[0] == (0, 64)
    assert {cached for cached, _ in pairs} == {0, 496, 2032}
    assert all(cached % 16 == 0 and new <= 1024 and cached + new <= 4080 for cached, new in pairs)
    assert [n * (c + n) for c, n in pairs] == sorted(n * (c + n) for c, n in pairs)
    assert grid(EngineLimits(40, 1024, 16, 1000)) == []


def test_each_sample_is_of_new_tokens_after_cached_ones(engine: FakeEngine) -> None:
    samples = measure_prefill(LIMITS, engine.prefill_s, budget_s=1e9)
    assert {(s.cached_tokens, s.new_tokens) for s in samples} == set(grid(LIMITS))
    assert all(s.seconds == pytest.approx(0.001 * s.new_tokens) for s in samples)
    assert all(min(prompt) >= 100 for prompt in engine.prompts)  # no special tokens


def test_it_ends_when_the_next_would_exceed_the_budget(engine: FakeEngine) -> None:
    samples = measure_prefill(LIMITS, engine.prefill_s, budget_s=2.0)
    assert 0 < len(samples) < len(grid(LIMITS))
    assert engine.now_s < 2.0


def test_an_engine_that_does_not_cache_gives_no_sample_after_cached_tokens(
    engine: FakeEngine,
) -> None:
    engine.remembers = False
    samples = measure_prefill(LIMITS, engine.prefill_s, budget_s=1e9)
    assert samples
    assert {s.cached_tokens for s in samples} == {0}


# --- the link ------------------------------------------------------------------------------------


def test_the_ceiling_is_measured_each_way_and_both_ways() -> None:
    ceilings = measure_ceilings(CPU, 8 * MIB)
    assert set(ceilings) == {"d2h", "h2d", "both"}
    assert all(rate > 1e7 for rate in ceilings.values())


def test_the_engines_own_link_is_the_faster_way_at_each_size() -> None:
    links = fastest(MOVERS)
    assert links["load"].points == ((4096, 2e10), (65536, 4e10))
    assert links["load"].latency_s == 1e-5
    assert measure_movers(CPU) == ()


def test_the_crossover_is_the_longest_run_for_which_the_kernel_is_faster() -> None:
    switch = profile_of("", "", CPU, fastest(MOVERS), movers=MOVERS).switch()
    assert crossover(switch, "load", [4096, 65536]) == "by kernel for runs up to 4 KiB"
    assert crossover(switch, "store", [4096, 65536]) == "by DMA always"
    alone = profile_of("", "", CPU, fastest(MOVERS[::2]), movers=MOVERS[::2]).switch()
    assert "the kernel cannot be used" in crossover(alone, "load", [4096])


def test_a_profile_is_shown_by_run_size_and_mover() -> None:
    profile = profile_of(
        "m", "f", CPU, fastest(MOVERS), [PrefillSample(512, 64, 0.5)], MOVERS, {"d2h": 5e10}
    )
    console = Console(width=160, record=True, file=io.StringIO())
    for table in profile_tables(profile):
        console.print(table)
    text = console.export_text() + "\n".join(profile_lines(profile))
    for shown in ("load by kernel", "64 KiB", "40.0", "512", "128", "KV cache to host memory 50.0"):
        assert shown in text


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def _measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVTIER_PROFILE_DIR", str(tmp_path))
    monkeypatch.setattr(command, "measure_ceilings", lambda _: {"d2h": 5e10})
    monkeypatch.setattr(command, "measure_movers", lambda _: ())
    monkeypatch.setattr(command, "measure_link", lambda _: {"store": DMA, "load": KERNEL})


@pytest.mark.usefixtures("_measured")
def test_the_link_alone_is_kept_for_every_engine_of_the_machine(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--link-only"])
    assert result.exit_code == 0, result.output
    path = machine_profile_path(tmp_path)
    assert f"kept in {path}" in result.output
    kept = load_profile(path)
    assert kept is not None
    assert (kept.model, kept.store, kept.load, kept.ceilings) == ("", DMA, KERNEL, {"d2h": 5e10})
    printed = json.loads(CliRunner().invoke(app, ["calibrate", "--link-only", "--json"]).stdout)
    assert printed["file"] == str(path)
    assert printed["load"]["points"] == [[4096, 2e10], [65536, 3e10]]


@pytest.mark.parametrize("words", [[], ["--link-only", "MODEL"]])
def test_a_model_or_the_link_alone(words: list[str]) -> None:
    result = CliRunner().invoke(app, ["calibrate", *words])
    assert result.exit_code == 2
    assert "give a MODEL, or --link-only" in result.output


@pytest.mark.usefixtures("_measured")
def test_a_failed_measurement_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise CalibrationError("calibration copy failed: no memory")

    monkeypatch.setattr(command, "measure_ceilings", fail)
    result = CliRunner().invoke(app, ["calibrate", "--link-only"])
    assert (result.exit_code, "no memory" in result.output) == (2, True)
    assert list(tmp_path.iterdir()) == []
