"""The demo's workload: reproducible, of the stated sizes, and a real agent conversation."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.demo import repo_tools
from kvtier.demo.workload import (
    Program,
    Workload,
    WorkloadConfig,
    build_workload,
    work_digest,
)

_LINES = "".join(f"def f{i}(a):\n    return a + {i}\n\n\n" for i in range(120))
CORPUS = {
    "alpha/one.py": f'"""One."""\n{_LINES}',
    "alpha/two.py": "class Two:\n    def __init__(self):\n        raise ValueError\n",
    "beta/__init__.py": f"import alpha\n{_LINES}",
}


def encode(text: str) -> list[int]:
    """A token a character."""
    return [ord(char) for char in text]


def decode(ids: tuple[int, ...]) -> str:
    return "".join(map(chr, ids))


def build(**changes: object) -> Workload:
    sizes: dict[str, Any] = {"programs": 2, "turns": 2} | changes
    return build_workload(WorkloadConfig(**sizes), encode, CORPUS)


configs = st.builds(
    WorkloadConfig,
    programs=st.integers(1, 4),
    turns=st.integers(1, 5),
    seed=st.integers(0, 1000),
    first_prompt_tokens=st.just((1200, 1900)),
    output_tokens=st.just((150, 200)),
    result_tokens=st.just((120, 380)),
)


@settings(max_examples=25, deadline=None)
@given(configs)
def test_the_seed_fixes_everything(config: WorkloadConfig) -> None:
    first = build_workload(config, encode, CORPUS)
    assert build_workload(config, encode, CORPUS) == first
    other = build_workload(
        WorkloadConfig(programs=config.programs, turns=config.turns, seed=config.seed + 1),
        encode,
        CORPUS,
    )
    assert other.digest() != first.digest()


@settings(max_examples=25, deadline=None)
@given(configs)
def test_sizes_are_in_range_and_prompts_grow_by_what_was_said(config: WorkloadConfig) -> None:
    workload = build_workload(config, encode, CORPUS)
    assert len(workload.programs) == config.programs
    assert len({program.name for program in workload.programs}) == config.programs
    for index, program in enumerate(workload.programs):
        assert program.start_s == index * config.start_interval_s
        assert len(program.turns) == config.turns
        before: tuple[int, ...] = ()
        for number, (prompt, turn) in enumerate(program.requests()):
            assert prompt == before + turn.new_prompt_ids
            sizes = config.first_prompt_tokens if number == 0 else config.result_tokens
            assert sizes[0] <= len(turn.new_prompt_ids) < sizes[1]
            assert len(turn.output_ids) >= config.output_tokens[0]
            before = prompt + turn.output_ids
        assert program.final_tokens == len(before)
    assert workload.longest_tokens == max(p.final_tokens for p in workload.programs)


def test_every_turn_but_the_last_calls_the_tool_that_it_waits_for() -> None:
    for program in build(programs=4, turns=5).programs:
        *paused, last = program.turns
        for turn in paused:
            text = decode(turn.output_ids)
            assert text.endswith("</tool_call><|im_end|>")
            call = json.loads(text.partition("<tool_call>")[2].partition("</tool_call>")[0])
            assert call["name"] == turn.tool
            assert turn.gap_s > 0
        assert (last.tool, last.gap_s) == (None, 0.0)
        assert "<tool_call>" not in decode(last.output_ids)


def test_tool_results_are_the_tools_output() -> None:
    program = build(programs=1, turns=4, result_tokens=(300, 301)).programs[0]
    for turn, after in zip(program.turns, program.turns[1:], strict=False):
        call = json.loads(
            decode(turn.output_ids).partition("<tool_call>")[2].partition("</tool_call>")[0]
        )
        arguments = call["arguments"]
        expected = {
            "read_file": lambda a: repo_tools.read_file(CORPUS, a["path"], a["line"]),
            "grep": lambda a: repo_tools.grep(CORPUS, a["package"], a["text"]),
            "list_files": lambda a: repo_tools.list_files(CORPUS, a["package"]),
            "check_docstrings": lambda a: repo_tools.check_docstrings(CORPUS, a["package"]),
        }[call["name"]](arguments)
        result = decode(after.new_prompt_ids).partition("<tool_response>\n")[2]
        assert result[:40] == (expected * 40)[:40]


def test_gaps_are_log_normal_and_slow_tools_are_slower() -> None:
    turns = [
        turn for program in build(programs=200, turns=11).programs for turn in program.turns[:-1]
    ]
    logs = [math.log(turn.gap_s) for turn in turns]
    assert statistics.mean(logs) == pytest.approx(0.3, abs=0.06)
    assert statistics.stdev(logs) == pytest.approx(0.8, abs=0.06)
    median_s = {
        tool: statistics.median(turn.gap_s for turn in turns if turn.tool == tool)
        for tool in {turn.tool for turn in turns}
    }
    assert sorted(median_s, key=median_s.__getitem__) == [
        "read_file",
        "list_files",
        "grep",
        "check_docstrings",
    ]


@given(st.permutations([("a", 0, [1, 2], [3]), ("a", 1, [1, 2, 3], [4]), ("b", 0, [9], [8])]))
def test_digest_ignores_the_order_of_the_turns(
    turns: list[tuple[str, int, list[int], list[int]]],
) -> None:
    assert work_digest(turns) == work_digest(sorted(turns))


def test_digest_sees_where_the_prompt_ends_and_which_tokens_it_has() -> None:
    digests = {
        work_digest([("a", 0, [1, 2], [3])]),
        work_digest([("a", 0, [1], [2, 3])]),
        work_digest([("a", 0, [1, 2], [4])]),
        work_digest([("b", 0, [1, 2], [3])]),
        work_digest([("a", 1, [1, 2], [3])]),
    }
    assert len(digests) == 5


def test_digest_of_a_workload_is_that_of_its_requests() -> None:
    workload = build()
    done = [
        (program.name, index, list(prompt), list(turn.output_ids))
        for program in workload.programs
        for index, (prompt, turn) in enumerate(program.requests())
    ]
    assert work_digest(reversed(done)) == workload.digest()


@pytest.mark.parametrize("changes", [{"programs": 0}, {"turns": 0}])
def test_empty_workloads_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        build(**changes)


def test_the_library_of_this_python_is_a_corpus() -> None:
    corpus = repo_tools.load_corpus()
    assert len(repo_tools.packages(corpus)) >= 6
    assert not any("/test" in path for path in corpus)
    assert repo_tools.corpus_digest(corpus) == repo_tools.corpus_digest(
        dict(reversed(corpus.items()))
    )


def test_no_corpus_is_an_error(tmp_path: object) -> None:
    with pytest.raises(FileNotFoundError, match="no source files"):
        repo_tools.load_corpus(tmp_path)  # type: ignore[arg-type]


def test_check_docstrings_finds_public_names_only() -> None:
    corpus = {
        "p/a.py": "def f():\n    pass\nclass C:\n    '''C.'''\n    def _g(self):\n        pass\n"
    }
    assert repo_tools.check_docstrings(corpus, "p") == (
        "p/a.py:1:1: missing docstring in public function `f`\nFound 1 errors in 1 files.\n"
    )


def test_programs_without_turns_have_no_requests() -> None:
    assert list(Program("p", 0.0, ()).requests()) == []
