"""For how long clients and operators may keep KV in GPU memory: overrides, settings, and what tenants pay."""

from __future__ import annotations

import pytest

from kvtier import link_messages as messages
from kvtier.link_messages import ProgramKey
from kvtier.programs import ProgramId
from tests.unit.command_cases import AGENT, Rig, agent_turn, override
from tests.unit.prefetch_cases import ask, in_pieces, paused, pin_of
from tests.unit.program_cases import assert_nothing_held, prompt, turn

ACME = ProgramKey("acme", "agent")


@pytest.fixture
def rig() -> Rig:
    return Rig()


def allow(rig: Rig, byte_seconds: int) -> None:
    """Let the tenant acme use so much, once."""
    budget = messages.TenantBudget("acme", byte_seconds, 1e9)
    assert rig.do(messages.PolicyCommand, tenant_budgets=[budget]).outcome == "accepted"


def left(rig: Rig) -> float:
    """Byte-seconds that acme has left."""
    return rig.engine.half.policy.ttl.budgets.ttl_limit_s("acme", 1, rig.engine.now_s)


# -- overrides -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "override_s", "granted_s"),
    [("cap", 5.0, 5.0), ("fixed", 7.0, 7.0), ("floor", 90.0, 90.0), ("cap", 500.0, 42.0)],
)
def test_an_override_holds_for_a_pin_that_is_there(
    rig: Rig, mode: str, override_s: float, granted_s: float
) -> None:
    agent_turn(rig)
    rig.do(messages.OverridesCommand, overrides=[override(mode, override_s, program=AGENT)])
    answer = rig.do(messages.PinCommand, ttl_s=42.0)
    clipped = ("clipped", f"override_{mode}") if granted_s != 42.0 else ("accepted", "pinned")
    assert (answer.outcome, answer.reason) == clipped
    assert rig.left_s() == pytest.approx(granted_s)


def test_an_override_of_zero_refuses_a_pin_and_leaves_the_one_that_is_there(rig: Rig) -> None:
    agent_turn(rig, hints={"ttl_s": 20.0})
    rig.do(messages.OverridesCommand, overrides=[override("fixed", 0.0, program=AGENT)])
    answer = rig.do(messages.PinCommand, ttl_s=42.0)
    assert (answer.outcome, answer.reason) == ("rejected", "ttl")
    assert rig.left_s() == pytest.approx(20.0, abs=0.1)


@pytest.mark.parametrize(
    ("mode", "override_s", "left_s"),
    [("fixed", 3.0, 3.0), ("cap", 0.0, 1.0), ("floor", 90.0, 90.0)],
)
def test_an_override_holds_where_a_tool_has_returned(
    rig: Rig, mode: str, override_s: float, left_s: float
) -> None:
    agent_turn(rig)
    rig.do(messages.PinCommand, ttl_s=1.0)
    rig.do(messages.OverridesCommand, overrides=[override(mode, override_s, program=AGENT)])
    rig.do(messages.ToolReturnCommand)
    assert rig.left_s() == pytest.approx(left_s)


def test_a_pin_that_must_be_loaded_is_clipped_as_one_that_is_there(rig: Rig) -> None:
    paused(rig.engine, session="agent")
    rig.do(messages.OverridesCommand, overrides=[override("cap", 5.0, program=AGENT)])
    answer = rig.do(messages.PinCommand, ttl_s=42.0)
    assert (answer.outcome, answer.reason) == ("clipped", "override_cap")
    rig.engine.run()
    assert rig.left_s() == pytest.approx(5.0, abs=0.1)
    assert_nothing_held(rig.engine)


# -- what tenants pay ------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tenant_pays_for_the_memory_of_all_ranks(ranks: int) -> None:
    rig = Rig(ranks=ranks)
    allow(rig, 80_000)
    agent_turn(rig, cache_salt="acme", hints={"ttl_s": 60.0})
    # 8 blocks of 1000 bytes in each rank.
    assert rig.left_s() == pytest.approx(10.0 / ranks, abs=0.1)


def test_a_pin_that_is_older_than_the_budget_gives_nothing_back(rig: Rig) -> None:
    agent_turn(rig, cache_salt="acme", hints={"ttl_s": 60.0})
    allow(rig, 80_000)
    other = turn("r9", prompt(30, 500), session="other", cache_salt="acme", hints={"ttl_s": 5.0})
    rig.engine.run(other)
    assert left(rig) == pytest.approx(40_000.0, rel=0.01)
    rig.do(messages.ReleaseCommand, program=ACME)
    assert left(rig) == pytest.approx(40_000.0, rel=0.01)


def test_a_pin_that_is_older_than_the_budget_pays_for_what_is_added(rig: Rig) -> None:
    agent_turn(rig, cache_salt="acme", hints={"ttl_s": 2.0})
    allow(rig, 80_000)
    rig.do(messages.PinCommand, program=ACME, ttl_s=6.0)
    assert left(rig) == pytest.approx(48_000.0, rel=0.01)
    rig.do(messages.ReleaseCommand, program=ACME)
    assert left(rig) == pytest.approx(80_000.0, rel=0.01)


