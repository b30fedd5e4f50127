"""What the scheduler half tells `ReturnChance` of programs' pauses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtier.programs import ProgramLimits
from tests.unit.mini_engine import MiniEngine
from tests.unit.program_cases import follow_up, prompt, turn

if TYPE_CHECKING:
    from kvtier.ttl.return_chance import ReturnChance
    from tests.unit.fake_vllm import FakeRequest

TOOL = {"tool": "bash"}


@pytest.fixture
def engine() -> MiniEngine:
    return MiniEngine(limits=ProgramLimits(forget_after_s=50.0))


def learnt(engine: MiniEngine) -> dict[int, tuple[float, float, int]]:
    """Returned, gone and lasting by number of turns, without decay."""
    chance: ReturnChance = engine.half.policy.ttl.returning
    return {
        turns: (round(seen.returned), round(seen.gone), len(seen.lasting))
        for turns, seen in chance._seen.items()
        if seen.returned or seen.gone or seen.lasting
    }


def two_turns(engine: MiniEngine) -> FakeRequest:
    first = turn("r1", prompt(30), hints=TOOL)
    engine.run(first)
    second = follow_up(first, "r2", hints=TOOL)
    engine.run(second)
    return second


def test_returns_are_noted_by_the_number_of_turns(engine: MiniEngine) -> None:
    second = two_turns(engine)
    assert learnt(engine) == {1: (1, 0, 0), 2: (0, 0, 1)}
    engine.run(follow_up(second, "r3", hints=TOOL))
    assert learnt(engine) == {1: (1, 0, 0), 2: (1, 0, 0), 3: (0, 0, 1)}


def test_a_program_that_is_forgotten_has_ended(engine: MiniEngine) -> None:
    two_turns(engine)
    engine.now_s += 60.0
    engine.step()
    assert learnt(engine) == {1: (1, 0, 0), 2: (0, 1, 0)}
    assert len(engine.half.policy.ttl.returning) == 0


def test_a_program_that_says_that_it_ends_tells_nothing(engine: MiniEngine) -> None:
    second = two_turns(engine)
    engine.run(follow_up(second, "r3", hints={**TOOL, "end": True}))
    assert learnt(engine) == {1: (1, 0, 0), 2: (1, 0, 0)}


def test_a_program_that_is_ended_in_its_pause_tells_nothing(engine: MiniEngine) -> None:
    two_turns(engine)
    (program,) = engine.half.policy.ttl.returning._turns
    engine.half.endings.program_ended(program)
    assert learnt(engine) == {1: (1, 0, 0)}
    assert len(engine.half.policy.ttl.returning) == 0


def test_an_answer_without_a_call_is_no_such_pause(engine: MiniEngine) -> None:
    engine.run(turn("r1", prompt(30)))
    assert learnt(engine) == {}


def test_an_aborted_turn_is_no_pause(engine: MiniEngine) -> None:
    engine.add(turn("r1", prompt(30), max_tokens=20, hints=TOOL))
    engine.step()
    engine.step()
    engine.abort("r1")
    engine.run()
    assert learnt(engine) == {}


def test_a_turn_that_another_one_has_overtaken_tells_nothing(engine: MiniEngine) -> None:
    """A fork: two requests go on from one turn, and nobody knows which of them its tool has answered."""
    first = turn("r1", prompt(30), hints=TOOL)
    engine.run(first)
    engine.run(follow_up(first, "r2", hints=TOOL), follow_up(first, "r3", n_new=14, hints=TOOL))
    assert learnt(engine) == {1: (1, 0, 0), 2: (0, 0, 1), 3: (0, 0, 1)}
    assert len(engine.half.policy.ttl.returning) == 2


def test_what_is_learnt_tells_the_next_program(engine: MiniEngine) -> None:
    for i in range(6):
        session = f"s{i}"
        first = turn(f"a{i}", prompt(30, 1000 * i), session=session, hints=TOOL)
        engine.run(first)
        engine.run(follow_up(first, f"b{i}", session=session, hints=TOOL))
    engine.now_s += 40.0
    ttl = engine.half.policy.ttl
    assert ttl.return_share(1, engine.now_s) > 0.9
    assert ttl.return_share(2, engine.now_s) < 0.5
