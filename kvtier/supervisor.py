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
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from kvtier.server_files import (
    LeaseFile,
    RunDirError,
    ServerFiles,
    ServerRecord,
    default_run_dir,
    prepare_run_dir,
)
from kvtier.server_launch import (
    ServerSpec,
    SpecMismatchError,
    SupervisorError,
    check_joinable,
    default_dram_bytes,
    server_environment,
)

if TYPE_CHECKING:
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

GUARDIAN_START_TIMEOUT_S = 30.0
REPUBLISH_TIMEOUT_S = 2.0
_POLL_S = 0.05
_PROGRESS_INTERVAL_S = 1.0


class ServerFailedError(SupervisorError):
    """The server, or its guardian, ended and will not come back by itself."""


class ServerTimeoutError(SupervisorError):
    """The server was not ready, or not gone, in time."""


class ServerStatus(StrEnum):
    """Whether the server can be used now."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ServerState:
    """One consistent view of the server; the addresses are only good while it is `READY`.

    `generation` grows with every start of the server. After a change, everything stored before is
    gone, and `url`, `http_url` and `shm_name` are new.
    """

    status: ServerStatus
    detail: str
    generation: int = 0
    url: str = ""
    http_url: str = ""
    shm_name: str = ""


@dataclass(frozen=True, slots=True)
class ServerSummary:
    """One server of a run directory, for `kvtier doctor` and `kvtier status`."""

    name: str
    state: ServerState
    guardian_pid: int | None
    server_pid: int | None
    lease_pids: tuple[int, ...]
    spec: ServerSpec | None
    log_path: Path


@dataclass(frozen=True, slots=True)
class StopResult:
    """What `stop_all` did with one server."""

    name: str
    stopped: bool
    reason: str


class ServerLease:
    """Keeps the server alive until `close`, the end of a `with` block, or of this process."""

    def __init__(
        self, files: ServerFiles, lease_file: LeaseFile, record: ServerRecord, warnings: list[str]
    ) -> None:
        """Built by `ensure_server`."""
        self._files = files
        self._lease_file = lease_file
        self._last = record
        self.warnings = tuple(warnings)
        """Differences between this engine's spec and the running server that do no harm."""

    def state(self) -> ServerState:
        """Return the state now: a small file read, no request to the server.

        After `FAILED`, call `ensure_server` again; the old lease may be closed before or after.
        """
        record = self._files.read_record()
        if record is None:
            # Removed by a stop; or damaged, then the guardian writes it again in a moment.
            return _state_of(self._last, gone="its state file is gone: it was stopped")
        self._last = record
        return _state_of(record)

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
    joining = record is not None and _usable(record)
    if record is not None and joining:
        warnings = check_joinable(record.spec, spec, record.versions)
        for warning in warnings:
            logger.warning("%s", warning)
    lease_file = LeaseFile(files, owner)
    try:
        if record is None or not joining:
            record = _start_guardian(files, spec)
    except BaseException:
        lease_file.close()
        raise
    return ServerLease(files, lease_file, record, warnings)


