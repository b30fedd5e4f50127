"""Decisions as JSON lines, for the demo and for whoever wants to know why.

Off unless a path is configured: then one line per decision, with the program's and the request's id.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kvtier.turns.json_lines import JsonLines

if TYPE_CHECKING:
    from pathlib import Path

    from kvtier.turns.happenings import Happenings


class DecisionLog:
    """Appends to a file; a full disk turns it off, not the engine. Tells `follower` the same, if there is one."""

    def __init__(self, path: Path | None, follower: Happenings | None = None) -> None:
        self._lines = JsonLines(path, "decision log")
        self._follower = follower

    @property
    def enabled(self) -> bool:
        """Whether anybody wants to know."""
        return self._lines.enabled or self._follower is not None

    def write(self, event: str, program: str, request_id: str, entry: dict[str, Any]) -> None:
        """Write one line: ts_s (Unix time), event, program, request_id and `entry`'s fields."""
        if self._follower is not None:
            self._follower.decided(event, program, request_id, entry)
        if self._lines.enabled:
            line = {"ts_s": time.time(), "event": event, "program": program}
            self._lines.write(line | {"request_id": request_id} | entry)

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._lines.close()
