"""Reads files that somebody else has put in their place, whatever that is."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class FileContentError(Exception):
    """The file is none that can be read as a whole; the message says why."""


def read_regular_file(path: Path, max_bytes: int) -> tuple[bytes, os.stat_result]:
    """Return a file's content and what it is.

    Raises:
        OSError: It cannot be opened or read.
        FileContentError: It is a directory or a pipe, say, or longer than `max_bytes`.
    """
    # A named pipe would be waited for, else.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise FileContentError("it is not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise FileContentError(f"it has more than {max_bytes} bytes")
    return content, found