def test_a_budget_that_went_and_came_back_is_given_nothing_back(rig: Rig) -> None:
    allow(rig, 80_000)
    agent_turn(rig, cache_salt="acme", hints={"ttl_s": 9.0})
    rig.do(messages.PolicyCommand, tenant_budgets=[])
    allow(rig, 80_000)
    other = turn("r9", prompt(30, 500), session="other", cache_salt="acme", hints={"ttl_s": 5.0})
    rig.engine.run(other)
    rig.do(messages.ReleaseCommand, program=ACME)
    assert left(rig) == pytest.approx(40_000.0, rel=0.01)


def test_pieces_are_paid_for_as_long_as_their_pin_lasts(rig: Rig) -> None:
    """It was lengthened while they were on their way."""
    in_pieces(rig.engine, 1)
    paused(rig.engine, session="agent", cache_salt="acme")
    allow(rig, 400_000)
    before = left(rig)
    rig.engine.workers.delay = 2
    assert rig.do(messages.PinCommand, program=ACME, ttl_s=5.0).outcome == "accepted"
    while not rig.pins:
        rig.engine.step()
    rig.do(messages.PinCommand, program=ACME, ttl_s=40.0)
    rig.engine.run()
    assert len(pin_of(rig.engine).block_ids) == 8
    assert before - left(rig) == pytest.approx(8000 * 40.0, rel=0.01)
    rig.do(messages.ReleaseCommand, program=ACME)
    assert before - left(rig) < 8000


def test_what_a_pin_has_paid_for_already_is_not_held_against_it(rig: Rig) -> None:
    allow(rig, 80_000)
    agent_turn(rig, cache_salt="acme", hints={"ttl_s": 60.0})
    assert left(rig) < 1000
    answer = rig.do(messages.PrefetchCommand, program=ACME)
    assert (answer.outcome, answer.reason) == ("accepted", "in_gpu")
    assert rig.left_s() == pytest.approx(10.0, abs=0.1)


def test_a_prefetch_loads_no_more_than_its_tenant_can_pay_for(rig: Rig) -> None:
    """Its pin keeps the first blocks already, for longer than all of them could be kept."""
    engine = rig.engine
    paused(engine, session="agent", cache_salt="acme")
    others = engine.pool.take(35)
    assert others is not None
    assert rig.do(messages.PinCommand, program=ACME, ttl_s=10.0).reason == "memory"
    engine.run()
    engine.pool.free_blocks(others)
    n_here = len(pin_of(engine).block_ids)
    assert 0 < n_here < 8
    # Two more blocks for the 10 s that the pin lasts.
    allow(rig, 21_000)
    answer = rig.do(messages.PrefetchCommand, program=ACME)
    assert (answer.outcome, answer.reason) == ("clipped", "tenant_budget")
    engine.run()
    assert len(pin_of(engine).block_ids) == n_here + 2
    assert rig.left_s() == pytest.approx(10.0, abs=0.5)
    assert left(rig) < 1500


def test_what_two_prefetches_want_is_not_promised_twice(rig: Rig) -> None:
    engine = rig.engine
    paused(engine, session="agent", cache_salt="acme")
    second = turn("q1", prompt(30, 400), session="second", cache_salt="acme")
    engine.run(second)
    engine.now_s += 700.0
    engine.step()
    blocks = engine.pool.take(engine.pool.get_num_free_blocks())
    assert blocks is not None
    engine.pool.free_blocks(blocks)
    allow(rig, 80_000)
    for session in ("agent", "second"):
        engine.half.prefetch(
            engine.facts.program_handle(ProgramId("acme", "named", session)), engine.now_s, 10.0
        )
    engine.run()
    assert left(rig) >= 0.0
    assert sum(len(pin.block_ids) * (pin.deadline_s - engine.now_s) for pin in rig.pins) <= 80.0


def test_a_pin_whose_time_was_over_while_the_engine_was_idle_is_not_lengthened(rig: Rig) -> None:
    """It ends before commands are done, and begins anew with what GPU memory still holds."""
    allow(rig, 80_000)
    agent_turn(rig, cache_salt="acme", hints={"ttl_s": 4.0})
    rig.engine.now_s += 1000.0
    answer = rig.do(messages.PinCommand, program=ACME, ttl_s=2.0)
    assert (answer.outcome, answer.reason) == ("accepted", "in_gpu")
    assert rig.left_s() == pytest.approx(2.0)
    assert left(rig) == pytest.approx(32_000.0, rel=0.01)


def test_the_program_is_told_for_how_long_it_was_pinned(rig: Rig) -> None:
    paused(rig.engine, session="agent", cache_salt="acme")
    allow(rig, 80_000)
    answer = rig.do(messages.PinCommand, program=ACME, ttl_s=60.0)
    assert (answer.outcome, answer.reason) == ("clipped", "tenant_budget")
    assert "10 s" in answer.detail
    rig.engine.run()
    assert rig.left_s() == pytest.approx(10.0, abs=0.2)
    assert ask(rig.engine, "agent", tenant="acme") == ("accepted", "in_gpu")
