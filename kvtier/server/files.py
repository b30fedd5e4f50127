"""The run directory of the server supervisor: its locks, lease files and state record.

Files, for a server named N:

- `N.election`: flock held for the moments in which somebody reads or changes record or leases.
- `N.guardian`: flock held by the guardian *and* inherited by the server, so while it is held one
  of them still runs.
- `N.json`: the `ServerRecord`, replaced atomically.
- `N.log`, `N.log.1`: output of this guardian and its server, and of the one before.
- `leases/N/<pid>-<uuid>.lease`: flock held by an engine. The kernel drops it when the engine dies,
  whatever kills it; a lease file that nobody locks is garbage.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import stat
import tempfile
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier.server.launch import LOOPBACK, Endpoint, ServerSpec, SupervisorError
from kvtier.server.processes import start_ticks

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

SERVER_NAME = "kvtier"
"""Of the host's LMCache server, in kvtier's engines."""
PHASES = ("starting", "ready", "stopping", "failed")


class RunDirError(SupervisorError):
    """The run directory is not safe to use."""


def default_run_dir() -> Path:
    """Return KVTIER_RUN_DIR, else $XDG_RUNTIME_DIR/kvtier, else /tmp/kvtier-<uid>.

    An XDG_RUNTIME_DIR that is missing or somebody else's (after `su`) is not used.
    """
    if chosen := os.environ.get("KVTIER_RUN_DIR"):
        return Path(chosen)
    if xdg := os.environ.get("XDG_RUNTIME_DIR"):
        with contextlib.suppress(OSError):
            if Path(xdg).stat().st_uid == os.geteuid():
                return Path(xdg) / "kvtier"
    # Not tempfile.gettempdir(): engines with different TMPDIR must meet at one place.
    return Path(f"/tmp/kvtier-{os.geteuid()}")  # noqa: S108 - owner and mode are checked


def prepare_run_dir(path: Path) -> Path:
    """Create `path` with mode 0700 if it is missing, check it and return it absolute.

    Raises:
        RunDirError: it is a symlink, no directory, another user's, or writable by other users.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow the symlink
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else error.strerror
        msg = f"run directory {path}: {reason}; set KVTIER_RUN_DIR to a private directory"
        raise RunDirError(msg) from error
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if found.st_uid != os.geteuid():
        msg = (
            f"run directory {path} belongs to user {found.st_uid}, not to {os.geteuid()}; "
            "set KVTIER_RUN_DIR to a private directory"
        )
        raise RunDirError(msg)
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        msg = f"run directory {path} is writable by other users; run `chmod 700 {path}`"
        raise RunDirError(msg)
    return path


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Identify a running process. Raises ProcessLookupError when it is gone."""
        ticks = start_ticks(pid)
        if ticks is None:
            raise ProcessLookupError(pid)
        return cls(pid, ticks)

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return start_ticks(self.pid) == self.start_ticks


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """What the guardian publishes about its server. `generation` counts server starts."""

    phase: str
    detail: str
    generation: int
    guardian: ProcessId
    server: ProcessId | None
    endpoint: Endpoint
    spec: ServerSpec
    versions: dict[str, str]

    @property
    def url(self) -> str:
        """LMCache's request endpoint."""
        return f"tcp://{LOOPBACK}:{self.endpoint.port}"

    @property
    def http_url(self) -> str:
        """LMCache's HTTP endpoint (health, status, metrics)."""
        return f"http://{LOOPBACK}:{self.endpoint.http_port}"

    def with_phase(self, phase: str, detail: str) -> ServerRecord:
        """Return this record in another phase."""
        return replace(self, phase=phase, detail=detail)

    def to_json(self) -> str:
        """Return the record as JSON."""
        fields = asdict(self)
        fields["spec"] = json.loads(self.spec.to_json())
        fields.update(url=self.url, http_url=self.http_url, spec_hash=self.spec.digest())
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ServerRecord:
        """Read `to_json` output. Raises ValueError, TypeError or LookupError on anything else."""
        fields = json.loads(text)
        if fields["phase"] not in PHASES:
            msg = f"unknown phase {fields['phase']!r}"
            raise ValueError(msg)
        return cls(
            phase=fields["phase"],
            detail=str(fields["detail"]),
            generation=int(fields["generation"]),
            guardian=ProcessId(**fields["guardian"]),
            server=None if fields["server"] is None else ProcessId(**fields["server"]),
            endpoint=Endpoint(**fields["endpoint"]),
            spec=ServerSpec.from_json(json.dumps(fields["spec"])),
            versions=dict(fields["versions"]),
        )


