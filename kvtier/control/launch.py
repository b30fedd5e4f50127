"""Starts the host's control server from an engine, whose process never imports gRPC for it."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

from kvtier.control.control_settings import check_files, control_values, to_json
from kvtier.control.files import ControlFiles
from kvtier.server.files import RunDirError
from kvtier.server.launch import python_environment

if TYPE_CHECKING:
    from pathlib import Path

    from kvtier.config import Settings

logger = logging.getLogger(__name__)

RETRY_INTERVAL_S: Final = 20.0
"""Between two starts from one engine: a server that cannot start must not cost one process after another."""
_START_TIMEOUT_S: Final = 60.0

_last_starts_s: dict[Path, float] = {}
_seen: set[Path] = set()
_warned: set[Path] = set()


def ensure_control_server(settings: Settings, run_dir: Path) -> None:
    """See to it that the host has a control server, or soon will; returns at once.

    Engines that start together may each start one: all but one of them end at once. May be called as
    often as one likes: it takes some 50 microseconds while a server runs.

    Args:
        settings: The first engine's hold for the server.
        run_dir: Of the LMCache server, too: `kvtier.server.files.default_run_dir`.

    Raises:
        ConfigError: A file that the settings name cannot be used; the message says what is accepted. Only
            the first call of a process raises: a running engine does not end for a file that has gone.
    """
    if settings.control == "off":
        return
    is_first = run_dir not in _seen
    _seen.add(run_dir)
    if is_first:
        check_files(settings)
    try:
        files = ControlFiles.prepare(run_dir)
        runs = files.lock_held()
    except (RunDirError, OSError) as error:
        _warn_once(run_dir, error)
        return
    if runs:
        record = files.read_record()
        if is_first and record is not None:
            _tell_differences(settings, record.settings)
        if record is None or record.phase != "stopping":
            return
    now_s = time.monotonic()
    if now_s - _last_starts_s.get(run_dir, float("-inf")) < RETRY_INTERVAL_S:
        return
    _last_starts_s[run_dir] = now_s
    _start(settings, files)


def _warn_once(run_dir: Path, error: Exception) -> None:
    if run_dir not in _warned:
        _warned.add(run_dir)
        logger.warning("no control server: %s", error)


def _start(settings: Settings, files: ControlFiles) -> None:
    # `-P`: never import from the directory the first engine happened to run in.
    command = [sys.executable, "-P", "-m", "kvtier.control.sidecar"]
    command += ["--run-dir", str(files.run_dir), "--detach"]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=python_environment(),
            start_new_session=True,
        )
    except OSError as error:
        logger.warning("no control server: %s", error)
        return
    # Its first process ends as soon as it has read its settings and forked.
    thread = threading.Thread(
        target=_see_it_start,
        args=(process, to_json(settings)),
        name="kvtier-control-start",
        daemon=True,
    )
    thread.start()


def _see_it_start(process: subprocess.Popen[bytes], settings: bytes) -> None:
    try:
        _, said = process.communicate(settings, timeout=_START_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        process.kill()
        process.wait()
        logger.warning("the control server did not start: %s", error)
        return
    if process.returncode != 0:
        text = said.decode(errors="replace").strip()[-2000:]
        logger.warning("the control server did not start (%d): %s", process.returncode, text)


def _tell_differences(settings: Settings, running: dict[str, str | float | None]) -> None:
    """Say which of this engine's settings do not hold for the server that runs."""
    for name, value in control_values(settings).items():
        if name in running and running[name] != value:
            logger.warning(
                "the control server runs with %s=%s; this engine's %s=%s is not applied",
                name,
                running[name],
                name,
                value,
            )
