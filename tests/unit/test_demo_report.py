"""The demo's report: the JSON contract, its figures, and a page that needs nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.demo.arms import AGING_S, Arm
from kvtier.demo.driver import ArmRun, TurnRecord
from kvtier.demo.metrics_scrape import EngineCounters
from kvtier.demo.report import (
    ArmResult,
    build_report,
    job_completion_s,
    read_decisions,
    render_html,
    write_json,
)
from kvtier.demo.runner import aging_s

if TYPE_CHECKING:
    from pathlib import Path

CONTRACT = [
    "policy",
    "programs",
    "completed",
    "mean_jct_s",
    "p50_jct_s",
    "p95_jct_s",
    "p99_jct_s",
    "mean_ttft_s",
    "p99_ttft_s",
    "max_ttft_s",
    "preemptions",
    "gpu_hit_tokens",
    "cpu_hit_tokens",
    "recomputed_tokens",
    "steps",
    "wall_s",
    "decision_us_p50",
    "decision_us_p99",
]
CONFIG = {"programs": 2, "turns": 2, "kv_tokens": 6080, "final_tokens": 9000, "seed": 5}
STARTED_UNIX_S = 1_700_000_000.0


def turn(program: str, index: int, arrival_s: float, **changes: Any) -> TurnRecord:
    values: dict[str, Any] = {
        "request_id": f"cmpl-{program}{index}",
        "first_token_s": arrival_s + 1.0,
        "end_s": arrival_s + 3.0,
        "queue_s": 0.5,
        "tool": "grep" if index == 0 else None,
        "gap_s": 2.0 if index == 0 else 0.0,
        "prompt_tokens": 100,
        "output_tokens": 10,
        "known_tokens": 0,
        "cached_tokens": 0,
    }
    return TurnRecord(program=program, turn=index, arrival_s=arrival_s, **(values | changes))


def run(scale: float = 1.0, digest: str = "d1") -> ArmRun:
    again = {"known_tokens": 110, "prompt_tokens": 150, "cached_tokens": 96}
    turns = (
        turn("ada", 0, 0.0),
        turn("ada", 1, 5.0 * scale, **again, gpu_tokens=64, cpu_tokens=32),
        turn("<bob>", 0, 1.0),
        turn("<bob>", 1, 9.0 * scale, **again, gpu_tokens=96),
    )
    return ArmRun(turns, EngineCounters(500, 160, 32, 308, 40, 3, 77), 12.0, digest, STARTED_UNIX_S)


def decision(request_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "ts_s": STARTED_UNIX_S + 2.5,
        "event": "pause",
        "program": "0f0f",
        "request_id": request_id,
        "action": "pin",
        "ttl_s": 4.0,
        "reason": "memory_free",
        "costs": {"pin": 0.1, "drop": 2.0},
    } | changes


DECISIONS = (
    decision("cmpl-warm-up-0-0a1b2c3d"),
    decision("cmpl-ada0-0-0a1b2c3d", decision_us=10.0),
    decision("cmpl-<bob>0-0-00000000", event="release", cause="</pre><script>x</script>"),
)


def report(**changes: Any) -> dict[str, Any]:
    results = [
        ArmResult(Arm.PLAIN, run(2.0), 9.0),
        ArmResult(Arm.KVTIER, run(1.0, **changes), 9.0, DECISIONS, aging_s=12.5),
    ]
    return build_report(CONFIG, "d1", 2, results)


def test_kvtiers_programs_age_as_the_longest_wait_on_plain_vllm_demands() -> None:
    def plain(ttft_s: float) -> ArmResult:
        turns = (turn("ada", 0, 0.0), turn("ada", 1, 5.0, first_token_s=5.0 + ttft_s))
        return ArmResult(Arm.PLAIN, replace(run(), turns=turns), 9.0)

    assert aging_s([plain(100.0), ArmResult(Arm.STOCK, run(5.0), 9.0)]) == 75.0
    # kvtier takes 0 for: never.
    assert aging_s([plain(0.01)]) > 0
    assert aging_s([]) == aging_s([ArmResult(Arm.STOCK, run(5.0), 9.0)]) == AGING_S


def test_every_result_has_the_contracts_fields() -> None:
    made = report()
    assert made["config"] == CONFIG
    assert [row["policy"] for row in made["results"]] == ["vllm-lru", "kvtier"]
    for row in made["results"]:
        assert set(CONTRACT) <= row.keys()
        for name in CONTRACT[1:-2]:
            assert isinstance(row[name], int | float), name
    assert [row["aging_s"] for row in made["results"]] == [None, 12.5]


def test_figures() -> None:
    plain, kvtier = report()["results"]
    # From the first arrival to the last token: ada 0 -> 8, <bob> 1 -> 12.
    assert kvtier["mean_jct_s"] == pytest.approx((8 + 11) / 2)
    assert kvtier["p50_jct_s"] == pytest.approx(9.5)
    assert (kvtier["completed"], kvtier["programs"]) == (2, 2)
    assert (kvtier["mean_ttft_s"], kvtier["max_ttft_s"]) == (1.0, 1.0)
    assert (kvtier["gpu_hit_tokens"], kvtier["cpu_hit_tokens"]) == (160, 32)
    # Two returns with 110 tokens known and 96 found.
    assert kvtier["recomputed_tokens"] == 28
    assert (kvtier["preemptions"], kvtier["steps"]) == (3, 77)
    assert kvtier["decision_us_p50"] == 10.0
    assert plain["decision_us_p50"] is None
    assert report()["ratios"]["kvtier/vllm-lru"] == pytest.approx(
        kvtier["mean_jct_s"] / plain["mean_jct_s"]
    )


def test_jct_is_per_program_and_ignores_the_order_of_turns() -> None:
    turns = list(run().turns)
    assert job_completion_s(reversed(turns)) == {"ada": 8.0, "<bob>": 11.0}


def test_other_work_in_one_arm_is_told() -> None:
    assert report()["same_work"] is True
    other = report(digest="d2")
    assert other["same_work"] is False
    assert "The engines did not do the same work" in render_html(other)


def test_decisions_get_the_programs_name_and_the_runs_clock() -> None:
    found = report()["results"][1]["decisions"]
    assert [entry["program"] for entry in found] == ["ada", "<bob>"]
    assert found[0]["ts_s"] == pytest.approx(2.5)


def test_json_file_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    made = report()
    write_json(made, path)
    assert json.loads(path.read_text()) == made


def test_decision_log_may_be_absent_or_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    assert read_decisions(path) == ()
    path.write_text('{"a": 1}\n{"b": 2}\n{"c": ')
    assert read_decisions(path) == ({"a": 1}, {"b": 2})
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="Expecting value"):
        read_decisions(path)


class _Page(HTMLParser):
    """Checks nesting and collects what a browser would fetch, run or show."""

    _VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})
    _FETCHING = frozenset({"src", "href", "data", "action", "poster", "srcset", "xlink:href"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[tuple[str, str | None]] = []
        self.scripts = 0
        self.rects = 0
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [(tag, value) for name, value in attrs if name in self._FETCHING]
        self.scripts += tag == "script"
        self.rects += tag == "rect"
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.remove(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    return page


def test_page_is_whole_and_self_contained() -> None:
    html = render_html(report())
    page = parse(html)
    assert page.open == []
    assert page.fetched == []
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "url(" not in html
    # Its own one; what a decision log holds is text.
    assert page.scripts == 1


def test_page_shows_every_arm_program_and_decision() -> None:
    page = parse(render_html(report()))
    text = " ".join(" ".join(page.text).split())
    for expected in ("plain vLLM", "vLLM + kvtier", "ada", "<bob>", "memory_free", "9.50 s"):
        assert expected in text
    # Per turn waiting and generating, per pause a tool, and a share for every source.
    assert page.rects >= 2 * (4 * 2 + 2)


def test_page_without_decisions_or_queue_times() -> None:
    turns = tuple(turn(name, 0, 0.0, queue_s=None) for name in ("ada", "<bob>"))
    only = ArmRun(turns, EngineCounters(200), 3.0, "d1", STARTED_UNIX_S)
    page = parse(render_html(build_report(CONFIG, "d1", 2, [ArmResult(Arm.PLAIN, only, 9.0)])))
    assert page.open == []
    assert page.scripts == 0
