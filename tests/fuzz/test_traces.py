"""Files that are said to be traces: a reader gives programs that can be replayed, or says what is wrong where."""

from __future__ import annotations

import gzip
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.replay.workload import Limits
from kvtier.replay.workloads.recording import FORMAT, MARK
from kvtier.replay.workloads.source import BadRecord, load
from tests.fuzz.hostile import DEEP, as_json, damaged, damaged_bytes, fuzz

if TYPE_CHECKING:
    from pathlib import Path

    from kvtier.replay.workload import Program

SESSION = [
    {
        "id": "s",
        "block_size": 4,
        "hash_id_scope": "local",
        "requests": [
            {"t": 0.0, "type": "s", "in": 8, "out": 2, "hash_ids": [1, 2], "api_time": 1.0},
            {
                "t": 0.5,
                "type": "subagent",
                "agent_id": "a",
                "duration_ms": 1500,
                "requests": [{"t": 0.1, "type": "n", "in": 4, "out": 1, "hash_ids": [9]}],
            },
            {"t": 3.0, "type": "s", "in": 12, "out": 2, "hash_ids": [1, 2, 3], "think_time": 0.5},
        ],
    }
]
MOONCAKE = [
    {
        "timestamp": i * 1000,
        "input_length": 600 * (i + 1),
        "output_length": 5,
        "hash_ids": [*range(i + 2)],
    }
    for i in range(3)
]
LMCACHE = [
    {"session_id": "s", "timestamp": i * 1_000_000, "input": "hello " * (i + 1), "output": "bye"}
    for i in range(3)
]
TURNS = [
    {
        MARK: FORMAT,
        "program": "p",
        "arrived_s": float(i),
        "ended_s": i + 0.5,
        "prompt_tokens": 8 * (i + 1),
        "output_tokens": 4,
        "tool": "t",
        "unit_tokens": 4,
        "kept": i,
        "units": [i + 10],
    }
    for i in range(3)
]
TRACES = [SESSION, MOONCAKE, LMCACHE, TURNS]
LIMITS = Limits()


def lines(rows: list[Any]) -> bytes:
    return b"\n".join(map(as_json, rows))


def check(programs: list[Program]) -> None:
    for program in programs:
        assert program.turns
        assert math.isfinite(program.arrival_s)
        for turn in program.all_turns():
            assert turn.prompt_tokens > 0
            assert turn.output_tokens > 0
            assert 0 <= turn.gap_s <= LIMITS.max_gap_s


def read(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    told = ""
    try:
        check(load(str(path), seed=1, limits=LIMITS, programs=None))
    except BadRecord as error:
        told = str(error)
    assert not told or str(path) in told
    skipped: list[str] = []
    check(load(str(path), seed=1, limits=LIMITS, programs=None, skipped=skipped))
    assert all(str(path) in reason for reason in skipped)


@pytest.mark.parametrize("rows", TRACES, ids=["session", "mooncake", "lmcache", "turns"])
def test_what_is_damaged_is_a_trace_to_begin_with(tmp_path: Path, rows: list[Any]) -> None:
    (tmp_path / "t.jsonl").write_bytes(lines(rows))
    programs = load(str(tmp_path / "t.jsonl"), seed=1, limits=LIMITS, programs=None)
    assert programs
    check(programs)


@fuzz(100)
@given(st.sampled_from(TRACES).flatmap(damaged))
def test_damaged_records(tmp_path_factory: pytest.TempPathFactory, rows: Any) -> None:
    rows = rows if isinstance(rows, list) else [rows]
    read(tmp_path_factory.getbasetemp() / "records.jsonl", lines(rows))


@fuzz(80)
@given(st.sampled_from(TRACES).map(lines).flatmap(damaged_bytes), st.booleans())
def test_damaged_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, is_packed: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    read(path, gzip.compress(data) if is_packed else data)


@fuzz(50)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, is_packed: bool) -> None:
    read(tmp_path_factory.getbasetemp() / "any.json", b"\x1f\x8b" + data if is_packed else data)


def test_a_text_that_is_nested_without_end(tmp_path: Path) -> None:
    for data in (DEEP, b'{"requests":' + DEEP, b'{"hash_ids": [1]}\n' + DEEP):
        read(tmp_path / "deep.json", data)
