"""Identity of programs: who belongs together, who must not, and what is remembered."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.identity.prefix_index import PrefixIndex
from kvtier.identity.program_records import bounded_name
from kvtier.programs import (
    ProgramId,
    ProgramLimits,
    ProgramTable,
    TurnEnd,
    TurnRequest,
    TurnResult,
    TurnStart,
)

BLOCK = 4


def hashes(tokens: str, tenant: str | None = None) -> list[bytes]:
    """Chained hashes of the full blocks of a string of one-character tokens, as vLLM makes them."""
    out: list[bytes] = []
    parent = (tenant or "").encode()
    for begin in range(0, len(tokens) - BLOCK + 1, BLOCK):
        parent = hashlib.sha256(parent + tokens[begin : begin + BLOCK].encode()).digest()
        out.append(parent)
    return out


class Engine:
    """Feeds a table with turns given as text."""

    def __init__(self, limits: ProgramLimits | None = None) -> None:
        self.table = ProgramTable(limits)
        self._turns: dict[str, tuple[str, str | None]] = {}

    def start(
        self,
        request_id: str,
        prompt: str,
        now_s: float,
        *,
        session: str | None = None,
        hint: str | None = None,
        tenant: str | None = None,
        end: bool = False,
    ) -> TurnStart:
        self._turns[request_id] = (prompt, tenant)
        request = TurnRequest(
            request_id, session, hint, tenant, hashes(prompt, tenant), ends_program=end
        )
        expected = self.table.find(request)
        start = self.table.turn_started(request, now_s)
        assert expected in (None, start.program)
        assert (expected is None) == start.is_new
        return start

    def finish(
        self, request_id: str, output: str, now_s: float, *, tool: str | None = "bash"
    ) -> TurnEnd:
        prompt, tenant = self._turns.pop(request_id)
        text = prompt + output
        end = self.table.turn_finished(
            TurnResult(
                request_id,
                tool=tool,
                is_tool_call=tool is not None,
                context_tokens=len(text),
                service_tokens=len(output),
                block_hashes=hashes(text, tenant),
                reusable_blocks=(len(text) - 1) // BLOCK,
            ),
            now_s,
        )
        assert end is not None
        return end


SYSTEM = "S" * 20


def test_a_session_is_a_program_and_gaps_are_measured() -> None:
    engine = Engine()
    first = engine.start("r1", SYSTEM + "hello", 1.0, session="s")
    assert (first.is_new, first.gap, first.matched_by, first.turn_index) == (
        True,
        None,
        "session",
        0,
    )
    engine.finish("r1", "x" * 10, 3.0, tool="grep")
    second = engine.start("r2", SYSTEM + "hello" + "x" * 10 + "res", 7.5, session="s")
    assert second.program == first.program
    assert (second.is_new, second.arrival_s, second.turn_index) == (False, 1.0, 1)
    assert second.gap is not None
    assert (second.gap.gap_s, second.gap.tool, second.gap.is_tool_call) == (4.5, "grep", True)
    assert second.continues == ("r1",)
    assert second.expected_context_tokens == 35
    view = engine.table.view(first.program)
    assert view is not None
    assert (view.turns, view.active_requests, view.last_tool, view.service_tokens) == (
        2,
        ("r2",),
        "grep",
        10,
    )
    end = engine.finish("r2", "y" * 9, 9.0)
    assert end.superseded == ("r1",)
    view = engine.table.view(first.program)
    assert view is not None
    assert view.finished_requests == ("r2",)


def test_agents_that_send_nothing_are_followed_by_prefix() -> None:
    engine = Engine()
    a = engine.start("a1", SYSTEM + "task A!", 0.0)
    b = engine.start("b1", SYSTEM + "task B!", 0.0)
    assert a.program != b.program
    engine.finish("a1", "alpha alpha ", 1.0)
    engine.finish("b1", "beta beta be", 1.0)
    text_a, text_b = SYSTEM + "task A!alpha alpha ", SYSTEM + "task B!beta beta be"
    for turn in range(2, 6):
        text_a, text_b = text_a + f"result {turn}", text_b + f"result {turn}"
        again_a = engine.start(f"a{turn}", text_a, turn)
        again_b = engine.start(f"b{turn}", text_b, turn)
        assert (again_a.program, again_a.matched_by) == (a.program, "prefix")
        assert (again_b.program, again_b.matched_by) == (b.program, "prefix")
        assert again_a.continues == (f"a{turn - 1}",)
        assert engine.finish(f"a{turn}", "more", turn + 0.5).superseded == (f"a{turn - 1}",)
        engine.finish(f"b{turn}", "less", turn + 0.5)
        text_a, text_b = text_a + "more", text_b + "less"
    assert len(engine.table) == 2


@pytest.mark.parametrize("output", ["", "o", "ok", "okay", "a longer answer"])
@pytest.mark.parametrize("question", ["", "q", "qu", "question"])
def test_a_shared_system_prompt_joins_nobody(question: str, output: str) -> None:
    engine = Engine()
    first = engine.start("a", SYSTEM + question, 0.0)
    engine.finish("a", output, 1.0)
    second = engine.start("b", SYSTEM + "something else", 2.0)
    assert second.program != first.program
    assert second.gap is None


def test_an_answer_rendered_differently_still_continues_from_the_second_turn_on() -> None:
    engine = Engine()
    a = engine.start("1", SYSTEM + "task A!", 0.0)
    engine.finish("1", "answer one..", 1.0)
    text = SYSTEM + "task A!answer one..result"
    engine.start("2", text, 2.0)
    engine.finish("2", "<think>hm</think>call", 3.0)
    third = engine.start("3", text + "call" + "result two", 4.0)
    assert third.program == a.program
    assert third.continues == ("2",)
    assert third.gap is not None
    assert third.gap.gap_s == 1.0


def test_tenants_are_apart() -> None:
    engine = Engine()
    a = engine.start("a", SYSTEM, 0.0, session="s", tenant="t1")
    b = engine.start("b", SYSTEM, 0.0, session="s", tenant="t2")
    c = engine.start("c", SYSTEM, 0.0, session="s")
    assert len({a.program, b.program, c.program}) == 3


def test_equal_hashes_of_two_tenants_do_not_join_them() -> None:
    table = ProgramTable()
    chain = hashes(SYSTEM + "question and answer")
    first = table.turn_started(TurnRequest("a", tenant="t1", block_hashes=chain[:5]), 0.0)
    table.turn_finished(TurnResult("a", block_hashes=chain, reusable_blocks=len(chain)), 1.0)
    second = table.turn_started(TurnRequest("b", tenant="t2", block_hashes=chain), 2.0)
    assert second.program != first.program


def test_session_comes_before_hint_before_prefix() -> None:
    engine = Engine()
    engine.start("1", SYSTEM + "task", 0.0, session="s", hint="h")
    engine.finish("1", "answer answer", 1.0)
    text = SYSTEM + "taskanswer answer more"
    assert engine.start("2", text, 2.0, session="other").program.name == "other"
    assert engine.start("3", text, 2.0, hint="h").program.name == "h"
    assert engine.start("4", text, 2.0).program.name == "s"


def test_of_forks_with_the_same_end_the_latest_wins() -> None:
    engine = Engine()
    old = engine.start("1", SYSTEM + "task", 0.0)
    new = engine.start("2", SYSTEM + "task", 0.0)
    engine.finish("2", "same answer", 1.0)
    engine.finish("1", "same answer", 2.0)
    again = engine.start("3", SYSTEM + "tasksame answer, next", 3.0)
    assert again.program == old.program != new.program


def test_a_branch_from_an_earlier_turn_is_recognised() -> None:
    engine = Engine()
    first = engine.start("1", SYSTEM + "task", 0.0)
    engine.finish("1", "answer one..", 1.0)
    text = SYSTEM + "taskanswer one.."
    engine.start("2", text + "result", 2.0)
    engine.finish("2", "answer two..", 3.0)
    branch = engine.start("2b", text + "another", 4.0)
    assert branch.program == first.program
    assert branch.gap is None
    assert engine.finish("2b", "answer 2b...", 5.0).superseded == ()


def test_parallel_turns_stay_until_their_own_continuation() -> None:
    engine = Engine()
    engine.start("main", SYSTEM + "main task", 0.0, session="s")
    engine.finish("main", "start two sub-agents", 1.0, tool="Task")
    main = SYSTEM + "main taskstart two sub-agents"
    for name in ("x", "y"):
        sub = engine.start(name, f"sub-agent prompt {name} {name * 8}", 1.5, session="s")
        assert sub.gap is None
        assert sub.continues == ()
    for name in ("x", "y"):
        assert engine.finish(name, f"answer of {name}", 2.0).superseded == ()
    again = engine.start("x2", f"sub-agent prompt x {'x' * 8}answer of x result", 3.0, session="s")
    assert again.continues == ("x",)
    assert again.gap is not None
    assert again.gap.gap_s == 1.0
    assert engine.finish("x2", "done", 4.0, tool=None).superseded == ("x",)
    back = engine.start("main2", main + "results", 9.0, session="s")
    assert back.continues == ("main",)
    assert back.gap is not None
    assert (back.gap.gap_s, back.gap.tool) == (8.0, "Task")
    view = engine.table.view(back.program)
    assert view is not None
    assert view.finished_requests == ("main", "y", "x2")


def test_n_samples_of_one_prompt_are_kept_side_by_side() -> None:
    engine = Engine()
    for i in range(3):
        engine.start(f"{i}_r", SYSTEM + "task", 0.0, session="s")
    view = engine.table.view(engine.table.program_of("0_r"))  # type: ignore[arg-type]
    assert view is not None
    assert view.active_requests == ("0_r", "1_r", "2_r")
    for i in range(3):
        assert engine.finish(f"{i}_r", f"number {i} answers", 1.0).superseded == ()
    end = engine.start("next", SYSTEM + "tasknumber 1 answers" + " result", 2.0, session="s")
    assert end.continues == ("1_r",)


def test_a_session_without_hashes_still_has_gaps() -> None:
    table = ProgramTable()
    table.turn_started(TurnRequest("1", "s"), 0.0)
    table.turn_finished(TurnResult("1", tool="t", is_tool_call=True), 1.0)
    start = table.turn_started(TurnRequest("2", "s"), 4.0)
    assert start.gap is not None
    assert start.gap.gap_s == 3.0
    assert start.continues == ()


def test_an_aborted_turn_leaves_the_one_before_it_in_place() -> None:
    engine = Engine()
    engine.start("1", SYSTEM + "task", 0.0)
    engine.finish("1", "answer one..", 1.0)
    text = SYSTEM + "taskanswer one..result"
    engine.start("2", text, 2.0)
    assert engine.table.turn_aborted("2", 2.5) is None
    retry = engine.start("3", text, 3.0)
    assert retry.continues == ("1",)
    assert retry.gap is None
    assert engine.table.turn_aborted("unknown", 3.0) is None


def test_an_anonymous_program_whose_only_turn_was_aborted_is_gone() -> None:
    engine = Engine()
    start = engine.start("1", SYSTEM + "task", 0.0)
    gone = engine.table.turn_aborted("1", 1.0)
    assert gone is not None
    assert gone.program == start.program
    assert len(engine.table) == 0


def test_a_reused_request_id_does_not_join_strangers() -> None:
    engine = Engine()
    first = engine.start("same", SYSTEM + "task", 0.0)
    engine.finish("same", "answer one..", 1.0)
    assert engine.start("same", "quite another prompt", 2.0).program != first.program


def test_a_turn_that_ends_its_program_leaves_nothing() -> None:
    engine = Engine()
    engine.start("1", SYSTEM + "task", 0.0, session="s")
    engine.finish("1", "answer one..", 1.0)
    engine.start("2", SYSTEM + "taskanswer one..bye", 2.0, session="s", end=True)
    end = engine.finish("2", "bye", 3.0, tool=None)
    assert end.ended
    assert set(end.superseded) == {"1", "2"}
    assert end.gaps == ()
    assert (len(engine.table), engine.table.indexed_ends) == (0, 0)


def test_ending_a_paused_program_censors_its_pause() -> None:
    engine = Engine()
    start = engine.start("1", SYSTEM + "task", 0.0, session="s")
    engine.finish("1", "answer one..", 1.0, tool="grep")
    gone = engine.table.end_program(start.program, 11.0)
    assert gone is not None
    assert gone.turns == ("1",)
    assert [(gap.waited_s, gap.tool) for gap in gone.gaps] == [(10.0, "grep")]
    assert engine.table.end_program(start.program, 12.0) is None


def test_ending_a_running_program_waits_for_its_turns() -> None:
    engine = Engine()
    start = engine.start("1", SYSTEM, 0.0, session="s")
    engine.start("2", SYSTEM, 0.0, session="s")
    assert engine.table.end_program(start.program, 1.0) is None
    assert not engine.finish("1", "a", 2.0).ended
    assert engine.finish("2", "b", 2.0).ended
    assert len(engine.table) == 0


def test_idle_programs_are_forgotten_as_censored_gaps() -> None:
    engine = Engine(ProgramLimits(forget_after_s=10.0))
    start = engine.start("1", SYSTEM + "task", 0.0)
    engine.finish("1", "answer one..", 1.0, tool="grep")
    engine.start("busy", "another one", 1.0)
    assert engine.table.forget(11.0) == ()
    (gone,) = engine.table.forget(11.5)
    assert gone.program == start.program
    assert [(gap.waited_s, gap.tool, gap.ended_request_id) for gap in gone.gaps] == [
        (10.5, "grep", "1")
    ]
    assert len(engine.table) == 1
    assert engine.start("2", SYSTEM + "taskanswer one..next", 12.0).is_new


def test_too_many_programs_lose_the_least_recently_active() -> None:
    engine = Engine(ProgramLimits(max_programs=2))
    for name in "abc":
        engine.start(name, SYSTEM, 0.0, session=name)
    engine.finish("b", "x", 1.0)
    engine.finish("a", "x", 2.0)
    assert [gone.program.name for gone in engine.table.forget(3.0)] == ["b"]
    assert engine.table.forget(3.0) == ()


def test_live_turns_of_a_program_are_bounded() -> None:
    engine = Engine(ProgramLimits(max_live_turns=3, max_past_turns=2))
    dropped: list[str] = []
    for i in range(10):
        engine.start(f"r{i}", f"prompt {i} of its own" * 2, float(i), session="s")
        end = engine.finish(f"r{i}", "an answer to it", i + 0.5)
        dropped += end.superseded
        assert len(end.gaps) == len(end.superseded)
    assert dropped == [f"r{i}" for i in range(7)]
    assert engine.table.indexed_ends == 3 + 2


def test_a_known_request_id_is_the_same_turn() -> None:
    engine = Engine()
    engine.start("1", SYSTEM, 0.0, session="s")
    again = engine.table.turn_started(TurnRequest("1", "s"), 1.0)
    assert (again.matched_by, again.active_turns, again.turn_index) == ("repeat", 1, 0)


def test_long_names_are_bounded_and_stay_different() -> None:
    a, b = bounded_name("x" * 1_000_000 + "a"), bounded_name("x" * 1_000_000 + "b")
    assert a != b
    assert len(a) < 100
    assert len(bounded_name("\ud800" * 300)) < 100


def test_reusable_blocks_must_be_hashed() -> None:
    with pytest.raises(ValueError, match="3 of 0"):
        TurnResult("r", reusable_blocks=3)


class CountingHashes(Sequence[bytes]):
    """A prompt's hashes that count how often they are looked at."""

    def __init__(self, inner: list[bytes]) -> None:
        self._inner = inner
        self.looks = 0

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, at):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN204
        self.looks += 1
        return self._inner[at]


