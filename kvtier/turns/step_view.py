"""What kvtier reads of vLLM's scheduler output, by attribute."""

from __future__ import annotations

from typing import Any

from kvtier.turns.engine_facts import StepFacts

PREFILL_SHARE = 0.9
"""A step with at least this share of one request's tokens tells how long a prefill takes."""


def step_facts(output: Any) -> StepFacts:
    """What a scheduled step computes, and whether it tells how long a prefill takes.

    Draft tokens of speculative decoding do not count: with them, a step that decodes is one still.
    """
    total = int(output.total_num_scheduled_tokens)
    scheduled: dict[str, int] = output.num_scheduled_tokens
    drafts = getattr(output, "scheduled_spec_decode_tokens", None)
    if drafts:
        scheduled = {name: n - len(drafts.get(name, ())) for name, n in scheduled.items()}
        total = sum(scheduled.values())
    facts = StepFacts(
        scheduled_tokens=total,
        running_requests=len(scheduled),
        preempted=tuple(sorted(output.preempted_req_ids or ())),
    )
    if total == len(scheduled):
        # Nothing, or one token of each: most steps, with many requests.
        return facts
    n_tokens = max(scheduled.values())
    if n_tokens >= PREFILL_SHARE * total:
        request_id = next(known for known, n in scheduled.items() if n == n_tokens)
        cached = _computed_before(output, request_id)
        if cached is not None:
            facts.prefill = (cached, n_tokens)
    return facts


def _computed_before(output: Any, request_id: str) -> int | None:
    for new in output.scheduled_new_reqs:
        if new.req_id == request_id:
            return int(new.num_computed_tokens)
    cached = output.scheduled_cached_reqs
    for known, n_computed in zip(cached.req_ids, cached.num_computed_tokens, strict=False):
        if known == request_id:
            return int(n_computed)
    return None
