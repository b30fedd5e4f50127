"""A file to which JSON lines are appended; a full disk ends it, not the engine."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


class JsonLines:
    """Appends objects, one a line; without a path it does nothing."""

    def __init__(self, path: Path | None, what: str) -> None:
        """Open the file; `what` names it in the log.

        Raises:
            OSError: It cannot be opened.
        """
        self._what = what
        self._file: TextIO | None = None
        if path is not None:
            self._file = path.open("a", encoding="utf-8", buffering=1)

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return self._file is not None

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            logger.warning("%s off: %s", self._what, error)
            self._file = None

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None
