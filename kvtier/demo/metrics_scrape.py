"""Where prompt tokens came from, read from vLLM's own ``/metrics``.

vLLM counts prompt tokens by source (GPU prefix cache, connector, computed) when a request
produces its first token, summed over requests. :func:`attribute` splits the sums over the
requests again: the counters were read after every first token, and the prompt tokens
between two readings say which requests they cover.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Requests that can share one reading; more is not searched but split in proportion.
_MAX_SHARED = 10


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """vLLM's counters, summed over engines. Tokens, except where the name says otherwise."""

    prompt_tokens: int = 0
    gpu_hit_tokens: int = 0
    external_hit_tokens: int = 0
    computed_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    steps: int = 0

    def __sub__(self, earlier: EngineCounters) -> EngineCounters:
        """What was counted since ``earlier``."""
        return EngineCounters(
            *(getattr(self, item.name) - getattr(earlier, item.name) for item in fields(self))
        )


# Sample name and, where one is split by source, the source label, of each counter.
_SAMPLES: Mapping[tuple[str, str | None], str] = {
    ("vllm:prompt_tokens_total", None): "prompt_tokens",
    ("vllm:prompt_tokens_by_source_total", "local_cache_hit"): "gpu_hit_tokens",
    ("vllm:prompt_tokens_by_source_total", "external_kv_transfer"): "external_hit_tokens",
    ("vllm:prompt_tokens_by_source_total", "local_compute"): "computed_tokens",
    ("vllm:generation_tokens_total", None): "generation_tokens",
    ("vllm:num_preemptions_total", None): "preemptions",
    ("vllm:iteration_tokens_total_count", None): "steps",
}


def parse_counters(text: str) -> EngineCounters:
    """Read the counters out of a Prometheus exposition.

    Raises:
        KeyError: the text lacks one of them (another vLLM release).
    """
    totals: dict[str, int] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = _SAMPLES.get((sample.name, sample.labels.get("source")))
            if name is not None:
                totals[name] = totals.get(name, 0) + int(sample.value)
    missing = sorted(set(_SAMPLES.values()) - totals.keys())
    if missing:
        message = f"vLLM's /metrics does not report {', '.join(missing)}"
        raise KeyError(message)
    return EngineCounters(**totals)


def parse_gauge(text: str, name: str) -> float | None:
    """A gauge's value, summed over its labels; None where it is not reported."""
    values = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    ]
    return sum(values) if values else None


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A request whose prompt was counted: its key, prompt and cached tokens (all sources)."""

    key: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenSources:
    """One request's prompt tokens by source.

    ``exact`` is False where several requests share one reading of the counters and the
    split between them is in proportion to their cached tokens.
    """

    gpu_tokens: int
    external_tokens: int
    exact: bool


def attribute(
    first_tokens: Sequence[FirstToken], readings: Iterable[EngineCounters]
) -> dict[str, TokenSources]:
    """Split the counters over requests.

    Args:
        first_tokens: All requests, in the order of their first tokens.
        readings: Counters since the start of the run, in order; the last one was taken
            after the last request.

    Returns:
        Sources by request key, for every request. Where no set of requests fits what two
        readings differ by, the next reading is taken in as well.
    """
    waiting = list(first_tokens)
    found: dict[str, TokenSources] = {}
    covered = EngineCounters()
    for reading in readings:
        delta = reading - covered
        group = _covered_by(waiting, delta.prompt_tokens)
        if group:
            found.update(_split(group, delta.external_hit_tokens))
            waiting = [request for request in waiting if request.key not in found]
            covered = reading
    if waiting:
        external = max(0, reading.external_hit_tokens - covered.external_hit_tokens)
        found.update(_split(waiting, external))
    return found


def _covered_by(waiting: Sequence[FirstToken], prompt_tokens: int) -> list[FirstToken]:
    """The earliest smallest set of waiting requests with exactly ``prompt_tokens``."""
    if prompt_tokens <= 0:
        return []
    window = waiting[:_MAX_SHARED]
    for size in range(1, len(window) + 1):
        for group in itertools.combinations(window, size):
            if sum(request.prompt_tokens for request in group) == prompt_tokens:
                return list(group)
    return []


def _split(group: Sequence[FirstToken], external_tokens: int) -> dict[str, TokenSources]:
    cached = sum(request.cached_tokens for request in group)
    external_tokens = min(external_tokens, cached)
    exact = len(group) == 1 or external_tokens in (0, cached)
    result: dict[str, TokenSources] = {}
    left, cached_left = external_tokens, cached
    for request in group:
        share = round(left * request.cached_tokens / cached_left) if cached_left else 0
        result[request.key] = TokenSources(request.cached_tokens - share, share, exact)
        left -= share
        cached_left -= request.cached_tokens
    return result
