"""What kvtier reads of vLLM's configuration: whether it can work here, and on what the KV's bytes depend."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtier import __version__
from kvtier.checkpoints import fingerprint, hub_commit
from kvtier.orders import TRAILER_BYTES
from kvtier.turns.engine_facts import EngineFacts

if TYPE_CHECKING:
    from kvtier.config import Settings

CPU_CHUNK_TOKENS = 64
GPU_CHUNK_TOKENS = 256
SUPPORTED_SPECS = {"FullAttentionSpec", "MLAAttentionSpec", "UniformTypeKVCacheSpecs"}
"""vLLM's kinds of KV cache that keep every token. A group of the last kind holds one kind of layer."""
SPMD_LAUNCHER = "external_launcher"
WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json")


class Unsupported(Exception):  # noqa: N818 - a state, not a failure
    """kvtier cannot work with this engine; the message says what would help."""


def check_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse what kvtier would do wrong.

    Raises:
        Unsupported: With the setting that helps.
    """
    if not vllm_config.cache_config.enable_prefix_caching:
        message = (
            "prefix caching is off, so no KV can be reused: start vLLM with --enable-prefix-caching"
        )
        raise Unsupported(message)
    if getattr(vllm_config.parallel_config, "distributed_executor_backend", None) == SPMD_LAUNCHER:
        message = (
            f"--distributed-executor-backend is {SPMD_LAUNCHER}; accepted: mp, ray, uni. Each of its processes "
            "schedules for itself and all must come to the same, which decisions by the clock do not"
        )
        raise Unsupported(message)
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        ranks = int(getattr(vllm_config.parallel_config, name, 1))
        if ranks > 1:
            message = (
                f"--{name.replace('_', '-')} is {ranks}; accepted: 1. With more, each rank's block holds "
                "every so manieth token, which kvtier does not know to copy"
            )
            raise Unsupported(message)
    groups = getattr(kv_cache_config, "kv_cache_groups", ())
    if len(groups) > 1:
        message = (
            f"the model has {len(groups)} KV cache groups (hybrid attention). kvtier handles one: try "
            "--disable-hybrid-kv-cache-manager (more memory, plain reuse), or without kvtier a positive "
            "--prefix-cache-retention-interval, without which finished turns are not reusable at all"
        )
        raise Unsupported(message)
    kinds = {type(group.kv_cache_spec).__name__ for group in groups} - SUPPORTED_SPECS
    if kinds:
        message = (
            f"the model's KV cache is a {kinds.pop()}; kvtier handles full attention and MLA. Where the "
            "attention has a sliding window only, its KV is no prefix that could be kept"
        )
        raise Unsupported(message)


def tier_obstacle(vllm_config: Any) -> str:
    """Why this engine can have no CPU tier, though kvtier can pin in it; empty where it can have one."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return (
            f"--pipeline-parallel-size is {parallel.pipeline_parallel_size}; the CPU tier accepts 1 (tensor "
            "parallel ranks may be several)"
        )
    n_nodes = int(getattr(parallel, "nnodes_within_dp", 1))
    if n_nodes > 1:
        return (
            f"--nnodes is {n_nodes} for one engine; the CPU tier accepts 1, as it is the memory of one host "
            "(data parallel engines may be on several)"
        )
    return ""


def block_bytes(kv_cache_config: Any) -> int:
    """KV bytes of a block over all layers of one rank."""
    # Layers of different sizes are one group, and then the scheduler sees one layer's size only.
    total = sum(int(tensor.size) for tensor in kv_cache_config.kv_cache_tensors)
    if total:
        return total // int(kv_cache_config.num_blocks)
    return sum(
        len(group.layer_names) * int(group.kv_cache_spec.page_size_bytes)
        for group in kv_cache_config.kv_cache_groups
    )


