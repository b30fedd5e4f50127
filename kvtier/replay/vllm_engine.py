"""vLLM's real scheduler, KV cache manager and connector hooks, for a machine that is not there."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.structured_output import StructuredOutputManager

from kvtier import assembly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvtier.backend import TierBackend
    from kvtier.replay.machine import Machine, ModelSpec


@dataclass(slots=True)
class VirtualClock:
    """Seconds that pass only when told to."""

    now_s: float = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How vLLM is started.

    Attributes:
        connector: Class name; None for none.
        connector_module: Where it is.
        settings: Its extra configuration.
        scheduler_class: vLLM's, or one derived from it.
        by_priority: `--scheduling-policy priority`.
        gpu_blocks: KV blocks in GPU memory.
    """

    connector: str | None = None
    connector_module: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    scheduler_class: type[Scheduler] = Scheduler
    by_priority: bool = False
    gpu_blocks: int = 0


def make_scheduler(
    machine: Machine,
    options: EngineOptions,
    *,
    max_context_tokens: int,
    clock: VirtualClock,
    tier: TierBackend | None,
) -> Any:
    """Make vLLM's scheduler with its connector.

    Args:
        machine: What it serves on.
        options: How.
        max_context_tokens: Longest request.
        clock: Read by kvtier's scheduler half.
        tier: Given to kvtier's scheduler half; None for none.
    """
    init_none_hash(sha256)
    config = _vllm_config(machine, options, max_context_tokens)
    model = machine.model
    spec = FullAttentionSpec(
        block_size=machine.block_tokens,
        num_kv_heads=model.n_kv_heads,
        head_size=model.head_dim,
        dtype=torch.float8_e4m3fn if model.kv_bytes < 2 else torch.bfloat16,  # noqa: PLR2004
    )
    layers = [f"layer.{i}" for i in range(model.n_layers)]
    kv_cache = KVCacheConfig(
        num_blocks=options.gpu_blocks + 1,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(layers, spec)],
    )
    with injected(clock, tier):
        return options.scheduler_class(
            vllm_config=config,
            kv_cache_config=kv_cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=machine.block_tokens,
            log_stats=True,
        )


def _vllm_config(machine: Machine, options: EngineOptions, max_context_tokens: int) -> Any:
    transfer = None
    if options.connector is not None:
        transfer = KVTransferConfig(
            kv_connector=options.connector,
            kv_connector_module_path=options.connector_module,
            kv_role="kv_both",
            engine_id="replay",
            kv_connector_extra_config=options.settings,
        )
    with tempfile.TemporaryDirectory() as folder:
        shape = json.dumps(_hf_config(machine.model, max_context_tokens))
        (Path(folder) / "config.json").write_text(shape, encoding="utf-8")
        config = EngineArgs(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=max_context_tokens,
            max_num_seqs=machine.max_running,
            max_num_batched_tokens=machine.batch_tokens,
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
            async_scheduling=False,
            scheduling_policy="priority" if options.by_priority else "fcfs",
            dtype="bfloat16",
            kv_transfer_config=transfer,
            block_size=32,
        ).create_engine_config()
    # What the platform without GPUs would refuse, but the scheduler does not mind.
    config.cache_config.block_size = machine.block_tokens
    config.cache_config.num_gpu_blocks = options.gpu_blocks + 1
    config.device_config.device_type = "cuda"
    return config


def _hf_config(model: ModelSpec, max_context_tokens: int) -> dict[str, Any]:
    """A model of this shape, as far as vLLM and kvtier ask for it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": 4 * model.hidden_size,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": 1 << 17,
        "max_position_embeddings": max_context_tokens,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


@contextlib.contextmanager
def injected(clock: Callable[[], float], tier: TierBackend | None) -> Iterator[None]:
    """Give kvtier's scheduler half the virtual clock, and the tier if there is one."""
    build = functools.partial(assembly.build_scheduler_half, clock=clock, tier=tier)
    with mock.patch.object(assembly, "build_scheduler_half", build):
        yield
