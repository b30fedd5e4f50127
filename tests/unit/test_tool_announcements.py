"""Announced tools: whose pause they are about, how long they count, and what they do not undo."""

from __future__ import annotations

import pytest

from kvtier import link_messages as messages
from kvtier.costs.pinned_turn import PinnedTurn
from tests.unit.command_cases import AGENT, Rig, agent_turn, override
from tests.unit.prefetch_cases import in_pieces, paused, pin_of, step_until_copying
from tests.unit.program_cases import (
    assert_nothing_held,
    evict,
    expire,
    follow_up,
    prompt,
    turn,
)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def sub_agent(rig: Rig, request_id: str = "sub") -> None:
    """Another conversation of the program comes and goes."""
    rig.engine.run(turn(request_id, prompt(20, 800), session="agent", max_tokens=2))


# -- sub-agents ------------------------------------------------------------------------------------


def test_a_sub_agents_request_does_not_end_the_announcement_of_a_turn(rig: Rig) -> None:
    rig.engine.add(turn("r1", prompt(30), session="agent", max_tokens=30))
    rig.engine.step()
    rig.do(messages.ToolCallCommand, tool="bash", p50_s=5.0)
    sub_agent(rig)
    rig.engine.run()
    assert rig.engine.told["r1"]["tool"] == "bash"
    assert rig.engine.told["sub"]["tool"] is None, "it was about another turn"


def test_a_sub_agents_turn_is_not_named_by_the_tool_that_started_it(rig: Rig) -> None:
    agent_turn(rig)
    rig.do(messages.ToolCallCommand, tool="task", p50_s=50.0)
    sub_agent(rig)
    assert rig.engine.told["sub"]["tool"] is None
    pinned = pin_of(rig.engine, "r1").data
    assert isinstance(pinned, PinnedTurn)
    assert pinned.tool == "task"


def test_an_announcement_outlasts_a_sub_agent_where_the_turn_is_loaded_again(rig: Rig) -> None:
    first = agent_turn(rig)
    rig.do(messages.ToolCallCommand, tool="task", p50_s=50.0)
    announcements = rig.engine.half.policy.ttl.announcements
    program = rig.pins[0].program
    sub_agent(rig)
    announced = announcements.of(program, "r1")
    assert announced is not None
    assert announced.tool == "task"
    rig.engine.run(follow_up(first, "r2", session="agent"))
    assert announcements.of(program, "r1") is None
    assert rig.engine.told["r2"]["tool"] is None


def test_what_was_announced_for_a_turn_that_is_loaded_again_counts(rig: Rig) -> None:
    agent_turn(rig)
    rig.do(messages.ToolCallCommand, tool="task", p50_s=2000.0)
    expire(rig.engine)
    evict(rig.engine)
    assert rig.do(messages.ToolReturnCommand).outcome == "accepted"
    rig.engine.run()
    pinned = pin_of(rig.engine).data
    assert isinstance(pinned, PinnedTurn)
    assert pinned.announced is not None


def test_announcements_do_not_pile_up(rig: Rig) -> None:
    announcements = rig.engine.half.policy.ttl.announcements
    request = agent_turn(rig)
    for i in range(20):
        rig.do(messages.ToolCallCommand, tool="bash")
        assert announcements.of(rig.pins[0].program, request.request_id) is not None
        request = follow_up(request, f"q{i}", n_new=1, session="agent", max_tokens=1)
        rig.engine.run(request)
        aborted = turn(f"a{i}", prompt(8, 900), session="agent")
        rig.engine.add(aborted)
        rig.do(messages.ToolCallCommand, tool="bash")
        rig.engine.abort(f"a{i}")
    rig.engine.run()
    assert announcements.n_turns == 0
    rig.do(messages.ToolCallCommand, tool="bash")
    rig.do(messages.EndCommand)
    assert announcements.n_turns == len(announcements) == 0


