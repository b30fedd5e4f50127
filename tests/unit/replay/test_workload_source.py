"""Workloads as a whole: how they are loaded, cut and timed, and what is said of bad ones."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.replay.workload import Child, Limits, Program, Run, Turn
from kvtier.replay.workloads import arrivals, synthetic
from kvtier.replay.workloads.limits import apply
from kvtier.replay.workloads.source import SYNTHETIC_PROGRAMS, BadRecord, load

if TYPE_CHECKING:
    from pathlib import Path

NO_LIMITS = Limits(max_output_tokens=10**9, min_gap_s=0.0)


def turn(n_tokens: int = 10, output: int = 5, gap_s: float = 1.0, *children: Child) -> Turn:
    return Turn((Run(0, n_tokens),), output, gap_s, children=children)


def program(*turns: Turn, name: str = "p", arrival_s: float = 0.0) -> Program:
    return Program(name, arrival_s, turns or (turn(),))


def session(name: str, n_turns: int = 1) -> dict[str, Any]:
    requests = [
        {"t": 9 * i, "type": "n", "in": 64 + i, "out": 5, "hash_ids": [1]} for i in range(n_turns)
    ]
    return {"id": name, "block_size": 64, "requests": requests}


def mooncake_row(at_ms: int = 0) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": 100, "output_length": 5, "hash_ids": [at_ms]}


def lmcache_row(name: str) -> dict[str, Any]:
    return {"timestamp": 1e6, "input": "text", "output": "more", "session_id": name}


def write(path: Path, *values: Any, indent: int | None = None) -> None:
    data = "\n".join(json.dumps(value, indent=indent) for value in values).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def names(programs: list[Program]) -> list[str]:
    return [each.name for each in programs]


def load_all(what: object, **changes: Any) -> list[Program]:
    given: dict[str, Any] = {"seed": 0, "limits": NO_LIMITS, "programs": None}
    return load(str(what), **given | changes)


# -- limits -------------------------------------------------------------------------------------------


def test_without_limits_a_program_is_itself() -> None:
    whole = program(turn(), turn(20, 5, 0.0, Child(1.0, (turn(),))))
    assert apply(whole, NO_LIMITS) == whole


def test_a_chain_ends_after_so_many_turns_or_before_a_longer_prompt() -> None:
    child = Child(1.0, (turn(10), turn(90), turn(10)))
    whole = program(turn(10), turn(20, 5, 1.0, child), turn(60), turn(30))
    cut = apply(whole, Limits(max_turns=2))
    assert cut is not None
    assert [t.prompt_tokens for t in cut.turns] == [10, 20]
    assert [t.prompt_tokens for t in cut.turns[1].children[0].turns] == [10, 90]
    cut = apply(whole, Limits(max_input_tokens=59))
    assert cut is not None
    assert [t.prompt_tokens for t in cut.turns] == [10, 20]
    assert [t.prompt_tokens for t in cut.turns[1].children[0].turns] == [10]
    assert len(apply(whole, Limits(max_input_tokens=60)).turns) == 4  # type: ignore[union-attr]


def test_what_is_too_short_goes() -> None:
    assert apply(program(turn(), turn()), Limits(min_turns=3)) is None
    assert apply(program(turn(), turn(99)), Limits(min_turns=2, max_input_tokens=50)) is None
    assert apply(program(turn(99)), Limits(max_input_tokens=50)) is None
    assert apply(program(turn(99)), Limits(max_input_tokens=50, min_turns=0)) is None
    # Turns of sub-agents do not count, and a sub-agent of which nothing is left goes.
    parent = program(turn(10, 5, 1.0, Child(0.0, (turn(99), turn(99)))))
    assert apply(parent, Limits(min_turns=2)) is None
    cut = apply(parent, Limits(max_input_tokens=50))
    assert cut is not None
    assert cut.turns[0].children == ()


def test_gaps_are_scaled_and_then_limited_in_sub_agents_too() -> None:
    limits = Limits(min_gap_s=1.0, max_gap_s=10.0, time_scale=0.5, max_output_tokens=4)
    child = Child(1.0, (turn(10, 3, 0.0),))
    cut = apply(program(turn(10, 5, 8.0, child), turn(10, 4, 50.0), turn(10, 3, 0.5)), limits)
    assert cut is not None
    assert [t.gap_s for t in cut.turns] == [4.0, 10.0, 1.0]
    assert [t.output_tokens for t in cut.turns] == [4, 4, 3]
    (limited,) = cut.turns[0].children
    assert limited.delay_s == 0.5
    assert limited.turns[0].gap_s == 1.0


# -- arrivals -----------------------------------------------------------------------------------------


def test_poisson_arrivals_have_the_rate_and_the_seed_fixes_them() -> None:
    programs = [program(name=str(i), arrival_s=99.0) for i in range(4000)]
    arrived = arrivals.poisson(programs, 0.5, seed=1)
    assert names(arrived) == names(programs)
    times = [0.0, *(each.arrival_s for each in arrived)]
    between = [b - a for a, b in pairwise(times)]
    assert statistics.mean(between) == pytest.approx(2.0, rel=0.05)
    assert statistics.stdev(between) == pytest.approx(2.0, rel=0.07)
    assert min(between) > 0
    assert arrivals.poisson(programs, 0.5, seed=1) == arrived
    assert arrivals.poisson(programs, 0.5, seed=2) != arrived


@pytest.mark.parametrize("rate_per_s", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_must_be_one(rate_per_s: float) -> None:
    with pytest.raises(ValueError, match="rate_per_s must be positive"):
        arrivals.poisson([program()], rate_per_s, seed=0)


def test_recorded_arrivals_begin_at_0() -> None:
    late, early = program(name="a", arrival_s=107.0), program(name="b", arrival_s=100.0)
    arrived = arrivals.recorded([late, early])
    assert [(each.name, each.arrival_s) for each in arrived] == [("b", 0.0), ("a", 7.0)]
    assert arrivals.recorded([]) == []


def test_all_at_once() -> None:
    arrived = arrivals.at_once([program(name="a", arrival_s=5.0), program(name="b")])
    assert [(each.name, each.arrival_s) for each in arrived] == [("a", 0.0), ("b", 0.0)]


# -- loading ------------------------------------------------------------------------------------------


def test_synthetic_programs_by_name() -> None:
    assert load_all("synthetic:bfcl", seed=3, programs=4) == synthetic.generate("bfcl", 4, 3)
    assert len(load_all("synthetic:uniform")) == SYNTHETIC_PROGRAMS
    limits = Limits(max_programs=7, max_turns=1)
    programs = load_all("synthetic:uniform", limits=limits)
    assert len(programs) == 7
    assert {len(each.turns) for each in programs} == {1}


def test_a_file_is_read_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    write(path, session("a", 3), indent=2)
    assert names(load_all(path)) == ["a"]
    write(path, mooncake_row(), mooncake_row(1))
    assert names(load_all(path)) == ["trace-1", "trace-2"]
    write(path, lmcache_row("x"), lmcache_row("y"))
    assert names(load_all(path)) == ["x", "y"]
    path = tmp_path / "plain"
    write(path, session("a"))
    assert names(load_all(path)) == ["a"]


def test_a_folder_is_shuffled_by_the_seed_and_read_as_far_as_needed(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / f"{i:02d}.json", session(f"s{i:02d}", 1 + i % 2))
    write(tmp_path / "more.jsonl", lmcache_row("x"))
    (tmp_path / "README.md").write_text("not a trace")
    programs = load_all(tmp_path)
    assert sorted(names(programs)) == [*(f"s{i:02d}" for i in range(20)), "x"]
    assert names(programs) != sorted(names(programs))
    assert load_all(tmp_path) == programs
    assert names(load_all(tmp_path, seed=1)) != names(programs)
    assert load_all(tmp_path, programs=5) == programs[:5]
    assert load_all(tmp_path, programs=9, limits=Limits(max_programs=5)) == load_all(
        tmp_path, programs=5, limits=Limits()
    )
    # Programs that the limits leave out do not count.
    longer = load_all(tmp_path, programs=5, limits=Limits(min_turns=2))
    assert names(longer) == [each.name for each in programs if len(each.turns) == 2][:5]
    # A bad file that is not needed is not read.
    last = next(path for path in tmp_path.glob("*.json") if programs[-1].name[1:] == path.stem)
    last.write_text("{}")
    assert load_all(tmp_path, programs=20) == programs[:20]


def test_bad_records_are_errors_or_skipped(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    write(good, session("a"))
    broken = session("b", 2)
    broken["requests"][1]["out"] = None
    write(bad, broken)
    message = f"{bad}: requests[1].out: got None, expected a whole number of at least 0"
    with pytest.raises(BadRecord) as caught:
        load_all(tmp_path)
    assert str(caught.value) == message
    skipped: list[str] = []
    assert names(load_all(tmp_path, skipped=skipped)) == ["a"]
    assert skipped == [message]


def test_bad_lines_are_errors_or_skipped_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{{cut off\n{json.dumps(mooncake_row())}\n{{}}\n")
    with pytest.raises(BadRecord, match=r"t\.jsonl:1: .*, expected a JSON object"):
        load_all(path)
    skipped: list[str] = []
    assert len(load_all(path, skipped=skipped)) == 1
    assert [text.split(": ")[0] for text in skipped] == [f"{path}:1", f"{path}:3"]
    assert skipped[1] == f"{path}:3: timestamp: is missing, expected a finite number"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a known format, expected a JSON object"),
        (b'{"rows": []}', "not a known format"),
        (b"[1, 2]", "not a known format"),
        (b"\xff\xfe", "expected UTF-8 text, plain or as gzip"),
        (b"\x1f\x8bnonsense", "expected UTF-8 text, plain or as gzip"),
        (gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20, "expected UTF-8 text, plain or as gzip"),
        (gzip.compress(b'{"requests": []}', mtime=0)[:-4], "expected UTF-8 text, plain or as gzip"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(data)
    with pytest.raises(BadRecord, match=message) as caught:
        load_all(path)
    assert str(caught.value).startswith(f"{path}: ")
    skipped: list[str] = []
    assert load_all(path, skipped=skipped) == []
    assert len(skipped) == 1


def test_names_are_unique(tmp_path: Path) -> None:
    write(tmp_path / "a.json", session("same"))
    write(tmp_path / "b.json", session("same"))
    with pytest.raises(BadRecord, match="same was read before"):
        load_all(tmp_path)
    assert names(load_all(tmp_path, skipped=[])) == ["same"]


def test_what_is_nothing_is_told_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no workload 'nope': expected a file.*synthetic:bfcl"):
        load_all("nope")
    with pytest.raises(ValueError, match="'nope': expected swe-bench"):
        load_all("synthetic:nope")
    with pytest.raises(ValueError, match=r"expected files named \*\.json"):
        load_all(tmp_path)
