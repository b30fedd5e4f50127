"""vLLM's summed counters, split over requests again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.demo.metrics_scrape import (
    EngineCounters,
    FirstToken,
    TokenSources,
    attribute,
    parse_counters,
    parse_gauge,
)

METRICS = """\
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0"} 100.0
vllm:prompt_tokens_total{engine="1"} 20.0
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 60.0
vllm:prompt_tokens_by_source_total{engine="0",source="local_cache_hit"} 32.0
vllm:prompt_tokens_by_source_total{engine="0",source="external_kv_transfer"} 28.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0"} 7.0
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0"} 1.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf"} 9.0
vllm:iteration_tokens_total_count{engine="0"} 9.0
vllm:iteration_tokens_total_sum{engine="0"} 107.0
# TYPE vllm:kvtier_tier_ready gauge
vllm:kvtier_tier_ready{engine="0"} 1.0
"""


def test_counters_are_summed_over_engines() -> None:
    assert parse_counters(METRICS) == EngineCounters(120, 32, 28, 60, 7, 1, 9)


def test_a_missing_counter_is_named() -> None:
    text = METRICS.replace("num_preemptions", "renamed")
    with pytest.raises(KeyError, match="preemptions"):
        parse_counters(text)


def test_gauges() -> None:
    assert parse_gauge(METRICS, "vllm:kvtier_tier_ready") == 1.0
    assert parse_gauge(METRICS, "vllm:kvtier_mode") is None


def counters(prompt: int, external: int) -> EngineCounters:
    return EngineCounters(prompt_tokens=prompt, external_hit_tokens=external)


def test_one_request_a_reading_is_exact() -> None:
    requests = [FirstToken("a", 100, 0), FirstToken("b", 150, 96), FirstToken("c", 90, 64)]
    readings = [counters(100, 0), counters(250, 64), counters(340, 64)]
    assert attribute(requests, readings) == {
        "a": TokenSources(0, 0, exact=True),
        "b": TokenSources(32, 64, exact=True),
        "c": TokenSources(64, 0, exact=True),
    }


def test_a_request_counted_before_an_earlier_one_is_found_by_its_length() -> None:
    requests = [FirstToken("a", 100, 32), FirstToken("b", 150, 96)]
    found = attribute(requests, [counters(150, 96), counters(250, 96)])
    assert found["a"] == TokenSources(32, 0, exact=True)
    assert found["b"] == TokenSources(0, 96, exact=True)


def test_a_shared_reading_is_split_in_proportion_and_says_so() -> None:
    requests = [FirstToken("a", 100, 32), FirstToken("b", 150, 96)]
    found = attribute(requests, [counters(250, 64)])
    assert found == {
        "a": TokenSources(16, 16, exact=False),
        "b": TokenSources(48, 48, exact=False),
    }


def test_readings_that_fit_no_request_wait_for_the_next() -> None:
    requests = [FirstToken("a", 100, 64), FirstToken("b", 150, 0)]
    # The first reading saw nothing yet, the second an odd count (a request of someone else).
    found = attribute(requests, [counters(0, 0), counters(7, 0), counters(250, 64)])
    assert sum(each.external_tokens for each in found.values()) == 64
    assert found["b"] == TokenSources(0, 0, exact=True)


@given(st.data())
def test_nothing_is_lost_or_invented(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(33, 4000), min_size=1, max_size=12))
    requests, external = [], []
    for number, size in enumerate(sizes):
        cached = data.draw(st.integers(0, size))
        requests.append(FirstToken(str(number), size, cached))
        external.append(data.draw(st.integers(0, cached)))
    sums = list(
        itertools.accumulate(
            zip(sizes, external, strict=True), lambda a, b: (a[0] + b[0], a[1] + b[1])
        )
    )
    kept = [reading for reading in sums[:-1] if data.draw(st.booleans())]
    found = attribute(requests, [counters(*reading) for reading in [*kept, sums[-1]]])
    assert found.keys() == {request.key for request in requests}
    for request in requests:
        assert found[request.key].gpu_tokens >= 0
        assert found[request.key].external_tokens >= 0
        assert (
            found[request.key].gpu_tokens + found[request.key].external_tokens
            == request.cached_tokens
        )
    assert sum(each.external_tokens for each in found.values()) <= sum(external)
