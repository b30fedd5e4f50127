"""The roofline: against figures worked out by hand, and what must hold for any step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.replay.machine import GpuSpec, Machine, ModelSpec, Scheduled, step_s

# Llama 3.1 8B on an H100, with round figures: 8e9 weights of 2 bytes, 1000 TFLOPS at 50 %, and
# 3.2 TB/s at 80 %.
MODEL = ModelSpec(
    name="8b",
    n_parameters=8e9,
    n_active_parameters=8e9,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
)
GPU = GpuSpec(
    name="gpu",
    flops_per_s=1000e12,
    memory_bytes_per_s=3.2e12,
    memory_bytes=80e9,
    link_bytes_per_s=50e9,
    compute_efficiency=0.5,
    memory_efficiency=0.8,
    step_overhead_s=0.004,
)
OVERHEAD_S = 0.004
KV_BYTES = 131072
# 16 GB of weights at 2.56 TB/s.
WEIGHTS_S = 0.00625


def machine(
    n_gpus: int = 1, model: ModelSpec = MODEL, gpu_kv_bytes: float = 50e9, block_tokens: int = 64
) -> Machine:
    return Machine(
        model=model,
        gpu=GPU,
        n_gpus=n_gpus,
        gpu_kv_bytes=gpu_kv_bytes,
        dram_bytes=0.0,
        link_bytes_per_s=50e9,
        block_tokens=block_tokens,
    )


def busy_s(n_gpus: int, *parts: Scheduled) -> float:
    """Duration of a step without its overhead."""
    return step_s(machine(n_gpus), parts) - OVERHEAD_S


def test_kv_of_a_token_and_of_a_block() -> None:
    # Keys and values of 32 layers, 8 heads of 128, 2 bytes each.
    assert MODEL.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2 == KV_BYTES
    assert machine().block_bytes == 64 * KV_BYTES
    assert machine(gpu_kv_bytes=10.9 * 64 * KV_BYTES).gpu_blocks == 10
    assert machine(gpu_kv_bytes=64 * KV_BYTES - 1).gpu_blocks == 0


def test_a_step_without_tokens_takes_the_overhead() -> None:
    assert step_s(machine(), []) == OVERHEAD_S
    assert step_s(machine(), [Scheduled(1000, 0)]) == OVERHEAD_S


def test_prefill_is_bound_by_compute() -> None:
    # Matrix products: 2 * 8e9 * 8192 = 1.31072e14 operations at 5e14 per second, 0.262 s. Causal
    # attention: 4 * 32 * 32 * 128 * 8192 * 4096 = 1.76e13 operations, 0.035 s.
    attention_s = 524288 * 8192 * 4096 / 5e14
    assert attention_s == pytest.approx(0.0352, abs=1e-4)
    assert busy_s(1, Scheduled(0, 8192)) == pytest.approx(0.262144 + attention_s)


def test_attention_over_cached_tokens_costs_their_pairs() -> None:
    # 1000 new tokens see 30,000 cached ones and, on average, half of themselves.
    pairs = 1000 * 30_000 + 1000 * 500
    expected = (2 * 8e9 * 1000 + 524288 * pairs) / 5e14
    assert busy_s(1, Scheduled(30_000, 1000)) == pytest.approx(expected)


def test_prefill_in_chunks_costs_the_same_attention_as_in_one() -> None:
    whole = busy_s(1, Scheduled(0, 8192))
    chunks = [Scheduled(start, 2048) for start in range(0, 8192, 2048)]
    assert sum(busy_s(1, chunk) for chunk in chunks) == pytest.approx(whole)


def test_decoding_one_request_is_bound_by_reading_the_weights() -> None:
    assert busy_s(1, Scheduled(0, 1)) == pytest.approx(WEIGHTS_S, rel=1e-4)
    assert busy_s(1, Scheduled(1000, 1)) == pytest.approx(WEIGHTS_S, rel=0.01)


def test_decoding_long_contexts_also_reads_their_kv() -> None:
    # 100,000 tokens of 128 KiB are 13.1 GB, 5.12 ms a context.
    kv_s = 100_000 * KV_BYTES / 2.56e12
    assert kv_s == pytest.approx(0.00512)
    assert busy_s(1, Scheduled(99_999, 1)) == pytest.approx(WEIGHTS_S + kv_s)
    assert busy_s(1, *[Scheduled(99_999, 1)] * 3) == pytest.approx(WEIGHTS_S + 3 * kv_s)


def test_a_mixed_step_takes_the_longer_of_compute_and_memory() -> None:
    # A long prefill hides the traffic of a few decodes; their compute is small.
    prefill = busy_s(1, Scheduled(0, 8192))
    mixed = busy_s(1, Scheduled(0, 8192), *[Scheduled(1000, 1)] * 8)
    assert prefill < mixed < 1.01 * prefill


def test_gpus_share_compute_and_memory_but_not_the_overhead() -> None:
    for part in (Scheduled(0, 8192), Scheduled(50_000, 1)):
        assert busy_s(4, part) == pytest.approx(busy_s(1, part) / 4)
        assert step_s(machine(4), [part]) == pytest.approx(busy_s(1, part) / 4 + OVERHEAD_S)


def test_experts_are_computed_where_active_and_read_in_full() -> None:
    mixture = ModelSpec("moe", 80e9, 8e9, 32, 32, 8, 128, 4096)
    prefill, decode = [Scheduled(0, 8192)], [Scheduled(0, 1)]
    assert step_s(machine(model=mixture), prefill) == step_s(machine(), prefill)
    read_s = step_s(machine(model=mixture), decode) - OVERHEAD_S
    assert read_s == pytest.approx(10 * WEIGHTS_S, rel=1e-4)


def test_smaller_weights_and_kv_are_read_faster() -> None:
    fp8 = ModelSpec("fp8", 8e9, 8e9, 32, 32, 8, 128, 4096, weight_bytes=1.0, kv_bytes=1.0)
    read_s = step_s(machine(model=fp8), [Scheduled(99_999, 1)]) - OVERHEAD_S
    assert read_s == pytest.approx(busy_s(1, Scheduled(99_999, 1)) / 2)


part_strategy = st.builds(Scheduled, st.integers(0, 200_000), st.integers(0, 20_000))
parts_strategy = st.lists(part_strategy, max_size=20)
gpus_strategy = st.sampled_from([1, 2, 4, 8])


@given(parts_strategy, gpus_strategy, part_strategy)
def test_another_request_never_makes_a_step_shorter(
    parts: list[Scheduled], n_gpus: int, more: Scheduled
) -> None:
    assert step_s(machine(n_gpus), [*parts, more]) >= step_s(machine(n_gpus), parts)


@given(parts_strategy, gpus_strategy, part_strategy, st.integers(0, 5000), st.integers(0, 5000))
def test_more_tokens_of_a_request_never_make_a_step_shorter(
    parts: list[Scheduled], n_gpus: int, part: Scheduled, new: int, cached: int
) -> None:
    longer = Scheduled(part.cached_tokens + cached, part.new_tokens + new)
    assert step_s(machine(n_gpus), [longer, *parts]) >= step_s(machine(n_gpus), [part, *parts])


@given(parts_strategy, gpus_strategy, gpus_strategy)
def test_more_gpus_never_make_a_step_longer(parts: list[Scheduled], a: int, b: int) -> None:
    few, many = sorted((a, b))
    assert step_s(machine(many), parts) <= step_s(machine(few), parts)


@given(parts_strategy, gpus_strategy)
def test_a_step_never_takes_less_than_the_overhead(parts: list[Scheduled], n_gpus: int) -> None:
    assert step_s(machine(n_gpus), parts) >= OVERHEAD_S


@given(parts_strategy, parts_strategy, gpus_strategy)
def test_one_step_for_all_is_never_slower_than_two(
    some: list[Scheduled], others: list[Scheduled], n_gpus: int
) -> None:
    apart = step_s(machine(n_gpus), some) + step_s(machine(n_gpus), others)
    assert step_s(machine(n_gpus), some + others) <= apart * (1 + 1e-12)