def engine_facts(vllm_config: Any, kv_cache_config: Any, settings: Settings) -> EngineFacts:
    """Read what kvtier needs to know from vLLM's configuration.

    Raises:
        ValueError: `chunk_tokens` is not a multiple of the block size.
    """
    cache, model, parallel = (
        vllm_config.cache_config,
        vllm_config.model_config,
        vllm_config.parallel_config,
    )
    on_cpu = vllm_config.device_config.device_type == "cpu"
    block_tokens = int(cache.block_size)
    default = CPU_CHUNK_TOKENS if on_cpu else GPU_CHUNK_TOKENS
    chunk_tokens = settings.chunk_tokens or -(-default // block_tokens) * block_tokens
    if chunk_tokens % block_tokens:
        message = (
            f"kvtier.chunk_tokens is {chunk_tokens}; accepted: a multiple of vLLM's block size, "
            f"which is {block_tokens}"
        )
        raise ValueError(message)
    bytes_a_block = block_bytes(kv_cache_config)
    identity = {
        "model": model.model,
        "weights": _weights_fingerprint(model.model, model.revision),
        "revision": settings.model_revision or model.revision or "",
        "dtype": str(model.dtype),
        "kv_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
        "block_bytes": str(bytes_a_block),
        "block_tokens": str(block_tokens),
        "chunk_tokens": str(chunk_tokens),
        "ranks": f"{parallel.tensor_parallel_size}x{parallel.pipeline_parallel_size}",
        "layout": _kv_layout_name(vllm_config, kv_cache_config),
        "config": _config_digest(model),
        "format": "1",
    }
    if settings.integrity != "off":
        # Slots are larger: who checks and who does not share no KV.
        identity["trailer"] = str(TRAILER_BYTES)
    width = model.get_num_attention_heads(parallel) * parallel.tensor_parallel_size
    return EngineFacts(
        owner=f"{vllm_config.kv_transfer_config.engine_id}-{os.getpid()}",
        identity=tuple(identity.items()),
        block_tokens=block_tokens,
        block_bytes=bytes_a_block,
        chunk_tokens=chunk_tokens,
        ranks=int(parallel.world_size),
        pin_budget_fraction=settings.pin_budget_fraction,
        n_parameters=_parameters(model),
        n_layers=int(model.get_total_num_hidden_layers()),
        attention_width=int(width * model.get_head_size()),
        on_cpu=on_cpu,
        trailer_bytes=0 if settings.integrity == "off" else TRAILER_BYTES,
        batch_requests=int(vllm_config.scheduler_config.max_num_seqs),
        step_tokens=int(vllm_config.scheduler_config.max_num_batched_tokens),
    )


def _kv_layout_name(vllm_config: Any, kv_cache_config: Any) -> str:
    """What decides in which order a block's bytes are: vLLM's layout, else what it is chosen by."""
    cache = vllm_config.cache_config
    layout = getattr(kv_cache_config, "kv_cache_layout", None) or getattr(
        cache, "kv_cache_layout", None
    )
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    return f"{layout or os.environ.get('VLLM_KV_CACHE_LAYOUT', '')}/{backend or ''}"


def _config_digest(model: Any) -> str:
    """Digest of the model's configuration as it is used, overrides of the command line included."""
    values = model.hf_text_config.to_dict()
    kept = {
        k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"
    }
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _parameters(model: Any) -> int:
    """Rough parameter count from the model's shape: 12 x layers x hidden^2 + embeddings."""
    config = model.hf_text_config
    hidden, vocab = int(config.hidden_size), int(getattr(config, "vocab_size", 0))
    return 12 * int(model.get_total_num_hidden_layers()) * hidden * hidden + vocab * hidden


def _weights_fingerprint(model: str, revision: str | None) -> str:
    """For a local directory: its weight files' names, sizes and times; else the hub's commit.

    A changed checkpoint under the same name must not read the KV of the old one.
    """
    if not Path(model).is_dir():
        return hub_commit(model, "config.json", revision)
    return f"{fingerprint(model, WEIGHT_FILES)}.{__version__}"
