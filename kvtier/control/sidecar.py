"""The process of the control server: `python -m kvtier.control.sidecar --run-dir DIR`.

One for each run directory: the first to hold the lock serves, any other ends at once. With `--detach` it
reads its settings as JSON from standard input, forks, so that it is nobody's child (an engine that kills
its process tree must not take the server of the other engines with it), and logs to a file.

What is slow to import comes after the lock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvtier.config import Settings
from kvtier.config_sources import ConfigError
from kvtier.control.control_settings import check_files, from_json
from kvtier.control.files import ControlFiles
from kvtier.control.log_file import LogFile
from kvtier.server.files import RunDirError, default_run_dir

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("kvtier.control")

START_GRACE_S: Final = 120.0
"""How long the first engine may take: it starts the server before it says hello."""
LOCK_WAIT_S: Final = 1.0
"""How long somebody who only looks may hold the lock."""
PREDECESSOR_WAIT_S: Final = 20.0
"""How long a server that ends may take to."""
_LOCK_POLL_S: Final = 0.05
_TRIM_INTERVAL_S: Final = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop or not needed; returns the exit status."""
    parser = argparse.ArgumentParser(prog="kvtier.control.sidecar", description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=None)
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--start-grace-s", type=float, default=START_GRACE_S)
    arguments = parser.parse_args(argv)
    try:
        settings = from_json(sys.stdin.buffer.read()) if arguments.detach else Settings.load()
        check_files(settings)
        files = ControlFiles.prepare(arguments.run_dir or default_run_dir())
    except (ConfigError, RunDirError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if arguments.detach:
        if os.fork():
            return 0
        _let_go()
    os.umask(0o077)
    lock = _take_lock(files)
    if lock is None:
        return 0
    try:
        log = _start_log(files, detached=arguments.detach)
        return _serve(settings, files, log, arguments.start_grace_s)
    except Exception:
        logger.exception("the control server failed")
        return 1
    finally:
        os.close(lock)


def _let_go() -> None:
    """Keep nothing of the starter's: it waits for the end of its pipes."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _take_lock(files: ControlFiles) -> int | None:
    """Return a descriptor that holds the lock; None if another server runs and stays."""
    begun_s = time.monotonic()
    while (lock := files.try_lock()) is None:
        record = files.read_record()
        ends = record is not None and record.phase == "stopping"
        patience_s = PREDECESSOR_WAIT_S if ends else LOCK_WAIT_S
        if time.monotonic() - begun_s > patience_s:
            return None
        time.sleep(_LOCK_POLL_S)
    return lock


def _start_log(files: ControlFiles, *, detached: bool) -> LogFile:
    """Log to the file, and to the terminal if there is one."""
    # gRPC's own lines would be one for each stranger who says something else than gRPC.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    log = LogFile(files.log_path, take_over=detached)
    handlers: list[logging.Handler] = [log]
    if not detached:
        handlers.append(logging.StreamHandler())
    logging.basicConfig(level=logging.INFO, handlers=handlers)
    return log


def _serve(settings: Settings, files: ControlFiles, log: LogFile, start_grace_s: float) -> int:
    # They take a second, in which others can see the lock already.
    import zmq  # noqa: PLC0415

    from kvtier.control.control_server import ControlServer  # noqa: PLC0415

    async def serve() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        server = ControlServer(settings, files, start_grace_s=start_grace_s)
        try:
            listening = await server.start()
        except (OSError, zmq.ZMQError) as error:
            logger.error("the control server cannot serve: %s", error)  # noqa: TRY400
            return 1
        logger.info(
            "control server %d serves on %s and %s",
            os.getpid(),
            files.unix_target,
            listening.tcp_target or "no TCP address",
        )
        trimming = asyncio.create_task(_trim(log))
        try:
            logger.info("stopping: %s", await server.run(stop))
        finally:
            trimming.cancel()
            await server.close()
        return 0

    return asyncio.run(serve())


async def _trim(log: LogFile) -> None:
    while True:
        await asyncio.sleep(_TRIM_INTERVAL_S)
        with contextlib.suppress(OSError):
            log.trim()


if __name__ == "__main__":
    sys.exit(main())
