"""vLLM's features beside kvtier, on the real schedulers of vLLM 0.30 to 0.33, synchronous and asynchronous.

Nothing is computed there, but every block's content is tracked: to attend to KV of other tokens, another tenant or
another adapter fails the scenario. docs/features.md names these tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.engine.vllm_versions import installed_version

if TYPE_CHECKING:
    from tests.engine.scenario_runner import Ask, Facts

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not installed_version(), reason="vLLM is not installed"),
]


def _assert_clean(facts: Facts) -> None:
    assert facts["gave_up"] is False
    for name in ("internal_failures", "lost_blocks", "locked_chunks", "open_reservations"):
        assert facts[name] == 0, name


@pytest.mark.parametrize("who", ["tenants", "adapters"])
def test_the_same_prompt_of_another_tenant_or_adapter_finds_nothing(ask: Ask, who: str) -> None:
    facts = ask(who)
    assert (facts["first_staged"], facts["second_staged"]) == (2, 2), "both keep their own"
    assert facts["second_cached"] == 0
    assert facts["again_cached"] == 128
    _assert_clean(facts)


def test_prompt_embeddings_with_the_same_token_ids_share_nothing(ask: Ask) -> None:
    facts = ask("embeddings")
    assert facts["again_staged"] == 0
    assert (facts["second_cached"], facts["again_cached"]) == (0, 0)
    _assert_clean(facts)


def test_a_streaming_session_waits_without_holding_anybody_up(ask: Ask) -> None:
    facts = ask("streaming")
    # vLLM drops the last token of each piece's output.
    assert facts["lengths"] == [70, 119, 168]
    assert facts["idle_while_it_waits"]
    assert facts["outputs"] == [30]
    assert facts["finished"]
    _assert_clean(facts)


@pytest.mark.parametrize(("mode", "n_tokens"), [("abort", None), ("wait", 40), ("keep", 40)])
def test_an_engine_falls_asleep_and_wakes_up(ask: Ask, mode: str, n_tokens: int | None) -> None:
    """Pause with cleared caches, give up all memory, wake up: no pin or copy stands in the way."""
    facts = ask(f"sleep_{mode}")
    assert facts["staged_before"] > 0
    assert facts["steps_to_pause"] < 100
    assert facts["succeeded"] is True
    assert facts["held_asleep"] == 0
    assert facts["cached_after"] == 0, "the weights may be others now"
    assert facts["output_tokens"]["meanwhile"] == facts["output_tokens"]["back"] == 5
    if n_tokens is not None:
        assert facts["output_tokens"]["running"] == n_tokens
    _assert_clean(facts)


def test_new_weights_read_nothing_of_the_old_if_the_connector_is_reset_too(ask: Ask) -> None:
    facts = ask("new_weights")
    assert facts["all"]["succeeded"] is True
    assert facts["all"]["cached"] == 0
    assert facts["gpu_only"]["cached"] == 128, "what a reset of GPU memory alone leaves"
    _assert_clean(facts["all"])


@pytest.mark.parametrize(
    ("what", "said"), [("caching", "--enable-prefix-caching"), ("window", "KV cache groups")]
)
def test_where_nothing_can_be_kept_kvtier_stays_out_or_refuses_to_start(
    ask: Ask, what: str, said: str
) -> None:
    facts = ask("unsupported")[what]
    assert facts["is_passive"]
    assert (facts["output_tokens"], facts["lost_blocks"]) == (20, 0)
    assert facts["refusal"].startswith("kvtier.tier is require, but there is no CPU tier: ")
    assert said in facts["refusal"]


def test_an_urgent_request_starts_as_early_as_without_kvtier(ask: Ask) -> None:
    facts = ask("priorities")
    assert facts["with_place"] == facts["without_place"]
    assert facts["with_done"] == facts["without_done"] == [5, 20]
    _assert_clean(facts)


def test_siblings_of_one_request_are_all_kept(ask: Ask) -> None:
    facts = ask("siblings")
    assert facts["pinned"] == 3
    assert facts["cached"] == 128
    assert facts["handoffs"] == 3
    _assert_clean(facts)


def test_what_waits_is_not_looked_up_in_every_step(ask: Ask) -> None:
    facts = ask("shared_instructions")
    assert facts["with_running_and_waiting"] == [1, 4], "or the scenario shows nothing"
    # 40 steps are 0.8 s, in which admission judges each of the four anew once.
    assert facts["with_lookups"] <= 2 * 4
    assert facts["with_cached"] == facts["without_cached"] == [160] * 5
    assert facts["with_output"] == facts["without_output"]
    assert facts["gave_up"] is False
    assert facts["internal_failures"] == facts["lost_blocks"] == 0
