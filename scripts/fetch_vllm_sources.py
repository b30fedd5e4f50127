"""Fetch the Python sources of vLLM releases, to test kvtier on schedulers that are not installed.

    python scripts/fetch_vllm_sources.py 0.30.0 0.31.0

Prints one directory a version. Put first on `PYTHONPATH`, a directory makes `import vllm` find
that release; with it comes distribution metadata by which vLLM runs on its CPU platform. Only
Python files are kept: enough for the scheduler and its block pool, not for a model.

The source distribution (about 40 MB) comes through uv, else pip, from the package index that
they are set up for. It is "built" by `python_only_backend`, in seconds and without vLLM's build
requirements. Sources are kept in the user's cache directory and fetched once.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvtier.paths import cache_dir

logger = logging.getLogger("fetch_vllm_sources")

FETCH_TIMEOUT_S = 300.0
_METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}+cpu
"""


class FetchError(RuntimeError):
    """The sources could not be had; the message holds the installer's."""


def sources_dir(version: str) -> Path:
    """Directory of a version's sources (it may not exist yet)."""
    return cache_dir() / "vllm-sources" / version


def fetch(version: str, *, timeout_s: float = FETCH_TIMEOUT_S) -> Path:
    """Fetch a version once and return its directory.

    The directory appears complete or not at all; of two processes that fetch at the same time,
    one's work is thrown away.

    Args:
        version: A release such as "0.33.0".
        timeout_s: Longest time for the installer, seconds.

    Raises:
        FetchError: There is no installer, or it failed or took too long.
    """
    target = sources_dir(version)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    logger.info("fetching the sources of vLLM %s", version)
    # Beside the target, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=f".{version}-", dir=target.parent) as work_name:
        work = Path(work_name)
        tree = work / "tree"
        _install(version, tree, _backend(work / "backend"), timeout_s)
        if not (tree / "vllm" / "v1" / "core").is_dir():
            raise FetchError(f"vllm {version} holds no vllm/v1/core")
        _claim_cpu(tree, version)
        _place(tree, target)
    n_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    seconds = time.monotonic() - started_s
    logger.info("%s: %.0f MB in %.0f s", target, n_bytes / 1e6, seconds)
    return target


def _backend(directory: Path) -> Path:
    """Lay out `python_only_backend` under the name of the package's own backend."""
    package = directory / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    source = Path(__file__).with_name("python_only_backend.py")
    shutil.copyfile(source, package / "build_meta.py")
    return directory


def _install(version: str, tree: Path, backend: Path, timeout_s: float) -> None:
    # Never cached: an installer's cache must not offer this build to anyone as a real one.
    common = ["--no-deps", "--no-build-isolation", "--no-binary", "vllm"]
    common += ["--target", str(tree), f"vllm=={version}"]
    if importlib.util.find_spec("uv"):
        command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-cache"]
        command += ["--python", sys.executable, *common]
    elif importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", *common]
    else:
        raise FetchError(f"{sys.executable} has neither uv nor pip")
    environment = {**os.environ, "PYTHONPATH": str(backend)}
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"vllm {version}: no answer within {timeout_s:g} s") from error
    if done.returncode != 0:
        raise FetchError(f"vllm {version}: {done.stderr.strip() or 'the installer failed'}")


def _claim_cpu(tree: Path, version: str) -> None:
    """Replace the metadata by one whose version says "cpu", by which vLLM picks its platform."""
    for old in tree.glob("vllm-*.dist-info"):
        shutil.rmtree(old)
    dist_info = tree / f"vllm-{version}+cpu.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text(_METADATA.format(version=version), encoding="utf-8")


def _place(tree: Path, target: Path) -> None:
    try:
        tree.rename(target)
    except OSError:
        # Another process was first; its copy is as good.
        if not target.is_dir():
            raise


def main() -> int:
    """Fetch what the command line names; the exit code says whether all of it is there."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description="Fetch Python sources of vLLM releases.")
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="for example 0.33.0")
    failed = False
    for version in parser.parse_args().versions:
        try:
            sys.stdout.write(f"{fetch(version)}\n")
        except (FetchError, OSError) as error:
            logger.error("%s", error)  # noqa: TRY400  (the message is for the user, not a trace)
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
