"""The control server's files in the run directory, which only the user can enter.

- `kvtier.control.lock`: flock held by the control server; the kernel drops it however the server ends.
- `kvtier.control.json`: what the server says of itself (`ControlRecord`), replaced atomically.
- `kvtier.control.sock`: the Unix socket on which it serves gRPC.
- `kvtier.control.link.sock`: the Unix socket to which engines connect.
- `kvtier.control.log`, `.log.1`: its log, bounded.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from pathlib import Path
from typing import Final, Literal

import msgspec

from kvtier.link_messages import SOCKET_NAME as LINK_SOCKET_NAME
from kvtier.server.files import RunDirError, prepare_run_dir

logger = logging.getLogger(__name__)

GRPC_SOCKET_NAME: Final = "kvtier.control.sock"
MAX_SOCKET_PATH_BYTES: Final = 107
"""Of a Unix socket's path, as Linux has it."""


class ControlRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a control server says of itself, for `ensure_control_server`, doctors and people.

    Attributes:
        pid: Its process.
        phase: `stopping`: it takes no engine any more, another one must be started.
        version: kvtier's.
        started_s: Unix time.
        unix_target: gRPC target on this host.
        tcp_target: The other one; None where it does not listen on TCP.
        tcp_problem: Why not, where it was to.
        settings: The `control_*` settings that it runs with.
    """

    pid: int
    phase: Literal["starting", "serving", "stopping"]
    version: str
    started_s: float
    unix_target: str
    tcp_target: str | None = None
    tcp_problem: str = ""
    settings: dict[str, str | float | None] = {}


class ControlFiles:
    """The files of a prepared run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.lock_path = run_dir / "kvtier.control.lock"
        self.record_path = run_dir / "kvtier.control.json"
        self.grpc_socket_path = run_dir / GRPC_SOCKET_NAME
        self.link_socket_path = run_dir / LINK_SOCKET_NAME
        self.log_path = run_dir / "kvtier.control.log"

    @classmethod
    def prepare(cls, run_dir: Path) -> ControlFiles:
        """Make the directory if it is missing, and see that sockets can be made there.

        Raises:
            RunDirError: It is not private, or its path is too long.
        """
        files = cls(prepare_run_dir(run_dir))
        paths = (files.grpc_socket_path, files.link_socket_path)
        longest = max(len(os.fsencode(path)) for path in paths)
        if longest > MAX_SOCKET_PATH_BYTES:
            raise RunDirError(
                f"run directory {run_dir}: its sockets' paths would have {longest} bytes and Linux takes "
                f"{MAX_SOCKET_PATH_BYTES}; set KVTIER_RUN_DIR to a shorter path"
            )
        return files

    @property
    def unix_target(self) -> str:
        """The gRPC target for clients of this host and user."""
        return f"unix:{self.grpc_socket_path}"

    def try_lock(self) -> int | None:
        """Return a descriptor that holds the lock until it is closed; None while another one does.

        Raises:
            OSError: The lock file cannot be opened.
        """
        descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def lock_held(self) -> bool:
        """Whether a control server runs, or is about to.

        Looking takes the lock for a moment, which who wants to keep it must expect.
        """
        descriptor = self.try_lock()
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def read_record(self) -> ControlRecord | None:
        """Return what the last server has said of itself; None if nothing, or nothing readable."""
        try:
            return msgspec.json.decode(self.record_path.read_bytes(), type=ControlRecord)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("ignoring the record %s: %s", self.record_path, error)
            return None

    def write_record(self, record: ControlRecord) -> None:
        """Replace the record.

        Raises:
            OSError: It cannot be written.
        """
        descriptor, temporary = tempfile.mkstemp(prefix=".kvtier.control.", dir=self.run_dir)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(record), indent=1))
            Path(temporary).replace(self.record_path)
        except OSError:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise

    def remove_record(self) -> None:
        """Remove the record; the caller holds the lock."""
        self.record_path.unlink(missing_ok=True)
