"""The command `kvtier replay`: what it refuses, and what it prints and writes. No replay runs here."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.replay import command
from kvtier.replay.summary import summarise
from kvtier.replay.sweep import Cell, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SWE = "synthetic:swe-bench"
runner = CliRunner()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVTIER_CONFIG_FILE", raising=False)


def refused(*words: str) -> str:
    result = runner.invoke(app, ["replay", *words])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a replay would begin")

    monkeypatch.setattr(command, "run_cells", fail)


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Replay nothing: every turn takes three seconds. Return the cells that were to be replayed."""
    seen: list[Cell] = []

    def run(given: Sequence[Cell], jobs: int, told: Callable[[int, int], None]) -> list[Outcome]:
        seen.extend(given)
        outcomes = []
        for index, cell in enumerate(given):
            told(index, 0)
            told(index, len(cell.programs))
            outcomes.append(fake_outcome(cell))
        return outcomes

    # Its variables are not for the tests after this one.
    monkeypatch.setattr(command, "_require_vllm", lambda: None)
    monkeypatch.setattr(command, "quiet_vllm", lambda **_: None)
    monkeypatch.setattr(command, "run_cells", run)
    return seen


def fake_outcome(cell: Cell) -> Outcome:
    if cell.policy == "oracle":
        return Outcome(cell, None, None, "oracle is stuck at 3.0 s")
    slower = 2.0 if cell.policy == "vllm-lru" else 1.0
    turns = []
    ended_s = {}
    for program in cell.programs:
        now_s = program.arrival_s
        for index, turn in enumerate(program.turns):
            turns.append(
                SimpleNamespace(
                    program=program.name,
                    chain=program.name,
                    index=index,
                    prompt_tokens=turn.prompt_tokens,
                    arrived_s=now_s,
                    first_token_s=now_s + slower,
                    ended_s=now_s + 3 * slower,
                    gpu_tokens=0,
                    cpu_tokens=0,
                )
            )
            now_s += 3 * slower
        ended_s[program.name] = now_s
    replayed: Any = SimpleNamespace(
        policy=cell.policy,
        turns=turns,
        arrived_s={program.name: program.arrival_s for program in cell.programs},
        ended_s=ended_s,
        steps=7,
        preemptions=0,
        busy_s=5.0,
        virtual_s=max(ended_s.values()),
        wall_s=0.5,
        link_busy_s={},
        link_bytes={},
        decision_us=[],
        counters={},
        memory=[],
    )
    return Outcome(cell, summarise(replayed, cell.programs, cell.machine), replayed)


def test_help_teaches() -> None:
    result = runner.invoke(app, ["replay", "--help"])
    assert result.exit_code == 0
    assert "Usage: kvtier replay" in result.output
    for word in (
        "synthetic:",
        "swe-bench",
        "llama-3.1-8b",
        "h100",
        "--sweep",
        "Examples:",
        "ideal",
    ):
        assert word in result.output
    assert "replay" in runner.invoke(app, ["--help"]).output


