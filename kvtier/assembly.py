"""Builds the scheduler half and the worker half from vLLM's configuration and kvtier's settings.

The only place that knows all rooms. Imported when a connector is constructed, not before: vLLM's API
process imports `kvtier.connector` too and needs none of this.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtier import __version__
from kvtier.admission import AdmissionConfig, AdmissionController
from kvtier.backend import NoTier, TierBackend, TierState
from kvtier.policy import Policy, PolicyConfig
from kvtier.programs import ProgramLimits, ProgramTable
from kvtier.scheduler_half import SchedulerHalf
from kvtier.stats import Stats
from kvtier.tools.detection import ToolCallDetector
from kvtier.turns.decision_log import DecisionLog
from kvtier.turns.engine_facts import EngineFacts
from kvtier.turns.live_mode import LiveMode, Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.config import Settings
    from kvtier.worker_half import WorkerHalf

logger = logging.getLogger(__name__)

CPU_CHUNK_TOKENS = 64
GPU_CHUNK_TOKENS = 256
LMCACHE_CHUNK_TOKENS = 256
"""LMCache's own chunk size; kvtier's slots do not depend on it, so that all engines agree on it."""
SERVER_NAME = "kvtier"
REQUIRE_TIMEOUT_S = 180.0
MAX_PREFILL_SAMPLES = 256
SUPPORTED_SPECS = {"FullAttentionSpec", "MLAAttentionSpec", "UniformTypeKVCacheSpecs"}
"""vLLM's kinds of KV cache that keep every token. A group of the last kind holds one kind of layer."""


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
    )


def build_scheduler_half(
    vllm_config: Any,
    kv_cache_config: Any,
    settings: Settings,
    *,
    clock: Callable[[], float] = time.monotonic,
    tier: TierBackend | None = None,
) -> tuple[SchedulerHalf, Any]:
    """The scheduler half of one engine, and the lease on the host's server (None without one)."""
    facts = engine_facts(vllm_config, kv_cache_config, settings)
    lease: Any = None
    if tier is None:
        tier, lease = connect_tier(vllm_config, settings, facts, clock)
    logger.info(
        "kvtier %s is %s: pins hold up to %.0f %% of the GPU's KV blocks, CPU tier %s, admission %s",
        __version__,
        settings.mode,
        100 * facts.pin_budget_fraction,
        tier.state,
        settings.admission,
    )
    stats = Stats()
    detector, decode = build_detector(vllm_config, settings)
    policy = Policy(
        facts,
        PolicyConfig(
            max_ttl_s=settings.max_ttl_s,
            fixed_ttl_s=settings.ttl_fixed_s if settings.ttl_policy == "fixed" else None,
            reload=settings.reload,
            reload_first_chunks=settings.reload_first_chunks,
            lease_s=settings.lease_s,
            stage=settings.stage,
        ),
    )
    half = SchedulerHalf(
        facts,
        tier=tier,
        programs=ProgramTable(
            ProgramLimits(
                forget_after_s=settings.forget_after_s, max_programs=settings.max_programs
            )
        ),
        admission=AdmissionController[str](
            AdmissionConfig(
                mode=settings.admission,
                aging_s=settings.aging_s,
                max_defer_s=settings.max_defer_s,
            )
        ),
        policy=policy,
        detector=detector,
        stats=stats,
        log=DecisionLog(settings.decision_log),
        mode=LiveMode(Mode(settings.mode), settings.switch_file),
        clock=clock,
        decode=decode,
        lookup_wait_s=settings.lookup_wait_s,
        split_chunks=settings.stage_split_chunks,
        save_prefill=_save_prefill,
    )
    return half, lease


