"""The demo's arms: what each runs, as command lines and environments.

All arms get the same vLLM flags, the same KV memory and, where there is one, the same
LMCache size and chunk. The stock arm gets LMCache's settings that suit short contexts
best: generated tokens are stored too, 64-token chunks, shared-memory transfer.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from kvtier.demo.driver import MODEL_NAME
from kvtier.demo.number_format import BYTES
from kvtier.paths import cache_dir
from kvtier.server.launch import LOOPBACK, Endpoint, ServerSpec, server_command
from kvtier.serving.engine_env import engine_env

if TYPE_CHECKING:
    from pathlib import Path

    from kvtier.demo.number_format import Dtype

BLOCK_TOKENS = 32
CHUNK_TOKENS = 64
AGING_S = 35.0
"""Where plain vLLM has not run before: about what `AGING_SHARE` comes to on a CPU that multiplies bfloat16."""
AGING_SHARE = 0.75
"""kvtier's new programs age after this part of the longest wait for a token on plain vLLM, whoever's turn waited."""
_GIB = 1 << 30
# A program may grow to this length when the KV memory allows it.
_MODEL_TOKENS = 5600


class Arm(StrEnum):
    """Names on the command line."""

    PLAIN = "plain"
    STOCK = "stock"
    KVTIER = "kvtier"

    @property
    def policy(self) -> str:
        """Policy name in the JSON, as in kvtier's replay and bench."""
        return {"plain": "vllm-lru", "stock": "offload-lru", "kvtier": "kvtier"}[self.value]

    @property
    def label(self) -> str:
        """Name for people."""
        return {
            "plain": "plain vLLM",
            "stock": "vLLM + stock LMCache",
            "kvtier": "vLLM + kvtier",
        }[self.value]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the arms have in common.

    Attributes:
        model: Directory of the model.
        kv_tokens: KV memory in tokens; rounded down to whole blocks.
        longest_tokens: Longest context of the workload.
        cpu_tier_bytes: LMCache's memory in the stock and the kvtier arm.
        engine_threads: OpenMP threads of a CPU engine; None leaves the choice to kvtier.
        on_cpu: The CPU build of vLLM runs the model.
        dtype: Number format of the weights and of the KV.
    """

    model: Path
    kv_tokens: int
    longest_tokens: int
    cpu_tier_bytes: int
    engine_threads: int | None
    on_cpu: bool
    dtype: Dtype = "bfloat16"

    def __post_init__(self) -> None:
        """Refuse a KV memory that the longest program alone does not fit in."""
        # vLLM keeps one block back, and the last output token needs a place too.
        need = self.longest_tokens + 2 * BLOCK_TOKENS
        if self.kv_tokens < need:
            message = (
                f"--kv-tokens {self.kv_tokens} is too small: the longest program needs {need} "
                "tokens. Raise it, or lower --turns."
            )
            raise ValueError(message)

    @property
    def blocks(self) -> int:
        """KV memory in blocks."""
        return self.kv_tokens // BLOCK_TOKENS

    @property
    def max_model_tokens(self) -> int:
        """``--max-model-len``: what fits, up to the usual length."""
        usable = (self.blocks - 1) * BLOCK_TOKENS
        return max(self.longest_tokens + 1, min(_MODEL_TOKENS, usable))


def engine_command(
    config: EngineConfig, port: int, transfer: dict[str, object] | None
) -> list[str]:
    """``vllm serve`` on a loopback port, with a KV connector where ``transfer`` is given."""
    command = ["vllm", "serve", str(config.model), "--served-model-name", MODEL_NAME]
    flags: dict[str, object] = {
        "--host": LOOPBACK,
        "--port": port,
        "--dtype": config.dtype,
        "--max-model-len": config.max_model_tokens,
        "--block-size": BLOCK_TOKENS,
        "--max-num-batched-tokens": 1024,
        "--max-num-seqs": 16,
        "--num-gpu-blocks-override": config.blocks,
        "--logits-processors": "kvtier.demo.forced_tokens:ForcedTokens",
    }
    for flag, value in flags.items():
        command += [flag, str(value)]
    command += [
        "--enforce-eager",
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        "--enable-per-request-metrics",
        "--disable-uvicorn-access-log",
    ]
    if config.on_cpu:
        # Without it vLLM wants most of the machine's memory to be free at start.
        kv_bytes = config.kv_tokens * kv_bytes_per_token(config.model, config.dtype)
        command += ["--kv-cache-memory-bytes", str(kv_bytes)]
    if transfer is not None:
        command += ["--kv-transfer-config", json.dumps(transfer)]
    return command


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """Environment of ``vllm serve``, the same for every arm."""
    env = engine_env(os.environ, cpu=config.on_cpu, offline=True)
    if config.on_cpu:
        if config.engine_threads is not None:
            env["OMP_NUM_THREADS"] = str(config.engine_threads)
        # The model runs in the engine's process. Where it has one of its own, the engine polls without a rest until a step
        # is over: of two cores, none is left to tools, copies and the other servers. vLLM gives it one on CPUs as it could
        # not set OpenMP's threads otherwise; `engine_env` has set them.
        env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if sys.dont_write_bytecode:
        # Compiling torch's and vLLM's sources anew would dominate every start.
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        env.setdefault("PYTHONPYCACHEPREFIX", str(cache_dir() / "pycache"))
    return env


def kv_bytes_per_token(model: Path, dtype: Dtype) -> int:
    """KV bytes of one token: 2 (K, V) x layers x KV heads x head size x bytes of a number.

    Raises:
        ValueError: the model's ``config.json`` does not describe such a model.
    """
    path = model / "config.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    try:
        heads = facts["num_attention_heads"]
        head_size = facts.get("head_dim") or facts["hidden_size"] // heads
        kv_heads = facts.get("num_key_value_heads") or heads
        numbers = 2 * int(facts["num_hidden_layers"]) * int(kv_heads) * int(head_size)
    except KeyError as error:
        message = f"{path} does not say {error}: give the demo a plain transformer model"
        raise ValueError(message) from error
    return numbers * BYTES[dtype]


def stock_transfer(lmcache_port: int) -> dict[str, object]:
    """``--kv-transfer-config`` of LMCache's own connector."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "lmcache.mp.host": LOOPBACK,
            "lmcache.mp.port": lmcache_port,
            "lmcache.mp.save_decode_cache": True,
        },
    }


def stock_lmcache_command(config: EngineConfig, endpoint: Endpoint, metrics_port: int) -> list[str]:
    """``lmcache server`` of the stock arm, with the flags kvtier starts its own server with."""
    spec = ServerSpec(
        chunk_tokens=CHUNK_TOKENS,
        dram_bytes=config.cpu_tier_bytes,
        eviction_policy="LRU",
        extra_args=("--prometheus-port", str(metrics_port)),
    )
    return server_command(spec, endpoint)


def kvtier_transfer(
    config: EngineConfig, decision_log: Path, aging_s: float = AGING_S
) -> dict[str, object]:
    """``--kv-transfer-config`` of kvtier; it starts its LMCache server itself."""
    return {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "kvtier.decision_log": str(decision_log),
            # The format in which the recorded agents call tools.
            "kvtier.tool_call_parser": "hermes",
            "kvtier.chunk_tokens": CHUNK_TOKENS,
            "kvtier.dram_gb": config.cpu_tier_bytes / _GIB,
            # The arm's server is of no use to anyone after the arm.
            "kvtier.server_grace_s": 0,
            # These programs take minutes: with the default, the last one would wait for its first token for
            # longer than on plain vLLM, and the mean would be shorter still.
            "kvtier.aging_s": aging_s,
        },
    }