class ServerFiles:
    """The files of one named server in a prepared run directory."""

    def __init__(self, run_dir: Path, name: str) -> None:
        """Name the files; none is made here."""
        self.run_dir = run_dir
        self.name = name
        self.record_path = run_dir / f"{name}.json"
        self.log_path = run_dir / f"{name}.log"
        self.guardian_lock_path = run_dir / f"{name}.guardian"
        self.lease_dir = run_dir / "leases" / name

    @contextlib.contextmanager
    def election(self) -> Iterator[None]:
        """Hold the election lock. Not reentrant."""
        descriptor = _open_lock_file(self.run_dir / f"{self.name}.election")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def try_guardian_lock(self) -> int | None:
        """Return a descriptor that holds the guardian lock, or None while another one holds it."""
        return _try_lock(self.guardian_lock_path)

    def guardian_lock_held(self) -> bool:
        """Whether a guardian or a server of this name still runs."""
        descriptor = self.try_guardian_lock()
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def read_record(self) -> ServerRecord | None:
        """Return the published record; None if there is none or it is corrupt (logged)."""
        try:
            text = self.record_path.read_text()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            logger.warning("ignoring corrupt server state %s: %s", self.record_path, error)
            return None
        try:
            return ServerRecord.from_json(text)
        except (ValueError, TypeError, LookupError, AttributeError, SupervisorError) as error:
            logger.warning("ignoring corrupt server state %s: %r", self.record_path, error)
            return None

    def write_record(self, record: ServerRecord) -> None:
        """Replace the record atomically. Call it under the election lock."""
        descriptor, temporary = tempfile.mkstemp(prefix=f".{self.name}.", dir=self.run_dir)
        with os.fdopen(descriptor, "w") as file:
            file.write(record.to_json())
        Path(temporary).replace(self.record_path)

    def remove_record(self) -> None:
        """Remove the record. Call it under the election lock."""
        self.record_path.unlink(missing_ok=True)

    def held_leases(self) -> list[Path]:
        """Return the lease files that a process holds; remove the others.

        Call it under the election lock: a lease file exists for a moment before it is locked.
        """
        held = []
        for path in sorted(self.lease_dir.glob("*.lease")):
            try:
                descriptor = _try_lock(path, create=False)
            except FileNotFoundError:  # closed by its holder just now
                continue
            if descriptor is None:
                held.append(path)
            else:
                path.unlink(missing_ok=True)
                os.close(descriptor)
        return held

    def log_tail(self, lines: int = 8) -> str:
        """Return the last lines of the log, for error messages; empty if there is none."""
        try:
            text = self.log_path.read_bytes()[-20_000:].decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


class LeaseFile:
    """A held lease. It ends with `close`, or with the process."""

    def __init__(self, files: ServerFiles, owner: str) -> None:
        """Create and lock a lease file. Call it under the election lock."""
        files.lease_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = files.lease_dir / f"{os.getpid()}-{uuid.uuid4().hex}.lease"
        # Python opens with O_CLOEXEC: a program that this process starts does not keep the lease.
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(self._descriptor, owner.encode())
        _OPEN_LEASES.add(self)

    def close(self) -> None:
        """Give the lease up; a second call does nothing."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            self.forget()

    def forget(self) -> None:
        """Close this process's descriptor and leave the file: what a forked child does."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            _OPEN_LEASES.discard(self)


# Strong references: a lease that nobody refers to is still held, and a fork must still find it.
_OPEN_LEASES: set[LeaseFile] = set()


def _forget_leases_after_fork() -> None:
    """Close inherited leases: a forked child shares the lock and would keep it for its parent."""
    for lease in list(_OPEN_LEASES):
        lease.forget()


os.register_at_fork(after_in_child=_forget_leases_after_fork)


def _open_lock_file(path: Path, *, create: bool = True) -> int:
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o600)


def _try_lock(path: Path, *, create: bool = True) -> int | None:
    """Return a descriptor that locks `path`, or None if somebody else holds the lock."""
    descriptor = _open_lock_file(path, create=create)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
