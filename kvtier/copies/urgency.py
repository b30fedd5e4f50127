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

URGENT: Final = -5
"""Added to the thread's niceness: three quarters of a core that two share.

More would keep a model's thread on the same core from its work for as long as the copy takes, and
with it the step.
"""
LEAST_NICENESS: Final = -20


class Urgency:
    """Raises the priority of the thread that made it, for as long as it is told.

    That takes ``CAP_SYS_NICE`` or a limit on niceness that allows it; without, nothing changes.
    """

    def __init__(self) -> None:
        """Find out how nice this thread is. Linux has priorities by thread."""
        self._thread = threading.get_native_id()
        try:
            self._usual = os.getpriority(os.PRIO_PROCESS, self._thread)
            self._allowed = True
        except OSError:
            self._usual, self._allowed = 0, False

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Go first meanwhile. Only from the thread that made it."""
        if not (self._allowed and self._raise()):
            yield
            return
        try:
            yield
        finally:
            # To be nicer is allowed to everybody.
            os.setpriority(os.PRIO_PROCESS, self._thread, self._usual)

    def _raise(self) -> bool:
        niceness = max(self._usual + URGENT, LEAST_NICENESS)
        try:
            os.setpriority(os.PRIO_PROCESS, self._thread, niceness)
        except OSError as error:
            self._allowed = False
            logger.info("reloads share their core evenly with other threads: %s", error)
        return self._allowed
