"""The log of a process that nobody watches: a file that does not grow without end."""

from __future__ import annotations

import logging
import os
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from io import TextIOWrapper
    from pathlib import Path

MAX_BYTES: Final = 4 << 20
"""Of the file, and of the one before it."""
_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LogFile(RotatingFileHandler):
    """A log file and the one before; standard output and error go into it, too.

    Args:
        path: Of the file.
        take_over: Whether descriptors 1 and 2 are to follow.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path, *, take_over: bool) -> None:
        self._take_over = take_over
        super().__init__(path, maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8")
        self.setFormatter(logging.Formatter(_FORMAT))

    def _open(self) -> TextIOWrapper:
        """Open the file, as at each new one."""
        stream = super()._open()
        os.chmod(self.baseFilename, 0o600)  # noqa: PTH101 - a name is what the base class has
        if self._take_over:
            for descriptor in (1, 2):
                os.dup2(stream.fileno(), descriptor)
        return stream

    def trim(self) -> None:
        """Begin a new file if what others have written made this one too long."""
        self.acquire()
        try:
            if os.path.getsize(self.baseFilename) > MAX_BYTES:  # noqa: PTH202
                self.doRollover()
        except FileNotFoundError:
            self.doRollover()
        finally:
            self.release()