# -- an explicit pin -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_scarce", [False, True])
def test_an_announcement_does_not_undo_an_explicit_pin(rig: Rig, *, is_scarce: bool) -> None:
    agent_turn(rig)
    rig.do(messages.PinCommand, ttl_s=300.0)
    if is_scarce:
        # What waits makes a pin dear.
        rig.engine.half._waiting_tokens.add("other", 10_000)
    answer = rig.do(messages.ToolCallCommand, tool="train", p50_s=120.0)
    rig.engine.half._waiting_tokens.remove("other")
    assert answer.outcome == "accepted"
    assert "override_fixed" in answer.detail
    assert rig.left_s() == pytest.approx(300.0)


def test_once_an_explicit_pin_was_lengthened_an_announcement_may_shorten_it_to_what_was_asked_for(
    rig: Rig,
) -> None:
    agent_turn(rig)
    rig.do(messages.PinCommand, ttl_s=10.0)
    rig.do(messages.ToolReturnCommand)
    assert rig.left_s() == pytest.approx(60.0)
    rig.engine.now_s += 20.0
    rig.do(messages.OverridesCommand, overrides=[override("fixed", 5.0, program=AGENT)])
    rig.do(messages.ToolCallCommand, tool="bash", p50_s=1.0)
    assert rig.left_s() == pytest.approx(5.0)


def test_an_explicit_pin_that_was_loaded_is_not_undone_either(rig: Rig) -> None:
    paused(rig.engine, session="agent")
    assert rig.do(messages.PinCommand, ttl_s=300.0).reason == "loading"
    rig.engine.run()
    rig.do(messages.OverridesCommand, overrides=[override("fixed", 5.0, program=AGENT)])
    rig.do(messages.ToolCallCommand, tool="bash", p50_s=1.0)
    assert rig.left_s() == pytest.approx(300.0, abs=0.2)


def test_the_next_pause_is_decided_as_any_other(rig: Rig) -> None:
    first = agent_turn(rig)
    rig.do(messages.PinCommand, ttl_s=300.0)
    rig.engine.run(follow_up(first, "r2", session="agent"))
    rig.do(messages.OverridesCommand, overrides=[override("fixed", 5.0, program=AGENT)])
    rig.do(messages.ToolCallCommand, tool="bash", p50_s=1.0)
    assert rig.left_s() == pytest.approx(5.0)


def test_a_pin_asked_for_while_it_is_loaded_lasts_as_long_as_asked(rig: Rig) -> None:
    """The prefetch that is under way was for another time."""
    engine = rig.engine
    in_pieces(engine, 1)
    paused(engine, session="agent")
    engine.workers.delay = 3
    rig.do(messages.ToolReturnCommand)
    step_until_copying(engine)
    assert rig.pins == []
    answer = rig.do(messages.PinCommand, ttl_s=300.0)
    assert (answer.outcome, answer.reason) == ("accepted", "under_way")
    engine.run()
    assert rig.left_s() == pytest.approx(300.0, abs=0.5)
    rig.do(messages.ToolCallCommand, tool="bash", p50_s=1.0)
    assert rig.left_s() == pytest.approx(300.0, abs=0.5)
    assert_nothing_held(engine)


def test_a_pin_asked_for_while_it_is_loaded_is_bounded_as_any_other(rig: Rig) -> None:
    engine = rig.engine
    paused(engine, session="agent")
    rig.do(messages.PrefetchCommand)
    rig.do(messages.OverridesCommand, overrides=[override("cap", 30.0, program=AGENT)])
    answer = rig.do(messages.PinCommand, ttl_s=300.0)
    assert (answer.outcome, answer.reason) == ("clipped", "override_cap")
    rig.do(messages.OverridesCommand, overrides=[override("fixed", 0.0, program=AGENT)])
    assert rig.do(messages.PinCommand, ttl_s=300.0).reason == "ttl"
    engine.run()
    assert rig.left_s() == pytest.approx(30.0, abs=0.5)
