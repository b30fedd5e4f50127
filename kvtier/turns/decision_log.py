"""Decisions as JSON lines, for the demo and for whoever wants to know why.

Off unless a path is configured: then one line per decision, with the program's and the request's id.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


class DecisionLog:
    """Appends to a file; a full disk turns it off, not the engine."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        if path is not None:
            self._file = path.open("a", encoding="utf-8", buffering=1)

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return self._file is not None

    def write(self, event: str, program: str, request_id: str, entry: dict[str, Any]) -> None:
        """Write one line: ts_s (Unix time), event, program, request_id and `entry`'s fields."""
        if self._file is None:
            return
        line = {"ts_s": time.time(), "event": event, "program": program, "request_id": request_id}
        try:
            self._file.write(json.dumps(line | entry) + "\n")
        except OSError as error:
            logger.warning("decision log off: %s", error)
            self._file = None

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None
