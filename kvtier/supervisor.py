"""One LMCache server per host and profile: engines hold leases on it, a guardian process owns it.

`ensure_server` joins the running server or starts one, and returns at once; the server needs
seconds to get ready. It ends when no lease has been held for `ServerSpec.grace_s`. A lease is a
file lock, so it also ends when its process is killed. Nobody's death disturbs the others: the
guardian is nobody's child, and if it is killed itself its server ends too and the next
`ensure_server` starts a new pair.

Engines of one run directory must share a PID namespace.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Self

from kvtier.server.files import (
    LeaseFile,
    RunDirError,
    ServerFiles,
    ServerRecord,
    default_run_dir,
    prepare_run_dir,
)
from kvtier.server.launch import (
    ServerSpec,
    SpecMismatchError,
    SupervisorError,
    check_joinable,
    default_dram_bytes,
)
from kvtier.server.overview import ServerSummary, StopResult, status, stop_all
from kvtier.server.revival import request_revival, start_guardian
from kvtier.server.state import (
    ServerFailedError,
    ServerState,
    ServerStatus,
    ServerTimeoutError,
    state_of,
    usable,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

__all__ = [
    "RunDirError",
    "ServerFailedError",
    "ServerLease",
    "ServerSpec",
    "ServerState",
    "ServerStatus",
    "ServerSummary",
    "ServerTimeoutError",
    "SpecMismatchError",
    "StopResult",
    "SupervisorError",
    "default_dram_bytes",
    "default_run_dir",
    "ensure_server",
    "status",
    "stop_all",
]

logger = logging.getLogger(__name__)

REPUBLISH_TIMEOUT_S = 2.0
_POLL_S = 0.05
_PROGRESS_INTERVAL_S = 1.0


class ServerLease:
    """Keeps the server alive until `close`, the end of a `with` block, or of this process."""

    def __init__(
        self, files: ServerFiles, lease_file: LeaseFile, record: ServerRecord, warnings: list[str]
    ) -> None:
        """Built by `ensure_server`."""
        self._files = files
        self._lease_file = lease_file
        self._last = record
        self._revival: subprocess.Popen[str] | None = None
        self.warnings = tuple(warnings)
        """Differences between this engine's spec and the running server that do no harm."""

    def state(self) -> ServerState:
        """Return the state now: a small file read, no request to the server.

        After `FAILED`, call `revive`, or `ensure_server` again; the old lease may be closed before
        or after.
        """
        record = self._files.read_record()
        if record is None:
            # Removed by a stop; or damaged, then the guardian writes it again in a moment.
            return state_of(self._last, gone="its state file is gone: it was stopped")
        self._last = record
        return state_of(record)

    def wait_ready(
        self, timeout_s: float, on_progress: Callable[[float, ServerState], None] | None = None
    ) -> ServerState:
        """Wait until the server is ready and return its state.

        Args:
            timeout_s: how long to wait at most.
            on_progress: called about once a second with the seconds waited and the state.

        Raises:
            ServerFailedError: the server gave up; the message has the end of its log.
            ServerTimeoutError: `timeout_s` passed. The lease stays, the server goes on starting.
        """
        begin_s = time.monotonic()
        progress_due_s = begin_s
        while True:
            state = self.state()
            now_s = time.monotonic()
            if state.status is ServerStatus.READY:
                return state
            if state.status is ServerStatus.FAILED:
                msg = f"LMCache server {self._files.name!r} failed: {state.detail}"
                raise ServerFailedError(msg)
            if on_progress is not None and now_s >= progress_due_s:
                on_progress(now_s - begin_s, state)
                progress_due_s = now_s + _PROGRESS_INTERVAL_S
            if now_s - begin_s >= timeout_s:
                msg = (
                    f"LMCache server {self._files.name!r} is not ready after {timeout_s:g} s "
                    f"({state.detail}); log: {self._files.log_path}"
                )
                raise ServerTimeoutError(msg)
            time.sleep(_POLL_S)

    def revive(self) -> None:
        """Where nobody guards the server any more, have it started again; returns at once.

        For engines that outlive a guardian which was killed, or gave up after too many crashes.
        Call it seconds apart: each call costs a short-lived process.
        """
        if self._revival is not None and self._revival.poll() is None:
            return
        if self.state().status is ServerStatus.FAILED:
            logger.warning("starting LMCache server %r again", self._files.name)
            self._revival = request_revival(self._files, self._last.spec)

    @property
    def url(self) -> str:
        """LMCache's request endpoint now, "tcp://127.0.0.1:PORT"."""
        return self.state().url

    @property
    def http_url(self) -> str:
        """LMCache's HTTP endpoint now."""
        return self.state().http_url

    @property
    def shm_name(self) -> str:
        """Name below /dev/shm of the CPU tier's segment now."""
        return self.state().shm_name

    @property
    def generation(self) -> int:
        """Count of server starts; a change means that everything stored is gone."""
        return self.state().generation

    @property
    def log_path(self) -> Path:
        """Log of the guardian and its server."""
        return self._files.log_path

    def close(self) -> None:
        """Give the lease up; a second call does nothing."""
        self._lease_file.close()

    def __enter__(self) -> Self:
        """Return this lease."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lease up."""
        self.close()


def ensure_server(spec: ServerSpec, *, run_dir: Path | None = None, owner: str) -> ServerLease:
    """Join the server `spec.name` of this host, or start it; do not wait until it is ready.

    Args:
        spec: the settings; those of a running server win where a difference does no harm.
        run_dir: where the processes meet; `default_run_dir()` if None.
        owner: who holds the lease, for people who read the lease file.

    Raises:
        SpecMismatchError: a server of this name runs with settings that cannot be shared.
        RunDirError: the run directory is not safe.
        SupervisorError: the guardian did not start; the message says why.
    """
    files = ServerFiles(prepare_run_dir(run_dir or default_run_dir()), spec.name)
    republish_deadline_s = time.monotonic() + REPUBLISH_TIMEOUT_S
    while True:
        with files.election():
            record = files.read_record()
            # A guardian without a (readable) record is about to write it again, or about to end.
            unclear = record is None and files.guardian_lock_held()
            if not unclear or time.monotonic() >= republish_deadline_s:
                return _elect(files, spec, record, owner)
        time.sleep(_POLL_S)


def _elect(
    files: ServerFiles, spec: ServerSpec, record: ServerRecord | None, owner: str
) -> ServerLease:
    """Join the recorded server or start one. The caller holds the election lock."""
    warnings: list[str] = []
    joining = record is not None and usable(record)
    if record is not None and joining:
        warnings = check_joinable(record.spec, spec, record.versions)
        for warning in warnings:
            logger.warning("%s", warning)
    lease_file = LeaseFile(files, owner)
    try:
        if record is None or not joining:
            record = start_guardian(files, spec)
    except BaseException:
        lease_file.close()
        raise
    return ServerLease(files, lease_file, record, warnings)