def connect_tier(
    vllm_config: Any, settings: Settings, facts: EngineFacts, clock: Callable[[], float]
) -> tuple[TierBackend, Any]:
    """Join or start the CPU tier as the settings say; pin-only where that cannot be.

    Raises:
        RuntimeError: `tier` is `require` and there is none.
    """
    if settings.tier == "off":
        logger.info("kvtier: no CPU tier (kvtier.tier is off), pinning only")
        return NoTier(), None
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return _pin_only(settings, "pipeline parallelism is not supported by the CPU tier")
    try:
        endpoint, lease = _server_endpoint(settings, facts)
    except Exception as error:  # noqa: BLE001 - whatever keeps the server away, pins still work
        return _pin_only(settings, f"{type(error).__name__}: {error}")
    from kvtier.lmcache_bridge import BridgeConfig, LMCacheBridge  # noqa: PLC0415 - needs zmq

    bridge = LMCacheBridge(
        BridgeConfig(endpoint, facts.owner, facts.ranks, facts.slot_bytes),
        clock(),
        revive=None if lease is None else lease.revive,
    )
    if settings.tier == "require":
        _await_ready(bridge, clock)
    return bridge, lease


def build_detector(
    vllm_config: Any, settings: Settings
) -> tuple[ToolCallDetector, Callable[[Sequence[int]], str]]:
    """The tool detector of the engine's model; says at start what it goes by."""
    from kvtier.tools.formats import BASH_FENCE, format_of_parser, infer_format  # noqa: PLC0415

    tokenizer = _tokenizer(vllm_config)
    if tokenizer is None:
        return ToolCallDetector(None, _no_text, {}), _no_text

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    parser = None
    if settings.tool_call_parser is not None:
        from kvtier.tools.vllm_parser import make_parser  # noqa: PLC0415

        tool_format = format_of_parser(settings.tool_call_parser)
        parser = make_parser(settings.tool_call_parser, tokenizer)
        source = f"tool parser {settings.tool_call_parser}"
    else:
        tool_format = infer_format(str(getattr(tokenizer, "chat_template", None) or ""))
        source = "the model's chat template"
        if tool_format is None:
            # Models without a tool format are driven by text: a fenced command ends the turn.
            tool_format, source = BASH_FENCE, "no tool format in the model's chat template"
    name = tool_format.name if tool_format is not None else "none"
    logger.info("kvtier: tool calls are recognised by format %s (from %s)", name, source)
    return ToolCallDetector(tool_format, decode, tokenizer.get_vocab(), parser), decode


def build_worker_half(vllm_config: Any, kv_cache_config: Any, settings: Settings) -> WorkerHalf:
    """The worker half of this worker process."""
    from kvtier.worker_half import WorkerHalf  # noqa: PLC0415 - imports torch

    facts = engine_facts(vllm_config, kv_cache_config, settings)
    return WorkerHalf(
        rank=int(vllm_config.parallel_config.rank),
        slot_bytes=facts.slot_bytes,
        chunk_blocks=facts.chunk_blocks,
        n_blocks=int(kv_cache_config.num_blocks),
        model=facts.namespace(),
        profile_dir=_profile_dir(settings),
        may_measure=settings.calibrate == "auto",
    )


# -- internals -------------------------------------------------------------------------------------


def _server_endpoint(settings: Settings, facts: EngineFacts) -> tuple[str, Any]:
    if settings.lmcache_url is not None:
        return settings.lmcache_url, None
    from kvtier.server.files import default_run_dir, prepare_run_dir  # noqa: PLC0415
    from kvtier.supervisor import ensure_server  # noqa: PLC0415

    run_dir = prepare_run_dir(default_run_dir())
    spec = server_spec(settings, run_dir)
    lease = ensure_server(spec, run_dir=run_dir, owner=facts.owner)
    return module_endpoint(run_dir), lease


def module_endpoint(run_dir: Path) -> str:
    """Address of kvtier's module in the host's server."""
    return f"ipc://{run_dir / SERVER_NAME}.kvtier.sock"


