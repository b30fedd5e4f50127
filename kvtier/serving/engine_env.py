"""Environment variables that an engine and its LMCache server are started with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_ALWAYS = {
    # No reports to third parties from a command that did not ask.
    "VLLM_NO_USAGE_STATS": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
}


def engine_env(
    base: Mapping[str, str], *, cpu: bool, offline: bool = False, cores: int | None = None
) -> dict[str, str]:
    """Return ``base`` with what the engine needs; a variable that is set there stays.

    Args:
        base: Environment to start from, usually ``os.environ``.
        cpu: The engine computes on the CPU.
        offline: The model is on disk: nothing may be asked of a model hub.
        cores: Cores that this process may use; default is the operating system's answer.
    """
    needed = dict(_ALWAYS)
    if offline:
        needed["HF_HUB_OFFLINE"] = "1"
    if cpu:
        usable = len(os.sched_getaffinity(0)) if cores is None else cores
        # vLLM's own binding fails in containers that hide the NUMA layout.
        needed["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # More threads than free cores stall for seconds: one core is left to the scheduler, the
        # API process and LMCache.
        needed["OMP_NUM_THREADS"] = str(max(1, usable - 1))
    return {**needed, **base}
