"""Builds the scheduler half and the worker half from vLLM's configuration and kvtier's settings.

The only place that knows all rooms. Imported when a connector is constructed, not before: vLLM's API
process imports `kvtier.connector` too and needs none of this.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtier import __version__
from kvtier.admission import AdmissionController
from kvtier.admission_facts import AdmissionConfig
from kvtier.backend import NoTier, TierBackend, TierState
from kvtier.engine_config import engine_facts, tier_obstacle
from kvtier.policy import Policy
from kvtier.policy_facts import PolicyConfig
from kvtier.programs import ProgramLimits, ProgramTable
from kvtier.scheduler_half import SchedulerHalf
from kvtier.stats import Stats
from kvtier.tools.detection import ToolCallDetector
from kvtier.turns.decision_log import DecisionLog
from kvtier.turns.live_mode import LiveMode, Mode
from kvtier.turns.recorder import TurnRecorder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.config import Settings
    from kvtier.control.link import EngineLink
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.worker_half import WorkerHalf

logger = logging.getLogger(__name__)

LMCACHE_CHUNK_TOKENS = 256
"""LMCache's own chunk size; kvtier's slots do not depend on it, so that all engines agree on it."""
REQUIRE_TIMEOUT_S = 180.0
MAX_PREFILL_SAMPLES = 256


def build_scheduler_half(
    vllm_config: Any,
    kv_cache_config: Any,
    settings: Settings,
    *,
    clock: Callable[[], float] = time.monotonic,
    tier: TierBackend | None = None,
    link: EngineLink | None = None,
) -> tuple[SchedulerHalf, Any]:
    """The scheduler half of one engine, and the lease on the host's server (None without one).

    Those who bring a tier bring the link to a control server too, if there is to be one.
    """
    facts = engine_facts(vllm_config, kv_cache_config, settings)
    lease: Any = None
    if tier is None:
        tier, lease = connect_tier(vllm_config, settings, facts, clock)
        if settings.control == "on":
            link = connect_control(vllm_config, settings, facts, clock, lambda: half)
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
                backfill_turns=settings.backfill_turns,
            )
        ),
        policy=policy,
        detector=detector,
        stats=stats,
        log=DecisionLog(settings.decision_log, link),
        recorder=TurnRecorder(settings.record_file, facts.block_tokens),
        mode=LiveMode(Mode(settings.mode), settings.switch_file),
        clock=clock,
        decode=decode,
        lookup_wait_s=settings.lookup_wait_s,
        split_chunks=settings.stage_split_chunks,
        save_prefill=_save_prefill,
        link=link,
    )
    return half, lease


def connect_control(
    vllm_config: Any,
    settings: Settings,
    facts: EngineFacts,
    clock: Callable[[], float],
    half: Callable[[], SchedulerHalf],
) -> EngineLink | None:
    """The link to the host's control server, which is started where it does not run; None where that fails.

    Args:
        vllm_config: vLLM's configuration.
        settings: kvtier's.
        facts: Of the engine.
        clock: Monotonic time.
        half: Returns the scheduler half; called when it is complete.
    """
    from kvtier.control.engine_status import EngineStatus  # noqa: PLC0415 - needs psutil
    from kvtier.control.launch import ensure_control_server  # noqa: PLC0415 - only engines start it
    from kvtier.control.link import EngineLink  # noqa: PLC0415 - needs zmq
    from kvtier.link_messages import SOCKET_NAME  # noqa: PLC0415
    from kvtier.server.files import default_run_dir, prepare_run_dir  # noqa: PLC0415

    try:
        run_dir = prepare_run_dir(default_run_dir())
        ensure_control_server(settings, run_dir)
    except (OSError, RuntimeError) as error:
        logger.warning("kvtier: no control server, the engine works without: %s", error)
        return None
    parallel = vllm_config.parallel_config
    engine_id = facts.owner
    status: list[EngineStatus] = []

    def read() -> EngineStatus:
        if not status:
            model = str(vllm_config.model_config.model)
            # Not `data_parallel_rank`, which is 0 in every engine of a dense model.
            rank = int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))
            on_hosts_tier = settings.lmcache_url is None
            status.append(EngineStatus(half(), engine_id, model, rank, on_hosts_tier=on_hosts_tier))
        return status[0]

    return EngineLink(
        f"ipc://{run_dir / SOCKET_NAME}",
        engine_id=engine_id,
        hello=lambda: read().hello(),
        read_gauges=lambda: read().gauges(),
        block_tokens=facts.block_tokens,
        clock=clock,
        revive=lambda: ensure_control_server(settings, run_dir),
    )


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
    obstacle = tier_obstacle(vllm_config)
    if obstacle:
        return _pin_only(settings, obstacle)
    try:
        endpoint, lease = _server_endpoint(settings, facts)
    except Exception as error:  # noqa: BLE001 - whatever keeps the server away, pins still work
        return _pin_only(settings, f"{type(error).__name__}: {error}")
    from kvtier.lmcache_bridge import BridgeConfig, LMCacheBridge  # noqa: PLC0415 - needs zmq

    bridge = LMCacheBridge(
        BridgeConfig(endpoint, facts.owner, facts.ranks, facts.slot_bytes + facts.trailer_bytes),
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
        integrity=settings.integrity,
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
    from kvtier.server.files import SERVER_NAME  # noqa: PLC0415

    return f"ipc://{run_dir / SERVER_NAME}.kvtier.sock"


def server_spec(settings: Settings, run_dir: Path) -> Any:
    """What the host's LMCache server is started with."""
    from kvtier.server.files import SERVER_NAME  # noqa: PLC0415
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