def _start_guardian(files: ServerFiles, spec: ServerSpec) -> ServerRecord:
    """Start a detached guardian and return the record that it has published."""
    command = [sys.executable, "-P", "-m", "kvtier.server_guardian"]
    command += ["--run-dir", str(files.run_dir), "--name", files.name]
    try:
        done = subprocess.run(
            command,
            input=spec.to_json(),
            capture_output=True,
            text=True,
            env=server_environment(spec),
            start_new_session=True,
            timeout=GUARDIAN_START_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        msg = f"the guardian of LMCache server {spec.name!r} did not start in {error.timeout:g} s"
        raise SupervisorError(msg) from error
    if done.returncode != 0:
        msg = f"the guardian of LMCache server {spec.name!r} did not start:\n{done.stderr.strip()}"
        raise SupervisorError(msg)
    record = files.read_record()
    if record is None:
        msg = f"the guardian's state {files.record_path} vanished right after its start"
        raise SupervisorError(msg)
    return record


def _usable(record: ServerRecord) -> bool:
    return record.phase in {"starting", "ready"} and record.guardian.alive()


def _state_of(record: ServerRecord, gone: str | None = None) -> ServerState:
    if gone is not None and record.guardian.alive():
        server_status, detail = ServerStatus.STARTING, "its state is being written again"
    elif gone is not None:
        server_status, detail = ServerStatus.FAILED, gone
    elif record.phase == "failed":
        server_status, detail = ServerStatus.FAILED, record.detail
    elif record.phase == "stopping":
        server_status, detail = ServerStatus.FAILED, f"it is being stopped: {record.detail}"
    elif not record.guardian.alive():
        server_status = ServerStatus.FAILED
        detail = f"its guardian (pid {record.guardian.pid}) was killed"
    else:
        server_status, detail = ServerStatus(record.phase), record.detail
    return ServerState(
        server_status,
        detail,
        record.generation,
        record.url,
        record.http_url,
        record.endpoint.shm_name,
    )


def _known_files(run_dir: Path) -> list[ServerFiles]:
    names = {path.name.removesuffix(".json") for path in run_dir.glob("*.json")}
    if (run_dir / "leases").is_dir():
        names |= {path.name for path in (run_dir / "leases").iterdir()}
    return [ServerFiles(run_dir, name) for name in sorted(names)]


def status(run_dir: Path | None = None) -> list[ServerSummary]:
    """Return the servers of a run directory, also failed ones."""
    run_dir = run_dir or default_run_dir()
    if not run_dir.exists():
        return []
    summaries = []
    for files in _known_files(prepare_run_dir(run_dir)):
        with files.election():
            record = files.read_record()
            leases = files.held_leases()
        if record is None and not leases:
            continue
        server = record.server if record is not None else None
        summaries.append(
            ServerSummary(
                name=files.name,
                state=ServerState(ServerStatus.FAILED, "no state file")
                if record is None
                else _state_of(record),
                guardian_pid=record.guardian.pid if record and record.guardian.alive() else None,
                server_pid=server.pid if server is not None and server.alive() else None,
                lease_pids=tuple(int(path.name.partition("-")[0]) for path in leases),
                spec=record.spec if record is not None else None,
                log_path=files.log_path,
            )
        )
    return summaries


def stop_all(
    run_dir: Path | None = None, *, name: str | None = None, timeout_s: float = 30.0
) -> list[StopResult]:
    """Stop every server on which no lease is held (close your own first), without the grace.

    Args:
        run_dir: Where the servers' files are; default: the user's.
        name: Only the server of this name.
        timeout_s: For all of them together.

    Returns:
        One result per server that was running.

    Raises:
        ServerTimeoutError: a guardian did not end within `timeout_s` seconds.
    """
    run_dir = run_dir or default_run_dir()
    if not run_dir.exists():
        return []
    results = []
    deadline_s = time.monotonic() + timeout_s
    for files in _known_files(prepare_run_dir(run_dir)):
        if name is not None and files.name != name:
            continue
        with files.election():
            record = files.read_record()
            if record is None or not record.guardian.alive():
                continue
            if leases := files.held_leases():
                reason = f"{len(leases)} other lease(s) held"
                results.append(StopResult(files.name, stopped=False, reason=reason))
                continue
            # Signalled under the election lock: nobody joins a server that is about to end.
            files.write_record(record.with_phase("stopping", "stop_all"))
            os.kill(record.guardian.pid, signal.SIGTERM)
        while record.guardian.alive():
            if time.monotonic() >= deadline_s:
                msg = (
                    f"server {files.name!r} did not stop in {timeout_s:g} s; log: {files.log_path}"
                )
                raise ServerTimeoutError(msg)
            time.sleep(_POLL_S)
        results.append(StopResult(files.name, stopped=True, reason="no lease held"))
    return results
