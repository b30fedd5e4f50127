"""Writes TTL overrides to their file as they change, without holding up the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.control.override_book import OverrideBook
    from kvtier.control.override_file import OverrideFile


class OverrideSaver:
    """One writer at a time; changes that come meanwhile are written together.

    Args:
        book: The overrides.
        file: Their file.
        failed: Called for each time that they could not be written.
    """

    def __init__(self, book: OverrideBook, file: OverrideFile, failed: Callable[[], None]) -> None:
        self._book = book
        self._file = file
        self._failed = failed
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[bool]] = set()
        self._saved_version = book.version

    async def save(self) -> bool:
        """Write what holds now, unless somebody has; False if that is not possible."""
        task = asyncio.create_task(self._save(self._book.version))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # The caller may go away; the file is written nevertheless, and by one thread at a time.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Wait for what is being written."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _save(self, wanted: int) -> bool:
        async with self._lock:
            if self._saved_version >= wanted:
                return True
            version, overrides = self._book.version, self._book.all()
            saved = await asyncio.to_thread(self._file.write, overrides)
            if saved:
                self._saved_version = version
            else:
                self._failed()
            return saved
