"""All servers of a run directory: what they are doing, and how to stop those nobody uses."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtier.server.files import ServerFiles, default_run_dir, prepare_run_dir
from kvtier.server.state import ServerState, ServerStatus, ServerTimeoutError, state_of

if TYPE_CHECKING:
    from pathlib import Path

    from kvtier.server.launch import ServerSpec

_POLL_S = 0.05


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


def _known_files(run_dir: Path) -> list[ServerFiles]:
    names = {path.name.removesuffix(".json") for path in run_dir.glob("*.json")}
    # The control server's record, which is no LMCache server's.
    names.discard("kvtier.control")
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
                else state_of(record),
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
