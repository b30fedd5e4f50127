"""What the client and its twin for asyncio share: their connection, and the log of announcements."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from kvtier.client.connection import Connection

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger("kvtier.client")

DEFAULT_TIMEOUT_S: Final = 5.0
ANNOUNCE_TIMEOUT_S: Final = 1.0
"""Longest time that `tool_call` lets a control server delay an agent, before a tool and after it."""


class BaseClient:
    """A connection and a timeout.

    Args:
        target: "HOST:PORT", "unix:PATH" or an absolute path. Default: KVTIER_CONTROL_TARGET, else the Unix
            socket in the run directory (KVTIER_RUN_DIR) if it is there, else 127.0.0.1:7461.
        token_file: Holds a bearer token. Default: KVTIER_CONTROL_TOKEN_FILE. Read at each call.
        tls: Encrypt TCP, and check the server by the system's certificates unless `tls_ca` is given.
        tls_ca: File with the certificates (PEM) to check the server by; implies `tls`.
        tls_cert: File with the client's own certificate (PEM), for mutual TLS; with `tls_key`.
        tls_key: File with its key (PEM).
        timeout_s: Longest duration of one call, its retries included, seconds.
        connection: All of the above but the timeout, resolved already.

    Raises:
        ClientConfigError: see `Connection.resolve`.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token_file: str | Path | None = None,
        tls: bool = False,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        connection: Connection | None = None,
    ) -> None:
        self.connection = connection or Connection.resolve(
            target,
            token_file=token_file,
            tls=tls,
            tls_ca=tls_ca,
            tls_cert=tls_cert,
            tls_key=tls_key,
        )
        self._timeout_s = timeout_s
        self._announcements_fail = False
        # Threads may share a client: they open one channel.
        self._opening = threading.Lock()

    def _announced(self, what: str, name: str, error: Exception | None) -> None:
        """Log what became of an announcement: one warning when they begin to fail, not one for each."""
        if error is None:
            self._announcements_fail = False
            return
        level = logging.DEBUG if self._announcements_fail else logging.WARNING
        self._announcements_fail = True
        logger.log(
            level,
            "%s of %s was not announced, the agent goes on: %s: %s",
            what,
            name,
            self.connection,
            error,
        )