def test_a_long_prompt_is_probed_at_registered_lengths_only() -> None:
    index: PrefixIndex[int] = PrefixIndex()
    chain = hashes("p" * 4 * 6000)
    for i, blocks in enumerate((10, 500, 500, 7000, 4000)):
        index.add("t", blocks, (b"other" if blocks == 4000 else chain[min(blocks, 6000) - 1]), i)
    prompt = CountingHashes(chain)
    assert index.longest("t", prompt) == 2
    assert prompt.looks == 2
    index.remove("t", 500, chain[499], 2)
    assert index.longest("t", prompt) == 1
    index.remove("t", 500, chain[499], 1)
    assert index.longest("t", prompt) == 0
    assert index.longest("other", prompt) is None
    with pytest.raises(KeyError):
        index.remove("t", 500, chain[499], 1)


class TableMachine(RuleBasedStateMachine):
    """Any order of events; in the end nothing may be left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(
            ProgramLimits(forget_after_s=50.0, max_programs=4, max_live_turns=3, max_past_turns=1)
        )
        self.now_s = 0.0
        self.started = 0
        self.program: dict[str, ProgramId] = {}
        self.prompts: dict[str, str] = {}
        self.texts: list[str] = [SYSTEM]

    @property
    def table(self) -> ProgramTable:
        return self.engine.table

    @rule(
        session=st.sampled_from([None, None, "s1", "s2"]),
        tenant=st.sampled_from([None, "t"]),
        which=st.integers(0, 50),
        tail=st.text("abc", max_size=9),
        end=st.sampled_from([False, False, False, True]),
    )
    def start(
        self, session: str | None, tenant: str | None, which: int, tail: str, end: bool
    ) -> None:
        self.now_s += 1
        self.started += 1
        request_id = f"r{self.started}"
        prompt = self.texts[which % len(self.texts)] + tail
        start = self.engine.start(
            request_id, prompt, self.now_s, session=session, tenant=tenant, end=end
        )
        assert start.program.tenant == tenant
        if session is not None:
            assert start.program[1:] == ("named", session)
        assert start.arrival_s <= self.now_s
        assert start.gap is None or start.gap.gap_s >= 0
        self.program[request_id] = start.program
        self.prompts[request_id] = prompt

    @precondition(lambda self: self.program)
    @rule(which=st.integers(0, 50), output=st.text("xy", max_size=12), tool=st.booleans())
    def finish(self, which: int, output: str, tool: bool) -> None:
        self.now_s += 1
        request_id = sorted(self.program)[which % len(self.program)]
        end = self.engine.finish(request_id, output, self.now_s, tool="t" if tool else None)
        assert end.program == self.program.pop(request_id)
        assert end.ended == (end.program not in self.table)
        assert (request_id in end.superseded) == end.ended
        self.texts.append(self.prompts.pop(request_id) + output)

    @precondition(lambda self: self.program)
    @rule(which=st.integers(0, 50))
    def abort(self, which: int) -> None:
        self.now_s += 1
        request_id = sorted(self.program)[which % len(self.program)]
        self.table.turn_aborted(request_id, self.now_s)
        del self.program[request_id], self.prompts[request_id]

    @rule(wait_s=st.sampled_from([0.0, 60.0]))
    def forget(self, wait_s: float) -> None:
        self.now_s += wait_s
        for gone in self.table.forget(self.now_s):
            assert gone.program not in self.table
            assert gone.program not in self.program.values()

    @precondition(lambda self: self.program)
    @rule(which=st.integers(0, 50))
    def end_program(self, which: int) -> None:
        program = sorted(self.program.items())[which % len(self.program)][1]
        assert self.table.end_program(program, self.now_s) is None
        assert program in self.table

    @invariant()
    def active_turns_are_known(self) -> None:
        for request_id, program in self.program.items():
            assert self.table.program_of(request_id) == program
            view = self.table.view(program)
            assert view is not None
            assert request_id in view.active_requests
            assert len(view.finished_requests) <= 3
        assert self.table.indexed_ends <= len(self.table) * (3 + 1) * 2

    def teardown(self) -> None:
        for i, request_id in enumerate(sorted(self.program)):
            if i % 2:
                self.table.turn_aborted(request_id, self.now_s)
            else:
                self.engine.finish(request_id, "bye", self.now_s)
        self.table.forget(self.now_s + 51.0)
        assert len(self.table) == 0
        assert self.table.indexed_ends == 0
        for held in (
            self.table._program_of_request,
            self.table._idle,
            self.table._index._lengths,
            self.table._index._count_of_length,
        ):
            assert not held


TableMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTable = TableMachine.TestCase
