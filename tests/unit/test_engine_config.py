"""What is read of vLLM's configuration: who is refused, and what keeps two engines' KV apart."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.config import Settings
from kvtier.engine_config import (
    Unsupported,
    block_bytes,
    check_supported,
    engine_facts,
    tier_obstacle,
)

if TYPE_CHECKING:
    from pathlib import Path


class FullAttentionSpec(SimpleNamespace):
    """Named as vLLM's."""


class SlidingWindowSpec(SimpleNamespace):
    """Named as vLLM's."""


def kv_cache(*specs: Any, layout: str | None = None, tensor_bytes: int = 0) -> Any:
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=["a", "b"]) for spec in specs]
    tensors = [SimpleNamespace(size=tensor_bytes)] * 2 if tensor_bytes else []
    return SimpleNamespace(
        kv_cache_groups=groups, kv_cache_tensors=tensors, num_blocks=10, kv_cache_layout=layout
    )


def vllm_config(model: str = "hub/model", **changes: Any) -> Any:
    shape = {"hidden_size": 64, "vocab_size": 100, "rope_theta": changes.pop("rope_theta", 1e4)}
    text_config = SimpleNamespace(**shape)
    text_config.to_dict = lambda: {**shape, "_name_or_path": "x", "transformers_version": "5"}
    options: dict[str, Any] = {"dtype": "bfloat16", "cache_dtype": "auto", "backend": None, "tp": 1}
    options |= changes
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=256, max_num_batched_tokens=8192),
        cache_config=SimpleNamespace(
            enable_prefix_caching=options.get("caching", True),
            block_size=16,
            cache_dtype=options["cache_dtype"],
        ),
        model_config=SimpleNamespace(
            model=model,
            revision=options.get("revision"),
            dtype=options["dtype"],
            quantization=None,
            hf_text_config=text_config,
            get_num_attention_heads=lambda _: 4,
            get_head_size=lambda: 16,
            get_total_num_hidden_layers=lambda: 2,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=options["tp"],
            pipeline_parallel_size=options.get("pp", 1),
            world_size=options["tp"],
            decode_context_parallel_size=options.get("dcp", 1),
            prefill_context_parallel_size=options.get("pcp", 1),
            distributed_executor_backend=options.get("launcher", "mp"),
            nnodes_within_dp=options.get("nodes", 1),
        ),
        device_config=SimpleNamespace(device_type="cuda"),
        kv_transfer_config=SimpleNamespace(engine_id="e"),
        attention_config=SimpleNamespace(backend=options["backend"]),
    )


FULL = FullAttentionSpec(page_size_bytes=512)


def namespace(config: Any, cache: Any = None, **settings: Any) -> str:
    extra = {f"kvtier.{name}": value for name, value in settings.items()}
    return engine_facts(config, cache or kv_cache(FULL), Settings.load(extra, {})).namespace()


def test_full_attention_is_supported() -> None:
    check_supported(vllm_config(), kv_cache(FULL))


@pytest.mark.parametrize(
    ("config", "cache", "said"),
    [
        (vllm_config(caching=False), kv_cache(FULL), "--enable-prefix-caching"),
        (vllm_config(launcher="external_launcher"), kv_cache(FULL), "accepted: mp, ray, uni"),
        (vllm_config(dcp=2), kv_cache(FULL), "--decode-context-parallel-size is 2; accepted: 1"),
        (vllm_config(pcp=4), kv_cache(FULL), "--prefill-context-parallel-size is 4; accepted: 1"),
        (vllm_config(), kv_cache(FULL, FULL), "--disable-hybrid-kv-cache-manager"),
        (vllm_config(), kv_cache(SlidingWindowSpec(page_size_bytes=512)), "SlidingWindowSpec"),
    ],
)
def test_what_kvtier_would_do_wrong_is_refused(config: Any, cache: Any, said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        check_supported(config, cache)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (vllm_config(tp=8), "^$"),
        (vllm_config(pp=2), "--pipeline-parallel-size is 2; the CPU tier accepts 1"),
        (vllm_config(nodes=2), "--nnodes is 2 for one engine; the CPU tier accepts 1"),
    ],
)
def test_ranks_that_one_hosts_memory_cannot_serve_have_no_tier(config: Any, said: str) -> None:
    assert re.search(said, tier_obstacle(config))


def test_what_fits_in_a_step_is_read_of_the_scheduler() -> None:
    facts = engine_facts(vllm_config(), kv_cache(FULL), Settings.load({}, {}))
    assert (facts.batch_requests, facts.step_tokens) == (256, 8192)


def test_a_blocks_bytes_are_those_of_all_layers() -> None:
    assert block_bytes(kv_cache(FULL)) == 2 * 512
    # Layers of different sizes: only the tensors tell.
    assert block_bytes(kv_cache(FULL, tensor_bytes=7000)) == 2 * 7000 // 10


def test_equal_engines_share() -> None:
    assert namespace(vllm_config()) == namespace(vllm_config())


@pytest.mark.parametrize(
    "other",
    [
        namespace(vllm_config("hub/other")),
        namespace(vllm_config(revision="v2")),
        namespace(vllm_config(dtype="float16")),
        namespace(vllm_config(cache_dtype="fp8")),
        namespace(vllm_config(rope_theta=5e5)),
        namespace(vllm_config(backend="FLASHINFER")),
        namespace(vllm_config(tp=2)),
        namespace(vllm_config(), kv_cache(FULL, layout="LBHNC")),
        namespace(vllm_config(), kv_cache(FullAttentionSpec(page_size_bytes=256))),
        namespace(vllm_config(), chunk_tokens=512),
        namespace(vllm_config(), model_revision="abc"),
    ],
)
def test_whatever_the_bytes_depend_on_keeps_engines_apart(other: str) -> None:
    assert other != namespace(vllm_config())


def test_a_changed_checkpoint_under_the_same_path_is_another_model(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"old")
    old = namespace(vllm_config(str(tmp_path)))
    assert namespace(vllm_config(str(tmp_path))) == old
    weights.write_bytes(b"other")
    assert namespace(vllm_config(str(tmp_path))) != old


def test_the_hubs_commit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"commit": "a" * 40}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda *_, **__: f"/cache/snapshots/{found['commit']}/config.json",
    )
    before = namespace(vllm_config())
    found["commit"] = "b" * 40
    assert namespace(vllm_config()) != before


def test_chunks_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chunk_tokens is 40.*multiple of vLLM's block size"):
        namespace(vllm_config(), chunk_tokens=40)