def test_help_and_errors_need_no_vllm() -> None:
    script = (
        "import sys\n"
        "from kvtier.cli import app\n"
        "for words in (['--help'], ['nowhere'], ['synthetic:uniform', '--policy', 'best']):\n"
        "    try: app(['replay', *words])\n"
        "    except SystemExit as end: print('exit', end.code)\n"
        "assert not {'vllm', 'torch', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert codes == ["exit 0", "exit 2", "exit 2"]


@pytest.mark.usefixtures("no_vllm")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], ["WORKLOAD", "'nowhere'", "synthetic:swe-bench"]),
        (["synthetic:no"], ["WORKLOAD", "'no'", "swe-bench, bfcl"]),
        ([SWE, "--max-input-tokens", "10"], ["WORKLOAD", SWE, "no program within"]),
        ([SWE, "--model", "gpt"], ["--model", "'gpt'", "llama-3.1-8b"]),
        ([SWE, "--hardware", "abacus"], ["--hardware", "'abacus'", "h100"]),
        ([SWE, "--model", "llama-3.1-70b"], ["--gpu-kv-gb", "no memory for KV"]),
        ([SWE, "--gpu-kv-gb", "1"], ["--gpu-kv-gb", "7,616 tokens", "--max-input-tokens"]),
        ([SWE, "--rate", "nan"], ["--rate", "nan: accepted is a number above 0"]),
        ([SWE, "--rate", "fast"], ["--rate", "'fast': accepted is a number"]),
        ([SWE, "--programs", "0"], ["--programs", "0: accepted is a whole number from 1"]),
        ([SWE, "--jobs", "0"], ["--jobs", "0: accepted is a whole number from 1"]),
        ([SWE, "--seed", "-1"], ["--seed", "-1: accepted is a whole number from 0"]),
        ([SWE, "--arrivals", "now"], ["--arrivals", "'now'", "poisson, recorded, fixed"]),
        ([SWE, "--arrivals", "fixed"], ["--arrivals", "--concurrency"]),
        ([SWE, "--concurrency", "2"], ["--concurrency", "2: accepted with --arrivals fixed"]),
        ([SWE, "--policy", "kvtier,best"], ["--policy", "'best'", "vllm-lru, offload-lru"]),
        ([SWE, "--policy", "ideal,ideal"], ["--policy", "'ideal,ideal'", "at most once"]),
        ([SWE, "--settings", "{"], ["--settings", "'{'", "no JSON"]),
        ([SWE, "--settings", '{"max_ttl_s": 1}'], ["--settings", "'max_ttl_s'", "kvtier."]),
        ([SWE, "--settings", '{"kvtier.max_ttl": 1}'], ["--settings", "kvtier.max_ttl_s?"]),
        ([SWE, "--settings", '{"kvtier.max_ttl_s": -1}'], ["kvtier.max_ttl_s=-1", ">= 0"]),
        ([SWE, "--settings", '{"kvtier.tier": "off"}'], ["kvtier.tier", "--dram-gb"]),
        (
            [SWE, "--policy", "ideal", "--settings", '{"kvtier.max_ttl_s": 1}'],
            ["--settings", "with kvtier among the policies"],
        ),
        ([SWE, "--sweep", "model=a"], ["--sweep", "'model=a'", "rate", "max-gap-s"]),
        ([SWE, "--sweep", "rate"], ["--sweep", "rate=1,2,4"]),
        ([SWE, "--sweep", "rate=1,-1"], ["--sweep", "rate=-1: accepted is a number above 0"]),
        ([SWE, "--sweep", "gpus=1.5"], ["--sweep", "gpus=1.5", "whole number from 1"]),
        ([SWE, "--sweep", "rate=1,1"], ["--sweep", "each value once"]),
        (
            [SWE, "--sweep", "rate=1,2", "--arrivals", "recorded"],
            ["--sweep", "--arrivals recorded; accepted is poisson"],
        ),
        ([SWE, "--json", "/nowhere/a.json"], ["--json", "/nowhere/a.json"]),
        ([SWE, "--html", "/"], ["--html", "accepted is a file"]),
    ],
)
def test_bad_input_is_told(words: list[str], told: list[str]) -> None:
    output = refused(*words)
    for part in told:
        assert part in output


