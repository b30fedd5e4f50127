"""A thread that copies what a request waits for goes before others on its core, where the system lets it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

URGENT: Final = -15
"""Added to the thread's niceness. A copy of some milliseconds beside a thread of the same niceness may take twice as long."""
LEAST_NICENESS: Final = -20


class Urgency:
    """Raises the priority of the thread that made it, for as long as it is told.

    That takes ``CAP_SYS_NICE`` (a container: ``--cap-add SYS_NICE``) or a limit on niceness that allows
    it; without, nothing changes.
    """

    def __init__(self) -> None:
        """Find out how nice this thread is. Linux has priorities by thread."""
        self._thread = threading.get_native_id()
        self._usual = os.getpriority(os.PRIO_PROCESS, self._thread)
        self._allowed = True

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Go first meanwhile. Only from the thread that made it."""
        if not (self._allowed and self._set(max(self._usual + URGENT, LEAST_NICENESS))):
            yield
            return
        try:
            yield
        finally:
            self._set(self._usual)

    def _set(self, niceness: int) -> bool:
        try:
            os.setpriority(os.PRIO_PROCESS, self._thread, niceness)
        except OSError as error:
            self._allowed = False
            logger.info("reloads share their core evenly with other threads: %s", error)
        return self._allowed
