"""The page and the JSON of a replay: complete, valid, and in need of nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.replay.machine import GpuSpec, Machine, ModelSpec
from kvtier.replay.options import Options
from kvtier.replay.report import Replays, build_report, charts, render_html, write_json
from kvtier.replay.report.drawings import MAX_ROWS
from kvtier.replay.summary import summarise
from kvtier.replay.sweep import Cell, Outcome, Sweep
from kvtier.replay.workload import Program, Run, Turn

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = Machine(
    model=ModelSpec("small", 1e9, 1e9, 2, 2, 1, 64, 128),
    gpu=GpuSpec("gpu", 1e15, 1e12, 80e9, 50e9),
    n_gpus=1,
    gpu_kv_bytes=1e9,
    dram_bytes=0.0,
    link_bytes_per_s=50e9,
)
EVIL = "<script>alert('x')</script>"
CONTRACT = {
    *("policy", "programs", "completed", "mean_jct_s", "p50_jct_s", "p95_jct_s", "p99_jct_s"),
    *("mean_ttft_s", "p99_ttft_s", "max_ttft_s", "preemptions", "gpu_hit_tokens"),
    *("cpu_hit_tokens", "recomputed_tokens", "steps", "wall_s", "decision_us_p50"),
    "decision_us_p99",
}
COUNTERS = {
    "decisions|pause|pin|memory_free": 3.0,
    "decisions|pause|pin|<odd>": 9.0,
    "loaded_bytes": 1e9,
}
NUMBER = r"-?\d+(?:\.\d+)?"


def programs(n: int) -> tuple[Program, ...]:
    names = [EVIL, *(f"p{i}" for i in range(1, n))]
    chain = (
        Turn((Run(0, 900),), 20, 2.0, "bash"),
        Turn((Run(0, 900), Run(1, 20), Run(2, 80)), 10, 0.0),
    )
    return tuple(Program(name, 1.0 * i, chain) for i, name in enumerate(names))


def replayed(policy: str, work: tuple[Program, ...], scale: float, **changes: Any) -> Any:
    turns = [
        SimpleNamespace(
            program=program.name,
            chain=program.name,
            index=index,
            prompt_tokens=turn.prompt_tokens,
            arrived_s=program.arrival_s + 5 * index * scale,
            first_token_s=program.arrival_s + (5 * index + 1) * scale,
            ended_s=program.arrival_s + (5 * index + 3) * scale,
            gpu_tokens=64 * index,
            cpu_tokens=0,
        )
        for program in work
        for index, turn in enumerate(program.turns)
    ]
    values: dict[str, Any] = {
        "steps": 7,
        "preemptions": 1,
        "busy_s": 5.0,
        "virtual_s": work[-1].arrival_s + 8 * scale,
        "wall_s": 0.5,
        "link_busy_s": {"store": 0.25, "load": 0.5},
        "link_bytes": {"store": 1_500_000_000, "load": 0},
        "decision_us": [],
        "counters": {},
        "memory": [],
    }
    return SimpleNamespace(
        policy=policy,
        turns=turns,
        arrived_s={program.name: program.arrival_s for program in work},
        ended_s={program.name: program.arrival_s + 8 * scale for program in work},
        **(values | changes),
    )


def outcome(
    policy: str, scale: float = 1.0, n: int = 3, value: float | None = None, **changes: Any
) -> Outcome:
    work = programs(n)
    seen = replayed(policy, work, scale, **changes)
    cell = Cell(policy, MACHINE, work, value=value)
    return Outcome(cell, summarise(seen, work, MACHINE), seen)


def memory() -> list[Any]:
    return [
        SimpleNamespace(at_s=i / 100, running=i % 50, pinned=10, cached=40, free=100 - i % 50)
        for i in range(1000)
    ]


def replays(*outcomes: Outcome, sweep: Sweep | None = None) -> Replays:
    names = list(dict.fromkeys(o.cell.policy for o in outcomes))
    n_asked = 1 if sweep is None else len(sweep.values)
    return Replays([Options(EVIL)] * n_asked, sweep, names, {"max_ttl_s": 60.0}, [], outcomes)


def two() -> Replays:
    return replays(
        outcome("vllm-lru", 2.0),
        outcome("kvtier", 1.0, memory=memory(), counters=COUNTERS, decision_us=[3.0, 5.0]),
    )


def page_of(made: Replays) -> str:
    return render_html(build_report(made, wall_clock=True), made)


class Page(HTMLParser):
    """Collects what a page would load, its paths, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.numbers: list[str] = []
        self.paths: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)

    def note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "srcset", "data", "action"}:
                self.loads.append(value or "")
            if name in {"x", "y", "x1", "x2", "y1", "y2"}:
                self.numbers.append(value or "")
            if name == "d":
                css = dict(attrs).get("class") or ""
                self.paths.append((css, value or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_result_has_the_contracts_fields() -> None:
    report = build_report(two(), wall_clock=True)
    assert [row["policy"] for row in report["results"]] == ["vllm-lru", "kvtier"]
    for row in report["results"]:
        assert set(row) >= CONTRACT
    assert report["results"][1]["counters"] == COUNTERS
    assert report["results"][0]["jct_s"] == {EVIL: 16.0, "p1": 16.0, "p2": 16.0}
    assert report["config"]["replayed"]["turns"] == 6
    assert report["config"]["settings"] == {"max_ttl_s": 60.0}
    assert "failed" not in report


def test_json_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(build_report(two(), wall_clock=True), path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)


def test_the_page_needs_nothing_else() -> None:
    html = page_of(two())
    page = Page(html)
    assert page.loads == []
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html)
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert page.open == []
    assert "default-src 'none'" in html


def test_names_are_escaped() -> None:
    html = page_of(two())
    assert EVIL not in html
    assert EVIL in Page(html).text
    assert "pause, pin, <odd>" in Page(html).text


def test_all_coordinates_are_numbers_within_the_drawing() -> None:
    page = Page(page_of(two()))
    assert page.numbers
    for number in page.numbers:
        assert re.fullmatch(NUMBER, number), number
    for css, path in page.paths:
        assert re.fullmatch(rf"([MLHVhv ]{NUMBER}( {NUMBER})?|z|Z)+", path), path
        if not css.startswith("t-"):
            assert all(-1 <= float(number) <= 1001 for number in re.findall(NUMBER, path))


def test_memory_is_stacked_and_thinned() -> None:
    areas = [(css, path) for css, path in Page(page_of(two())).paths if css.startswith("m-")]
    assert [css for css, _ in areas] == ["m-running", "m-pinned", "m-cached", "m-free"]
    for _, path in areas:
        assert path.count("L") < 2 * charts.MAX_POINTS
    without = page_of(replays(outcome("vllm-lru"), outcome("kvtier")))
    assert "GPU memory</h2>" not in without


def test_timelines_show_a_row_for_each_program() -> None:
    rows = [css for css, _ in Page(page_of(two())).paths if css.startswith("t-")]
    assert sorted(rows) == sorted(["t-gap", "t-queued", "t-busy"] * 3 * 2)
    many = page_of(replays(outcome("kvtier", n=MAX_ROWS + 7)))
    assert "7 later programs are not shown" in many
    assert f"p{MAX_ROWS - 1}:" in many
    assert f"p{MAX_ROWS}:" not in many


def test_a_failed_replay_is_told_beside_the_others() -> None:
    failed = Outcome(Cell("kvtier", MACHINE, programs(3)), None, None, "kvtier is stuck at 3 s")
    made = replays(outcome("vllm-lru"), failed)
    report = build_report(made, wall_clock=True)
    assert report["failed"] == [{"policy": "kvtier", "error": "kvtier is stuck at 3 s"}]
    assert [row["policy"] for row in report["results"]] == ["vllm-lru"]
    assert "kvtier is stuck at 3 s" in page_of(made)


def test_real_times_can_be_left_out_of_everything() -> None:
    made = two()
    report = build_report(made, wall_clock=False)
    assert {"wall_s", "decision_us_p50"}.isdisjoint(report["results"][0])
    assert "real" not in "".join(re.findall(r"<tr>.*?</tr>", render_html(report, made)))


def test_a_sweep_has_a_curve_and_a_table() -> None:
    sweep = Sweep.parse("rate=0.1,0.2")
    stuck = Outcome(Cell("kvtier", MACHINE, programs(3), value=0.2), None, None, "stuck")
    made = replays(
        outcome("vllm-lru", 2.0, value=0.1),
        outcome("kvtier", 1.0, value=0.1),
        outcome("vllm-lru", 4.0, value=0.2),
        stuck,
        sweep=sweep,
    )
    report = build_report(made, wall_clock=True)
    assert report["config"]["rate"] == [0.1, 0.2]
    assert report["sweep"] == {
        "option": "rate",
        "values": [0.1, 0.2],
        "mean_jct_s": {"vllm-lru": [16.0, 32.0], "kvtier": [8.0, None]},
    }
    assert [(row["rate"], row["policy"]) for row in report["results"]] == [
        (0.1, "vllm-lru"),
        (0.1, "kvtier"),
        (0.2, "vllm-lru"),
    ]
    page = Page(render_html(report, made))
    assert [css for css, d in page.paths if d != "M0 4H24"] == ["curve hue-0", "curve hue-1"]
    assert "8.0 0.50\N{MULTIPLICATION SIGN}" in page.text


@pytest.mark.parametrize(("n", "kept"), [(1, 1), (300, 300), (301, 300), (5000, 300)])
def test_thinning_keeps_the_ends(n: int, kept: int) -> None:
    indices = charts.thinned(n)
    assert len(indices) == len(set(indices)) == kept
    assert (indices[0], indices[-1]) == (0, n - 1)


def test_an_ecdf_rises_by_a_share_a_value() -> None:
    x = charts.Axis(0.0, 10.0, 0.0, 100.0)
    y = charts.Axis(0.0, 1.0, 100.0, 0.0)
    assert charts.ecdf([4.0, 1.0], x, y) == "M10.0 100.0H10.0V50.0H40.0V0.0H100.0"


def test_ticks_are_round() -> None:
    assert [tick.text for tick in charts.x_axis(2.3).ticks()] == [
        *("0", "0.2", "0.4", "0.6", "0.8", "1", "1.2", "1.4", "1.6", "1.8", "2", "2.2")
    ]
    log = charts.log_axis([0.03, 40.0])
    assert [tick.text for tick in log.ticks()] == ["0.01", "0.1", "1", "10", "100"]
    # Of equal values there is a range still.
    assert [tick.text for tick in charts.log_axis([1.0]).ticks()] == ["1", "10"]
