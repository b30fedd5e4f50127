"""LMCache's agent traces: text to pieces that are shared where the text is, and timestamps to gaps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kvtier.replay.text import shared_tokens
from kvtier.replay.workloads import lmcache_trace
from kvtier.replay.workloads.records import BadRecord, json_lines

if TYPE_CHECKING:
    from pathlib import Path

    from kvtier.replay.workload import Program

SYSTEM = "".join(f"{i:03d} " for i in range(300))
"""1,200 characters, or 300 words."""


def row(at_s: float, text: str, output: str = "ok", session: str = "s") -> dict[str, Any]:
    return {"timestamp": int(at_s * 1e6), "input": text, "output": output, "session_id": session}


def refuse(error: BadRecord) -> None:
    raise error


def read(*rows: dict[str, Any], tokenizer: str | None = None) -> list[Program]:
    text = "\n".join(map(json.dumps, rows))
    return lmcache_trace.read(json_lines(text, "t.jsonl", refuse), refuse, tokenizer)


def read_one(*rows: dict[str, Any]) -> Program:
    (program,) = read(*rows)
    return program


def test_four_characters_are_a_token() -> None:
    (turn,) = read_one(row(0, SYSTEM, "x" * 41)).turns
    assert [run.n_tokens for run in turn.prompt] == [64] * 4 + [44]
    assert turn.output_tokens == 11


def test_a_longer_prompt_shares_all_of_the_one_before() -> None:
    a, b, c = read_one(
        row(0, SYSTEM), row(1, SYSTEM + "ok" + "more"), row(2, SYSTEM + "okmore" + "ok" + SYSTEM)
    ).turns
    assert shared_tokens(a.prompt, b.prompt) == a.prompt_tokens == 300
    # The answer and the text after it are tokens of their own.
    assert b.prompt_tokens == 300 + 1 + 1
    assert shared_tokens(b.prompt, c.prompt) == b.prompt_tokens


def test_answers_that_the_recorder_left_out_are_put_back() -> None:
    said = "a" * 400
    _, left_out = read_one(row(0, SYSTEM, said), row(1, SYSTEM + "tool result")).turns
    _, kept = read_one(row(0, SYSTEM, said), row(1, SYSTEM + said + "tool result")).turns
    _, marked = read_one(row(0, SYSTEM, said), row(1, SYSTEM + "<me>" + said + "!")).turns
    assert left_out.prompt_tokens == 300 + 100 + 3
    assert kept.prompt == left_out.prompt
    assert marked.prompt_tokens == 300 + 102


def test_sessions_share_a_common_beginning_and_nothing_after_a_difference() -> None:
    a, b, c = read(
        row(0, SYSTEM + "a" * 800, session="a"),
        row(0, SYSTEM + "b" * 800, session="b"),
        row(0, "!" + SYSTEM[1:], session="c"),
    )
    assert a.scope == b.scope != ""
    prompts = [program.turns[0].prompt for program in (a, b, c)]
    assert shared_tokens(prompts[0], prompts[1]) == 4 * 64
    assert shared_tokens(prompts[0], prompts[2]) == 0
    # Equal text after a difference is not a prefix, and has other contents.
    assert not {run.content for run in prompts[0]} & {run.content for run in prompts[2]}


def test_a_prompt_that_does_not_go_on_starts_anew() -> None:
    a, b, c = read_one(row(0, SYSTEM), row(1, "summary " + SYSTEM), row(2, SYSTEM + "!")).turns
    assert shared_tokens(a.prompt, b.prompt) == 0
    assert b.prompt_tokens == 302
    assert shared_tokens(a.prompt, c.prompt) == 4 * 64


def test_lines_are_sorted_and_gaps_are_what_decoding_leaves() -> None:
    program = read_one(
        row(107, SYSTEM + "2"),
        row(100, SYSTEM, "x" * 400),
        {**row(105, SYSTEM + "1", "x" * 4000), "timestamp": "105000000"},
    )
    assert program.arrival_s == 100.0
    assert [turn.output_tokens for turn in program.turns] == [100, 1000, 1]
    decode_s = lmcache_trace.DECODE_S_PER_TOKEN
    assert program.turns[0].gap_s == pytest.approx(5 - 100 * decode_s)
    assert program.turns[1].gap_s == 0.0
    assert program.turns[2].gap_s == 0.0


def test_each_session_is_a_program() -> None:
    programs = read(row(5, "a", session="x"), row(1, "b", session="y"), row(9, "c", session="x"))
    assert [(p.name, p.arrival_s, len(p.turns)) for p in programs] == [("x", 5, 2), ("y", 1, 1)]


def test_text_may_hold_other_line_separators() -> None:
    line = json.dumps(row(0, "a\u2028b\x85c"), ensure_ascii=False)
    (program,) = lmcache_trace.read(json_lines(line + "\n", "t.jsonl", refuse), refuse)
    assert program.turns[0].prompt_tokens == 2


def test_shell_blocks_name_the_tool() -> None:
    call = "THOUGHT: look\n```bash\ncd /src && grep -rn x .\n```"
    tool, answer = read_one(row(0, "a", call), row(1, "ab", "Done.")).turns
    assert tool.tool == "grep"
    assert answer.tool is None


def test_a_named_tokenizer_counts_its_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "000": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        (program,) = read(row(0, SYSTEM + "one two", "three four five"), tokenizer=str(name))
        assert program.turns[0].prompt_tokens == 302
        assert program.turns[0].output_tokens == 3
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer"):
        read(row(0, "a"), tokenizer=str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": ""}, "t.jsonl:1: input: got '', expected some text"),
        ({"output": None}, "t.jsonl:1: output: got None, expected a string"),
        ({"timestamp": "noon"}, "t.jsonl:1: timestamp: got 'noon', expected a finite number"),
        ({"session_id": 5}, "t.jsonl:1: session_id: got 5, expected a string"),
    ],
)
def test_an_error_names_the_line_and_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecord) as caught:
        read(row(0, "a") | changes)
    assert str(caught.value) == message
