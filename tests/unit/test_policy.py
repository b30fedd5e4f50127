"""What the policy learns from steps, turns and copies, and what it makes of it."""

from __future__ import annotations

import pytest

from kvtier.orders import Calibration, OrderResult
from kvtier.policy import PROBE_EVERY, Policy
from kvtier.policy_facts import PolicyConfig, ReturnChoice
from kvtier.ttl.gaps import SurvivalCurve
from kvtier.turns.engine_facts import StepFacts
from tests.unit.fake_vllm import engine_facts


@pytest.fixture
def policy() -> Policy:
    return Policy(engine_facts(), PolicyConfig())


def test_a_round_computes_the_others_contexts_anew_and_generates_their_turns(
    policy: Policy,
) -> None:
    block_tokens = policy.facts.block_tokens
    prefill_s = policy.prefill.model().seconds(0, 10 * block_tokens)
    assert policy.round_s(0, 0) == policy.round_s(1, 10) == 0.0
    assert policy.round_s(4, 40) == pytest.approx(3 * prefill_s)
    policy.observe_output(50)
    policy.observe_step(StepFacts(scheduled_tokens=4, running_requests=4), 0.08)
    assert policy.round_s(4, 40) == pytest.approx(3 * (prefill_s + 50 * 0.02))


def test_a_step_with_a_prefill_says_nothing_about_generation(policy: Policy) -> None:
    policy.observe_output(50)
    policy.observe_step(StepFacts(scheduled_tokens=515, running_requests=4), 9.0)
    assert policy.generation.turn_s() == 0.0


def calibration(bytes_per_s: float) -> Calibration:
    link = (1e-4, ((4096, bytes_per_s),))
    return Calibration(store=link, load=link, prefill=(), profile_path="")


def test_all_ranks_copy_at_once_over_links_of_their_own() -> None:
    one, four = (Policy(engine_facts(ranks=ranks), PolicyConfig()) for ranks in (1, 4))
    for policy in (one, four):
        policy.seed_from(calibration(1e9))
    assert one.load_link.model().seconds(10**6, 4096) == pytest.approx(
        four.load_link.model().seconds(4 * 10**6, 4096)
    )


@pytest.mark.parametrize("seconds", [1e-3, 30.0])
def test_a_calibrated_prefill_is_believed_however_far_from_the_guess(
    policy: Policy, seconds: float
) -> None:
    """A model on a CPU takes thousands of times as long as the guess for a GPU."""
    link = (1e-4, ((4096, 1e9),))
    measured = tuple((cached, 512, seconds * (1 + cached / 8192)) for cached in (0, 2048, 8192))
    policy.seed_from(Calibration(store=link, load=link, prefill=measured, profile_path=""))
    for cached_tokens, new_tokens, taken_s in measured:
        predicted_s = policy.prefill.model().seconds(cached_tokens, new_tokens)
        assert predicted_s == pytest.approx(taken_s, rel=0.25)


def returning(policy: Policy) -> ReturnChoice:
    choice, _ = policy.decide_return(65, 0, 64, backlog_tokens=0, waiting_requests=0)
    policy.observe_return(choice.reason)
    return choice


def slow_link(policy: Policy, ratio: float) -> None:
    """A link over which 64 tokens take `ratio` times as long as to compute them."""
    compute_s = policy.prefill.model().seconds(0, 64)
    n_bytes = 64 * policy.facts.kv_bytes_per_token
    link = (0.0, ((1, n_bytes / (ratio * compute_s)),))
    policy.seed_from(Calibration(store=link, load=link, prefill=(), profile_path=""))


def test_a_link_that_seems_slow_is_tried_now_and_then(policy: Policy) -> None:
    slow_link(policy, 2.0)
    for _ in range(PROBE_EVERY):
        assert returning(policy).reason == "recompute_cheaper"
    probe = returning(policy)
    assert (probe.source, probe.reload_tokens, probe.reason) == ("reload", 64, "link_probe")
    policy.observe_copy(OrderResult(1, "load", ok=True, n_bytes=100, seconds=9.0, run_bytes=1))
    assert returning(policy).reason == "recompute_cheaper"


def test_a_link_that_is_far_too_slow_is_not_tried(policy: Policy) -> None:
    slow_link(policy, 50.0)
    for _ in range(3 * PROBE_EVERY):
        assert returning(policy).reason == "recompute_cheaper"


def test_staged_kv_is_worth_more_where_the_program_returns_soon(
    policy: Policy,
) -> None:
    for _ in range(200):
        policy.ttl.observe_gap("quick", 1.0)
        policy.ttl.observe_gap("slow", 600.0)
    whole = policy.prefill.model().seconds(0, 4096)
    assert policy.staged_value_s("quick", 4096) == pytest.approx(whole, rel=0.05)
    assert policy.staged_value_s("slow", 4096) < 0.2 * whole


def test_what_one_pause_is_predicted_to_last_changes_nothing_between_programs(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tier values, for how long, and what admission expects: a wrong prediction costs others nothing."""
    for _ in range(200):
        policy.ttl.observe_gap("bash", 2.0)

    def answers() -> tuple[float, float, float]:
        return (
            policy.staged_value_s("bash", 4096),
            policy.lease_s("bash"),
            policy.ttl.mean_gap_s("bash"),
        )

    before = answers()
    monkeypatch.setattr(policy.ttl, "away", lambda _: SurvivalCurve((1e6,), (0.0,)))
    assert answers() == before


def test_steps_are_thinned_only_as_long_as_they_come_as_expected(policy: Policy) -> None:
    def steps(n: int, seconds: float) -> list[tuple[int, int, float]]:
        """The last samples that were taken of so many equal steps."""
        policy.prefill_samples.clear()
        for _ in range(n):
            facts = StepFacts(scheduled_tokens=1000, running_requests=1, prefill=(0, 1000))
            policy.observe_step(facts, seconds)
        return list(policy.prefill_samples)

    steps(200, 0.1)
    before_s = policy.prefill.model().seconds(0, 1000)
    assert len(steps(16, before_s)) == 4
    assert len(steps(8, 3 * before_s)) == 8, "none is left out until the model has followed"
    assert policy.prefill.model().seconds(0, 1000) > before_s
