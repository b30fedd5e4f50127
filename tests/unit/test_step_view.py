"""What kvtier reads of a scheduled step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kvtier.turns.step_view import step_facts


def scheduled(tokens: dict[str, int], drafts: dict[str, list[int]] | None = None) -> Any:
    names = list(tokens)
    return SimpleNamespace(
        total_num_scheduled_tokens=sum(tokens.values()),
        num_scheduled_tokens=tokens,
        scheduled_spec_decode_tokens=drafts or {},
        preempted_req_ids=None,
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=names, num_computed_tokens=[500] * len(names)
        ),
    )


def test_a_step_of_one_requests_prefill_tells_how_long_that_takes() -> None:
    facts = step_facts(scheduled({"a": 1, "b": 300}))
    assert (facts.scheduled_tokens, facts.running_requests) == (301, 2)
    assert facts.prefill == (500, 300)


def test_a_step_that_decodes_tells_nothing_of_prefills() -> None:
    facts = step_facts(scheduled({"a": 1, "b": 1}))
    assert (facts.scheduled_tokens, facts.running_requests, facts.prefill) == (2, 2, None)


def test_draft_tokens_make_no_prefill_of_a_step_that_decodes() -> None:
    facts = step_facts(scheduled({"a": 5}, {"a": [1, 2, 3, 4]}))
    assert (facts.scheduled_tokens, facts.running_requests, facts.prefill) == (1, 1, None)
    facts = step_facts(scheduled({"a": 4, "b": 300}, {"a": [1, 2, 3]}))
    assert (facts.scheduled_tokens, facts.prefill) == (301, (500, 300))
