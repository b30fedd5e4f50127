"""What `kvtier record` writes, and what replay makes of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.replay.text import shared_tokens
from kvtier.replay.workload import Limits, Program
from kvtier.replay.workloads import recording, source
from kvtier.replay.workloads.records import BadRecord, json_lines
from kvtier.turns import recorder
from tests.unit.mini_engine import MiniEngine
from tests.unit.program_cases import follow_up, prompt, turn

if TYPE_CHECKING:
    from pathlib import Path

LIMITS = Limits()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def read(*rows: dict[str, Any]) -> tuple[list[Program], list[str]]:
    bad: list[BadRecord] = []
    text = "\n".join(map(json.dumps, rows))
    found = recording.read(json_lines(text, "r.jsonl", bad.append), "r", bad.append)
    return found, [str(error) for error in bad]


def row(
    program: str, at_s: float, end_s: float, units: list[int], kept: int = 0, **other: Any
) -> dict[str, Any]:
    told = {
        "kvtier_turn": 1,
        "program": program,
        "arrived_s": at_s,
        "ended_s": end_s,
        "prompt_tokens": 64 * (kept + len(units)),
        "output_tokens": 10,
        "tool": "t",
        "unit_tokens": 64,
        "kept": kept,
        "units": units,
    }
    return told | other


def test_what_was_recorded_is_replayed(tmp_path: Path) -> None:
    file = tmp_path / "turns.jsonl"
    engine = MiniEngine(n_blocks=200, record_file=file)
    first = turn("r1", prompt(150), session="secret name", hints={"tool": "secret tool"})
    engine.run(first)
    engine.now_s += 7.0
    second = follow_up(first, "r2", session="secret name")
    engine.run(second)
    engine.now_s += 3.0
    engine.run(turn("other", prompt(130), session="other"))
    engine.half.shutdown()
    assert "secret" not in file.read_text()
    one, two = source.load(str(file), seed=0, limits=LIMITS, programs=None)
    assert (len(one.turns), len(two.turns)) == (2, 1)
    assert [t.prompt_tokens for t in one.turns] == [
        first.num_prompt_tokens,
        second.num_prompt_tokens,
    ]
    assert [t.output_tokens for t in one.turns] == [
        first.num_output_tokens,
        second.num_output_tokens,
    ]
    assert one.turns[0].gap_s == pytest.approx(7.0, abs=0.1)
    assert one.turns[0].tool is not None
    assert one.turns[1].tool is None
    assert one.arrival_s == 0.0
    # The second prompt continues the first one; the other program's begins like it, for two units.
    assert shared_tokens(one.turns[0].prompt, one.turns[1].prompt) == first.num_prompt_tokens
    assert one.scope == two.scope
    assert shared_tokens(one.turns[0].prompt, two.turns[0].prompt) == 128


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    file = tmp_path / "turns.jsonl"
    engine = MiniEngine(n_blocks=200, record_file=file)
    first = turn("r1", prompt(150))
    engine.run(first)
    engine.run(follow_up(first, "r2"))
    told = lines(file)
    assert [(line["kept"], len(line["units"])) for line in told] == [(0, 2), (2, 0)]


def test_two_files_tell_nothing_of_each_other(tmp_path: Path) -> None:
    told = []
    for name in ("a", "b"):
        engine = MiniEngine(n_blocks=200, record_file=tmp_path / name)
        engine.run(turn("r1", prompt(150)))
        told += lines(tmp_path / name)
    assert told[0]["program"] != told[1]["program"]
    assert not set(told[0]["units"]) & set(told[1]["units"])


def test_programs_forgotten_are_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "REMEMBERED_PROGRAMS", 1)
    file = tmp_path / "turns.jsonl"
    engine = MiniEngine(n_blocks=200, record_file=file)
    first = turn("r1", prompt(150))
    engine.run(first)
    engine.run(turn("o", prompt(140), session="other"))
    engine.run(follow_up(first, "r2"))
    assert [line["kept"] for line in lines(file)] == [0, 0, 0]
    assert len(source.load(str(file), seed=0, limits=LIMITS, programs=None)) == 2


def test_a_full_disk_ends_the_recording_only(tmp_path: Path) -> None:
    engine = MiniEngine(n_blocks=200, record_file=tmp_path / "turns.jsonl")

    def full(_: str) -> int:
        raise OSError(28, "No space left on device")

    engine.half._recorder._lines._file.write = full  # type: ignore[union-attr, method-assign]
    first = turn("r1", prompt(150))
    engine.run(first)
    engine.run(follow_up(first, "r2"))
    assert not engine.half._recorder.enabled
    assert engine.stats.totals.get("failures|internal", 0) == 0


def test_turns_that_overlap_are_chains_of_their_own() -> None:
    found, bad = read(
        row("p", 0.0, 5.0, [1, 2]),
        # Two sub-agents, and then the parent again, which waited for them.
        row("p", 6.0, 9.0, [1, 7, 8]),
        row("p", 6.5, 10.0, [1, 9, 10]),
        row("p", 11.0, 12.0, [1, 2, 3]),
    )
    assert not bad
    assert [(p.name, len(p.turns), p.arrival_s) for p in found] == [
        ("r-p", 2, 0.0),
        ("r-p-1", 1, 6.0),
        ("r-p-2", 1, 6.5),
    ]


def test_bad_lines_are_told_and_left_out() -> None:
    found, bad = read(
        row("p", 0.0, 5.0, [1, 2]),
        row("p", 6.0, 5.5, [1]),
        row("p", 6.0, 7.0, [3], kept=5),
        row("p", 6.0, 7.0, [3], kvtier_turn=2),
        row("p", 8.0, 9.0, [3], kept=2),
    )
    assert [len(p.turns) for p in found] == [2]
    assert bad[0] == "r.jsonl:2: ended_s: got 5.5, expected a time not before arrived_s"
    assert bad[1].startswith("r.jsonl:3: kept: got 5, expected at most 2")
    assert bad[2].startswith("r.jsonl:4: kvtier_turn: got 2, expected 1")
