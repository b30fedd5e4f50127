"""Whether a host's server can be used, as its record tells."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from kvtier.server.launch import SupervisorError

if TYPE_CHECKING:
    from kvtier.server.files import ServerRecord


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


def usable(record: ServerRecord) -> bool:
    """Whether an engine may join this server."""
    return record.phase in {"starting", "ready"} and record.guardian.alive()


def state_of(record: ServerRecord, gone: str | None = None) -> ServerState:
    """Read a record; `gone` says why there is none, where that was seen after it."""
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