@pytest.mark.usefixtures("cells")
def test_table_json_and_page(tmp_path: Path) -> None:
    json_file, html_file = tmp_path / "out.json", tmp_path / "out.html"
    result = runner.invoke(
        app,
        [
            *("replay", SWE, "--programs", "3", "--policy", "vllm-lru,kvtier"),
            *("--settings", '{"kvtier.max_ttl_s": 60}'),
            *("--json", str(json_file), "--html", str(html_file)),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "(0.50x)" in result.stdout
    assert "computed again" in result.stdout
    assert "kvtier: 3 programs have ended" in result.stderr
    report = json.loads(json_file.read_text())
    assert [row["policy"] for row in report["results"]] == ["vllm-lru", "kvtier"]
    assert report["config"]["settings"]["max_ttl_s"] == 60
    assert report["config"]["replayed"]["programs"] == 3
    assert "<h1>kvtier replay</h1>" in html_file.read_text()


def test_options_reach_the_replay(cells: list[Cell]) -> None:
    words = (
        *("--policy", "vllm-lru,kvtier", "--settings", '{"kvtier.stage": false}'),
        *("--gpu-kv-gb", "54", "--link-gbps", "12", "--dram-gb", "40", "--gpus", "2"),
        *("--programs", "5", "--max-turns", "4", "--max-gap-s", "1.5", "--rate", "0.5"),
    )
    assert runner.invoke(app, ["replay", SWE, *words]).exit_code == 0
    plain, own = cells
    assert (plain.policy, dict(plain.settings)) == ("vllm-lru", {})
    assert (own.policy, dict(own.settings)) == ("kvtier", {"kvtier.stage": False})
    assert own.machine.gpu_kv_bytes == 54e9
    assert own.machine.link_bytes_per_s == 12e9
    assert own.machine.dram_bytes == 40e9
    assert own.machine.n_gpus == 2
    assert len(own.programs) == 5
    assert own.programs is plain.programs
    assert max(len(program.turns) for program in own.programs) == 4
    assert max(turn.gap_s for program in own.programs for turn in program.turns) == 1.5
    arrivals = [program.arrival_s for program in own.programs]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] > 0
    assert own.concurrency is None


def test_a_sweep_changes_one_option(cells: list[Cell], tmp_path: Path) -> None:
    json_file = tmp_path / "out.json"
    words = (
        *("--arrivals", "fixed", "--sweep", "concurrency=2,4", "--programs", "4"),
        *("--policy", "vllm-lru,ideal", "--json", str(json_file)),
    )
    result = runner.invoke(app, ["replay", SWE, *words])
    assert result.exit_code == 0, result.output
    assert [(cell.concurrency, cell.policy) for cell in cells] == [
        (2, "vllm-lru"),
        (2, "ideal"),
        (4, "vllm-lru"),
        (4, "ideal"),
    ]
    swept = json.loads(json_file.read_text())["sweep"]
    assert (swept["option"], swept["values"]) == ("concurrency", [2, 4])
    assert set(swept["mean_jct_s"]) == {"vllm-lru", "ideal"}
    assert "concurrency" in result.stdout
    assert "0.50x" in result.stdout


@pytest.mark.usefixtures("cells")
def test_a_stuck_replay_is_told_and_the_others_shown(tmp_path: Path) -> None:
    json_file = tmp_path / "out.json"
    words = ("--programs", "2", "--policy", "ideal,oracle", "--json", str(json_file))
    result = runner.invoke(app, ["replay", SWE, *words])
    assert result.exit_code == 1
    assert "oracle: oracle is stuck at 3.0 s" in result.stderr
    report = json.loads(json_file.read_text())
    assert [row["policy"] for row in report["results"]] == ["ideal"]
    assert report["failed"][0]["policy"] == "oracle"


@pytest.mark.usefixtures("cells")
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("a.json", "b.json"):
        words = ("--programs", "3", "--policy", "ideal", "--no-wall-clock")
        assert (
            runner.invoke(app, ["replay", SWE, *words, "--json", str(tmp_path / name)]).exit_code
            == 0
        )
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert b"wall_s" not in written[0]


@pytest.mark.usefixtures("cells")
def test_records_left_out_are_told(tmp_path: Path) -> None:
    good = {"timestamp": 0, "input_length": 500, "output_length": 9, "hash_ids": [1]}
    lines = [json.dumps(good), *[json.dumps({**good, "output_length": "many"})] * 7]
    trace, json_file = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text("\n".join(lines))
    words = (str(trace), "--policy", "ideal", "--json", str(json_file))
    output = refused(*words)
    assert "WORKLOAD" in output
    assert "trace.jsonl:2: output_length: got 'many'" in output
    result = runner.invoke(app, ["replay", *words, "--skip-bad-records"])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("output_length: got 'many'") == 5
    assert "left out: 2 more records" in result.stderr
    assert json.loads(json_file.read_text())["config"]["skipped_records"] == 7
