"""Mooncake's traces: which rows are one conversation, and what their prompts share."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvtier.replay.text import shared_tokens
from kvtier.replay.workload import Program, Run
from kvtier.replay.workloads import mooncake
from kvtier.replay.workloads.records import BadRecord, json_lines


def row(
    at_s: float, ids: list[int], n_input: int | None = None, n_output: int = 100
) -> dict[str, Any]:
    """A row whose last block is cut unless told otherwise."""
    return {
        "timestamp": int(at_s * 1000),
        "input_length": 512 * len(ids) - 12 if n_input is None else n_input,
        "output_length": n_output,
        "hash_ids": ids,
    }


def read(*rows: dict[str, Any]) -> list[Program]:
    bad: list[BadRecord] = []
    text = "\n".join(map(json.dumps, rows))
    programs = mooncake.read(json_lines(text, "m.jsonl", bad.append), "m", bad.append)
    assert not bad
    return programs


def sizes(programs: list[Program]) -> dict[str, list[int]]:
    """Blocks of each program's prompts, by name."""
    return {p.name: [len(turn.prompt) for turn in p.turns] for p in programs}


def test_a_row_that_extends_another_continues_its_program() -> None:
    programs = read(
        row(0, [1, 2, 3]),
        row(1, [4, 5, 6]),
        row(9, [1, 2, 7, 8]),
        row(20, [1, 2, 7, 9, 10]),
        row(30, [4, 5, 11]),
    )
    assert sizes(programs) == {"m-1": [3, 4, 5], "m-2": [3, 3]}


def test_less_than_half_of_a_prompt_is_a_new_program() -> None:
    assert sizes(read(row(0, [1, 2, 3, 4]), row(1, [1, 2, 5, 6]))) == {"m-1": [4], "m-2": [4]}
    assert sizes(read(row(0, [1, 2, 3, 4]), row(1, [1, 2, 3, 6]))) == {"m-1": [4, 4]}


def test_the_longest_match_counts() -> None:
    programs = read(row(0, [1, 4, 5, 6]), row(1, [1, 2, 3]), row(2, [1, 4, 5, 7, 8]))
    assert sizes(programs) == {"m-1": [4, 5], "m-2": [3]}


def test_a_block_that_many_different_ones_follow_is_no_conversation() -> None:
    n_rows = mooncake.SHARED_BRANCHES + 1
    few = read(*(row(i, [1, 2, 100 + i]) for i in range(n_rows - 1)))
    assert len(few) == 1
    many = read(*(row(i, [1, 2, 100 + i]) for i in range(n_rows)))
    assert len(many) == n_rows


def test_rows_are_taken_by_arrival_and_gaps_are_what_decoding_leaves() -> None:
    (program,) = read(
        row(50, [1, 2, 4, 5]), row(10, [1, 2, 3], n_output=100), row(51, [1, 2, 4, 6, 7])
    )
    assert program.name == "m-2"
    assert program.arrival_s == 10.0
    assert [turn.output_tokens for turn in program.turns] == [100, 100, 100]
    decode_s = 100 * mooncake.DECODE_S_PER_TOKEN
    assert [turn.gap_s for turn in program.turns] == pytest.approx([40 - decode_s, 0.0, 0.0])


def test_prompts_have_the_recorded_length_and_continue_each_other() -> None:
    (program,) = read(row(0, [1, 2, 3], 1100), row(9, [1, 2, 7, 8], 2048))
    first, second = (turn.prompt for turn in program.turns)
    # Block 3 was the beginning of block 7.
    assert first == (Run(1, 512), Run(2, 512), Run(7, 76))
    assert second == (Run(1, 512), Run(2, 512), Run(7, 512), Run(8, 512))
    assert shared_tokens(first, second) == 1100


def test_programs_of_a_trace_share_blocks() -> None:
    a, b = read(row(0, [1, 2, 3, 4]), row(1, [1, 5, 6, 7]))
    assert a.scope == b.scope == "m"
    assert shared_tokens(a.turns[0].prompt, b.turns[0].prompt) == 512


def test_rows_without_ids_share_nothing() -> None:
    a, b = read(row(0, [], 700), row(1, [], 700))
    assert a.turns[0].prompt_tokens == 700
    assert shared_tokens(a.turns[0].prompt, b.turns[0].prompt) == 0


def test_bad_rows_are_told_and_left_out() -> None:
    bad: list[BadRecord] = []
    lines = [
        json.dumps(row(0, [1, 2])),
        "{oops",
        json.dumps(row(1, [3]) | {"hash_ids": "x"}),
        "",
        "7",
    ]
    programs = mooncake.read(json_lines("\n".join(lines), "m.jsonl", bad.append), "m", bad.append)
    assert len(programs) == 1
    told = [str(error) for error in bad]
    assert told[0].startswith("m.jsonl:2: ")
    assert told[1] == "m.jsonl:3: hash_ids: got 'x', expected a list of whole numbers"
    assert told[2] == "m.jsonl:5: got 7, expected a JSON object"
