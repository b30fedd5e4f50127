"""What the policy learns from steps and turns, as admission asks for it."""

from __future__ import annotations

import pytest

from kvtier.policy import Policy, PolicyConfig
from kvtier.ttl.gaps import GapBook
from kvtier.ttl_controller import OutputReuse
from kvtier.turns.engine_facts import StepFacts
from tests.unit.fake_vllm import engine_facts


@pytest.fixture
def policy() -> Policy:
    return Policy(engine_facts(), PolicyConfig(), GapBook(), OutputReuse())


def test_a_round_computes_every_context_anew_and_generates_a_turn(policy: Policy) -> None:
    block_tokens = policy.facts.block_tokens
    prefill_s = policy.prefill.model().seconds(0, 10 * block_tokens)
    assert policy.round_s(0, 0) == 0.0
    assert policy.round_s(4, 40) == pytest.approx(4 * prefill_s)
    policy.observe_output(50)
    policy.observe_step(StepFacts(scheduled_tokens=4, running_requests=4), 0.08)
    assert policy.round_s(4, 40) == pytest.approx(4 * (prefill_s + 50 * 0.02))


def test_a_step_with_a_prefill_says_nothing_about_generation(policy: Policy) -> None:
    policy.observe_output(50)
    policy.observe_step(StepFacts(scheduled_tokens=515, running_requests=4), 9.0)
    assert policy.generation.turn_s() == 0.0
