"""The tiny configuration that `scheduler_harness` builds vLLM's scheduler from."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

BLOCK_TOKENS = 16
VOCABULARY = 1000

# Nobody computes with it, but kvtier's cost model reads its size: computing is dear, copying cheap.
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1 << 20,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is built with.

    Attributes:
        is_async: `AsyncScheduler` with two steps in flight, else `Scheduler`.
        blocks: Usable blocks; vLLM's null block comes on top.
        settings: kvtier's settings as in `kv_connector_extra_config`; None for no connector.
        sliding_window: Tokens; adds a second KV cache group with such a window.
        retention_interval: vLLM's `prefix_cache_retention_interval`.
        max_context: Longest request, tokens.
        max_batch: Most running requests.
        batch_tokens: Most tokens of one step; None for vLLM's default.
        caching: vLLM's prefix caching.
        policy: vLLM's order of waiting requests, "fcfs" or "priority".
        by_program: kvtier's scheduler class, as `kvtier serve` sets it, else vLLM's.
        runner_v2: The scheduler speaks to vLLM's second model runner, the default on GPUs: a request that goes on
            after a preemption is a new one to it.
    """

    is_async: bool = False
    blocks: int = 20
    settings: dict[str, Any] | None = field(default_factory=dict)
    sliding_window: int | None = None
    retention_interval: int | None = 0
    max_context: int = 512
    max_batch: int = 8
    batch_tokens: int | None = None
    policy: str = "fcfs"
    by_program: bool = False
    runner_v2: bool = False
    caching: bool = True


def engine_config(spec: EngineSpec) -> Any:
    """vLLM's configuration for a spec."""
    transfer = None
    if spec.settings is not None:
        transfer = KVTransferConfig(
            kv_connector="KVTierConnector",
            kv_connector_module_path="kvtier.connector",
            kv_role="kv_both",
            kv_connector_extra_config=spec.settings,
        )
    more = {} if spec.batch_tokens is None else {"max_num_batched_tokens": spec.batch_tokens}
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(_MODEL), encoding="utf-8")
        config = EngineArgs(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=spec.max_context,
            max_num_seqs=spec.max_batch,
            dtype="float32",
            kv_transfer_config=transfer,
            block_size=32,
            scheduling_policy=spec.policy,
            enable_prefix_caching=spec.caching,
            **more,
        ).create_engine_config()
    # What the platform "CPU" would refuse, but the scheduler does not mind.
    config.cache_config.block_size = BLOCK_TOKENS
    config.cache_config.num_gpu_blocks = spec.blocks + 1
    config.scheduler_config.async_scheduling = spec.is_async
    config.cache_config.prefix_cache_retention_interval = spec.retention_interval
    return config


def kv_cache_config(spec: EngineSpec) -> KVCacheConfig:
    """One group of full-attention layers, and one with a sliding window where asked for."""
    shape: dict[str, Any] = {
        "block_size": BLOCK_TOKENS,
        "num_kv_heads": 1,
        "head_size": 8,
        "dtype": torch.float32,
    }
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**shape))]
    if spec.sliding_window is not None:
        window = SlidingWindowSpec(**shape, sliding_window=spec.sliding_window)
        groups.append(KVCacheGroupSpec(["window"], window))
    config = KVCacheConfig(num_blocks=spec.blocks + 1, kv_cache_tensors=[], kv_cache_groups=groups)
    # A field since 0.32; read from the cache config before.
    if hasattr(config, "prefix_cache_retention_interval"):
        config.prefix_cache_retention_interval = spec.retention_interval
    return config
