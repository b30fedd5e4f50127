"""Claude Code sessions: block hashes to prompts, recorded times to gaps, sub-agents to children."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.replay.text import shared_tokens
from kvtier.replay.workload import Limits, Run
from kvtier.replay.workloads import claude_code
from kvtier.replay.workloads.records import BadRecord, Record
from kvtier.replay.workloads.source import load

if TYPE_CHECKING:
    from kvtier.replay.workload import Program

SAMPLE = Path(__file__).parents[3].parent / "shared/traces/claude-code"
EVERYTHING = Limits(max_output_tokens=10**9, min_gap_s=0.0)


def request(**fields: Any) -> dict[str, Any]:
    given = {"t": 0.0, "type": "n", "in": 64, "out": 5, "hash_ids": [1], "stop": "end_turn"}
    given |= {"api_time": 1.0, "think_time": 0.0}
    return {key: value for key, value in (given | fields).items() if value is not None}


def sub_agent(t: float, duration_ms: int, *requests: dict[str, Any]) -> dict[str, Any]:
    return {"type": "subagent", "t": t, "duration_ms": duration_ms, "requests": list(requests)}


def read(*requests: dict[str, Any], **fields: Any) -> Program:
    session = {"id": "s", "block_size": 64, "requests": list(requests)} | fields
    return claude_code.read(Record(session, "s.json"))


def test_a_prompt_is_its_blocks_and_the_rest() -> None:
    (turn,) = read(request(**{"in": 150, "hash_ids": [7, 7], "out": 9})).turns
    first, second, rest = turn.prompt
    assert (first, second) == (Run(7, 64), Run(7, 64))
    assert rest.n_tokens == 22
    assert rest.content < 0
    assert turn.output_tokens == 9


def test_blocks_beyond_the_length_are_cut() -> None:
    (turn,) = read(request(**{"in": 100, "hash_ids": [1, 2, 3]})).turns
    assert turn.prompt == (Run(1, 64), Run(2, 36))


def test_missing_blocks_are_one_content_of_the_turn() -> None:
    a, b = read(
        request(**{"in": 300, "hash_ids": [1]}), request(**{"in": 400, "hash_ids": [1]})
    ).turns
    assert [run.n_tokens for run in a.prompt] == [64, 236]
    assert a.prompt[1].content != b.prompt[1].content


def test_the_rest_is_the_beginning_of_what_the_next_prompt_has_there() -> None:
    turns = read(
        request(**{"in": 70, "hash_ids": [1]}),
        request(**{"in": 90, "hash_ids": [1]}),
        request(**{"in": 200, "hash_ids": [1, 2, 3]}),
        request(**{"in": 192, "hash_ids": [1, 2, 3]}),
    ).turns
    assert turns[0].prompt == (Run(1, 64), Run(2, 6))
    assert turns[1].prompt == (Run(1, 64), Run(2, 26))
    assert turns[2].prompt[:3] == (Run(1, 64), Run(2, 64), Run(3, 64))
    # The last prompt ends before the rest of the one before.
    assert turns[2].prompt[3].content < 0


def test_the_rest_is_its_own_where_the_next_prompt_differs_before_it() -> None:
    a, b = read(
        request(**{"in": 150, "hash_ids": [1, 2]}), request(**{"in": 250, "hash_ids": [1, 3, 4]})
    ).turns
    assert shared_tokens(a.prompt, b.prompt) == 64
    assert a.prompt[2].content < 0
    assert a.prompt[2].content != b.prompt[3].content


def test_the_rest_is_its_own_where_the_next_prompt_is_shorter() -> None:
    a, b = read(
        request(**{"in": 100, "hash_ids": [1]}), request(**{"in": 90, "hash_ids": [1]})
    ).turns
    assert shared_tokens(a.prompt, b.prompt) == 64


def test_own_contents_differ_between_sessions_of_one_scope() -> None:
    fields = {"hash_id_scope": "global"}
    a = read(request(**{"in": 70}), id="a", **fields)
    b = read(request(**{"in": 70}), id="b", **fields)
    assert a.scope == b.scope != ""
    assert shared_tokens(a.turns[0].prompt, b.turns[0].prompt) == 64
    assert read(request(), hash_id_scope="local").scope == ""


def test_the_gap_is_the_next_requests_think_time() -> None:
    turns = read(request(), request(t=9.0, think_time=7.5), request(t=20.0, think_time=3.0)).turns
    assert [turn.gap_s for turn in turns] == [7.5, 3.0, 0.0]


def test_only_a_turn_that_stopped_for_a_tool_calls_one() -> None:
    turns = read(request(stop="tool_use"), request(stop="end_turn"), request(stop="")).turns
    assert [turn.tool for turn in turns] == ["tool", None, None]


def test_a_streamed_request_without_an_end_is_given_one() -> None:
    turns = read(
        # think_time counts from a request before the one whose end is missing.
        request(type="s", t=0.0, out=100, api_time=None, stop=""),
        request(type="s", t=10.0, think_time=33.0, api_time=None, stop=""),
        request(type="s", t=11.0, think_time=None),
        request(t=15.0, think_time=None),
    ).turns
    end_s = claude_code.TTFT_S + 100 * claude_code.DECODE_S_PER_TOKEN
    assert turns[0].gap_s == pytest.approx(10.0 - end_s)
    assert turns[1].gap_s == 0.0
    # Its end is known, the next think time is not.
    assert turns[2].gap_s == pytest.approx(3.0)


def test_no_output_counts_as_one_token() -> None:
    assert read(request(out=0)).turns[0].output_tokens == 1


def test_sub_agents_are_children_of_the_turn_before_them() -> None:
    program = read(
        request(t=0.0),
        request(t=10.0, api_time=5.0),
        # They end at 40 s and 50.5 s.
        sub_agent(40.0, 24_500, request(**{"in": 80}), request(t=9.0, think_time=8.0)),
        sub_agent(50.5, 35_000, request()),
        request(t=52.0, think_time=37.0),
    )
    assert len(program.turns) == 3
    assert [len(turn.children) for turn in program.turns] == [0, 2, 0]
    first, second = program.turns[1].children
    assert first.delay_s == pytest.approx(0.5)
    assert second.delay_s == pytest.approx(0.5)
    assert [turn.gap_s for turn in first.turns] == [8.0, 0.0]
    assert program.turns[1].gap_s == pytest.approx(1.5)
    assert len(program.all_turns()) == 6
    # Ids are those of the session.
    assert first.turns[1].prompt == program.turns[0].prompt


def test_a_sub_agent_that_would_begin_before_its_parent_began_at_t() -> None:
    turn, _ = read(
        request(t=10.0, api_time=5.0), sub_agent(17.0, 60_000, request()), request(t=80.0)
    ).turns
    assert turn.children[0].delay_s == pytest.approx(2.0)
    assert turn.gap_s == pytest.approx(3.0)


def test_times_that_overlap_leave_no_gap() -> None:
    turn, _ = read(
        request(t=0.0, api_time=5.0), sub_agent(20.0, 17_000, request()), request(t=18.0)
    ).turns
    assert turn.children[0].delay_s == 0.0
    assert turn.gap_s == 0.0


def test_sub_agents_may_have_sub_agents_and_may_be_empty() -> None:
    inner = sub_agent(8.0, 6_000, request())
    (turn,) = read(
        request(), sub_agent(20.0, 10_000, request(), inner), sub_agent(9.0, 1_000)
    ).turns
    (child,) = turn.children
    (grandchild,) = child.turns[0].children
    assert grandchild.delay_s == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([request(), request(out="x")], "requests[1].out: got 'x', expected a whole number"),
        ([request(**{"in": 0})], "requests[0].in: got 0, expected a whole number of at least 1"),
        ([request(hash_ids=[1, 2.5])], "requests[0].hash_ids: got [1, 2.5], expected a list"),
        ([request(t=None)], "requests[0].t: is missing, expected a finite number"),
        ([request(api_time=float("inf"))], "requests[0].api_time: got inf"),
        ([request(think_time=True)], "requests[0].think_time: got True"),
        (
            [request(), sub_agent(1.0, 5, request(), request(out=-1))],
            "requests[1].requests[1].out: got -1",
        ),
        ([sub_agent(1.0, 5, request())], "requests[0].type: got 'subagent', expected a request"),
        ([], "requests: got [], expected at least one request"),
    ],
)
def test_an_error_names_the_field(requests: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(BadRecord) as caught:
        read(*requests)
    assert str(caught.value).startswith(f"s.json: {message}")


def is_continued(prompt: tuple[Run, ...], following: tuple[Run, ...]) -> bool:
    """Whether a prompt begins with all of another; faster than `shared_tokens`."""
    n_full = len(prompt) - 1
    return (
        len(following) > n_full
        and prompt[:n_full] == following[:n_full]
        and prompt[n_full].content == following[n_full].content
        and prompt[n_full].n_tokens <= following[n_full].n_tokens
    )


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the recorded sessions are not beside the checkout")
def test_the_recorded_sessions_load_as_they_are() -> None:
    programs = load(str(SAMPLE), seed=0, limits=EVERYTHING, programs=None)
    assert len(programs) == 102
    n_turns = n_whole = 0
    for program in programs:
        with gzip.open(SAMPLE / f"{program.name}.json.gz") as file:
            entries = json.load(file)["requests"]
        recorded = [entry for entry in entries if entry["type"] != "subagent"]
        nested = [
            inner for entry in entries if entry["type"] == "subagent" for inner in entry["requests"]
        ]
        assert [turn.prompt_tokens for turn in program.turns] == [r["in"] for r in recorded]
        assert [turn.output_tokens for turn in program.turns] == [
            max(1, r["out"]) for r in recorded
        ]
        children = [child for turn in program.turns for child in turn.children]
        assert [turn.prompt_tokens for child in children for turn in child.turns] == [
            r["in"] for r in nested
        ]
        # All of them began at once, as soon as the turn had ended.
        assert all(child.delay_s < 1.0 for child in children)
        for turn, following in pairwise(program.turns):
            n_turns += 1
            n_whole += is_continued(turn.prompt, following.prompt)
    assert (n_whole, n_turns) == (6461, 6946)
