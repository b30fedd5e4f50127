"""Turns as JSON lines for `kvtier replay`: sizes, times and hashes, and nothing that was said.

Off unless a path is configured. Names, tools and content are hashed with a key that is drawn anew at each start
and kept nowhere, so a file tells which turns share a prompt's beginning, but not what it was, and two files tell
nothing of each other.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from kvtier.turns.json_lines import JsonLines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvtier.turns.turn import Turn

FORMAT: Final = 1
UNIT_TOKENS: Final = 64
"""Content is told in units of about so many tokens: whole KV blocks, one at least."""
REMEMBERED_PROGRAMS: Final = 1024
"""Programs whose last prompt is known, so that only what is new is written; others' are written whole."""
_DIGEST_BYTES: Final = 6


class TurnRecorder:
    """Appends to a file; a full disk turns it off, not the engine."""

    def __init__(self, path: Path | None, block_tokens: int) -> None:
        self._stride = max(1, UNIT_TOKENS // block_tokens)
        self._unit_tokens = self._stride * block_tokens
        self._key = secrets.token_bytes(32)
        self._last: OrderedDict[str, list[int]] = OrderedDict()
        self._lines = JsonLines(path, "recording")

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return self._lines.enabled

    def write(self, turn: Turn, tool: str | None, ended_s: float) -> None:
        """Write one turn: when it came and ended, how long it was, and which content it began with.

        `units` are the contents of the prompt's units from `kept` on; those before are the ones that the program's
        last line told.
        """
        if not self._lines.enabled:
            return
        request = turn.request
        n_units = int(request.num_prompt_tokens) // self._unit_tokens
        units = self._units(request.block_hashes, n_units)
        before = self._last.pop(turn.program, [])
        kept = 0
        while kept < min(len(before), len(units)) and before[kept] == units[kept]:
            kept += 1
        self._last[turn.program] = units
        if len(self._last) > REMEMBERED_PROGRAMS:
            self._last.popitem(last=False)
        line = {
            "kvtier_turn": FORMAT,
            "program": self._hash(turn.program.encode("utf-8", "surrogatepass")).hex(),
            "arrived_s": round(turn.arrived_s, 3),
            "ended_s": round(ended_s, 3),
            "prompt_tokens": int(request.num_prompt_tokens),
            "output_tokens": int(request.num_output_tokens),
            "tool": None if tool is None else self._hash(tool.encode()).hex(),
            "unit_tokens": self._unit_tokens,
            "kept": kept,
            "units": units[kept:],
        }
        self._lines.write(line)

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._lines.close()

    def _units(self, block_hashes: Sequence[bytes], n_units: int) -> list[int]:
        # A block's hash covers everything up to its end, so that of a unit's last block tells all of it.
        lasts = block_hashes[self._stride - 1 : n_units * self._stride : self._stride]
        return [int.from_bytes(self._hash(bytes(one)), "big") for one in lasts]

    def _hash(self, content: bytes) -> bytes:
        return blake2b(content, key=self._key, digest_size=_DIGEST_BYTES).digest()