def server_spec(settings: Settings, run_dir: Path) -> Any:
    """What the host's LMCache server is started with."""
    from kvtier.server.launch import ServerSpec, default_dram_bytes  # noqa: PLC0415

    dram_bytes = (
        int(settings.dram_gb * (1 << 30)) if settings.dram_gb is not None else default_dram_bytes()
    )
    config = {"endpoint": module_endpoint(run_dir), "eviction_policy": "noop"}
    return ServerSpec(
        chunk_tokens=LMCACHE_CHUNK_TOKENS,
        dram_bytes=dram_bytes,
        name=SERVER_NAME,
        server_module="kvtier.server_module",
        server_module_config_json=json.dumps(config),
        # The workers copy. A server that saw the GPUs would keep a context, and memory, on one.
        env=(("CUDA_VISIBLE_DEVICES", ""), ("HIP_VISIBLE_DEVICES", "")),
        grace_s=settings.server_grace_s,
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


def _pin_only(settings: Settings, why: str) -> tuple[TierBackend, Any]:
    if settings.tier == "require":
        message = f"kvtier.tier is require, but there is no CPU tier: {why}"
        raise RuntimeError(message)
    logger.warning("kvtier: no CPU tier, pinning only: %s", why)
    return NoTier(), None


def _await_ready(bridge: Any, clock: Callable[[], float]) -> None:
    deadline_s = clock() + REQUIRE_TIMEOUT_S
    while bridge.state is not TierState.READY:
        bridge.poll(clock(), 0.2)
        if clock() > deadline_s:
            message = (
                f"kvtier.tier is require, but the server did not answer in {REQUIRE_TIMEOUT_S:g} s"
            )
            raise RuntimeError(message)


def _save_prefill(path: str, samples: Sequence[tuple[int, int, float]]) -> None:
    """Keep what this run has learned of prefill times for the next start."""
    from dataclasses import replace  # noqa: PLC0415

    from kvtier.calibration import PrefillSample, load_profile, save_profile  # noqa: PLC0415

    profile = load_profile(Path(path))
    if profile is None:
        return
    kept = (*profile.prefill, *(PrefillSample(*sample) for sample in samples))
    try:
        save_profile(Path(path), replace(profile, prefill=kept[-MAX_PREFILL_SAMPLES:]))
    except OSError as error:
        logger.warning("kvtier: calibration profile not saved: %s", error)


def _profile_dir(settings: Settings) -> Path:
    from kvtier.paths import cache_dir  # noqa: PLC0415

    return settings.profile_dir or cache_dir() / "profiles"


def _tokenizer(vllm_config: Any) -> Any:
    if vllm_config.model_config.skip_tokenizer_init:
        return None
    from vllm.tokenizers import cached_tokenizer_from_config  # noqa: PLC0415

    try:
        return cached_tokenizer_from_config(vllm_config.model_config)
    except Exception as error:  # noqa: BLE001 - without it tools must be named by the client
        logger.warning("kvtier: no tokenizer (%s); tool calls are known by hints only", error)
        return None


def _no_text(ids: Sequence[int]) -> str:  # noqa: ARG001
    return ""


def _parameters(model: Any) -> int:
    """Rough parameter count from the model's shape: 12 x layers x hidden^2 + embeddings."""
    config = model.hf_text_config
    hidden, vocab = int(config.hidden_size), int(getattr(config, "vocab_size", 0))
    return 12 * int(model.get_total_num_hidden_layers()) * hidden * hidden + vocab * hidden


def _weights_fingerprint(model: str, revision: str | None) -> str:
    """For a local directory: its weight files' names, sizes and times; else the hub's commit.

    A changed checkpoint under the same name must not read the KV of the old one.
    """
    path = Path(model)
    if not path.is_dir():
        return _snapshot(model, revision)
    files = sorted((*path.glob("*.safetensors"), *path.glob("*.bin"), *path.glob("config.json")))
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(f"{facts}{__version__}".encode()).hexdigest()[:16]


def _snapshot(model: str, revision: str | None) -> str:
    """The commit of a hub model in the local cache, where vLLM has just loaded it from."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - only for hub models

    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:
        return ""
    return Path(config).parent.name if isinstance(config, str) else ""
