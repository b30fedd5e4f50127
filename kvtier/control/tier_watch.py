"""Looks whether the host's LMCache server runs: an idle engine, which runs no hooks, does not notice its end.

The server's guardian keeps a record in the run directory. Where that tells that the server has gone, or that
it is another one than before, engines that said that their CPU tier works count as without one until they
say so anew. Until a server has been seen to run, what engines say holds: they may have been given another one
(`lmcache_url`), and the record may be an old one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.server.files import SERVER_NAME, ProcessId, ServerFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvtier.control.registry import EngineRecord, Registry
    from kvtier.server.files import ServerRecord


class TierWatch:
    """See the module's docstring.

    Args:
        run_dir: The run directory.
        registry: Its engines' tiers are marked.
        changed: Told of each engine whose tier has gone by that.
    """

    def __init__(
        self, run_dir: Path, registry: Registry, changed: Callable[[EngineRecord], None]
    ) -> None:
        self._files = ServerFiles(run_dir, SERVER_NAME)
        self._registry = registry
        self._changed = changed
        self._record: ServerRecord | None = None
        self._stamp: tuple[int, int] | None = None
        self._last_seen: ProcessId | None = None

    def look(self) -> None:
        """Look once.

        Raises:
            OSError: The record cannot be read.
        """
        self._read()
        if self._record is None:
            return
        server = self._record.server
        if self._record.phase in {"starting", "failed"} or server is None or not server.alive():
            server = None
        before = self._last_seen
        if server is not None:
            self._last_seen = server
        if before is None:
            return
        self._registry.tier_server_runs = server is not None
        if server != before:
            for engine in self._registry.tier_lost():
                self._changed(engine)

    def _read(self) -> None:
        """Read the record where it has changed. While there is none that can be read, the last one holds."""
        try:
            found = self._files.record_path.stat()
        except FileNotFoundError:
            return
        stamp = found.st_ino, found.st_mtime_ns
        if stamp != self._stamp:
            self._stamp = stamp
            self._record = self._files.read_record() or self._record
