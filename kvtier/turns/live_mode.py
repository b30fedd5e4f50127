"""On, shadow or off - also while the engine runs.

A switch file, when configured, is looked at about once a second: its content (`on`, `shadow` or `off`)
is the mode. An operator turns kvtier off with `echo off > FILE`, without a restart.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
_MAX_SWITCH_BYTES = 64


class Mode(StrEnum):
    """`shadow` decides and logs but changes nothing."""

    ON = "on"
    SHADOW = "shadow"
    OFF = "off"

    @property
    def level(self) -> int:
        """0 off, 1 shadow, 2 on: the metric's value."""
        return {"off": 0, "shadow": 1, "on": 2}[self.value]


class LiveMode:
    """The configured mode, overridden by the switch file where it exists."""

    def __init__(self, configured: Mode, switch_file: Path | None = None) -> None:
        self._configured = configured
        self._switch_file = switch_file
        self._next_check_s = float("-inf")
        self._complained: str | None = None
        self.mode = configured

    def can_set(self, mode: Mode) -> bool:
        """Whether a command can set the mode; not where a switch file says otherwise."""
        return self._switch_file is None or not self._switch_file.exists() or self._read() is mode

    def set(self, mode: Mode) -> None:
        """An operator's command, see `can_set`: as if `mode` were configured."""
        if mode is not self.mode:
            logger.warning("kvtier mode is now %s (was %s), by command", mode, self.mode)
        self._configured = self.mode = mode

    def refresh(self, now_s: float) -> Mode:
        """The mode at `now_s`; reads the file at most once in `CHECK_INTERVAL_S`."""
        if self._switch_file is None or now_s < self._next_check_s:
            return self.mode
        self._next_check_s = now_s + CHECK_INTERVAL_S
        wanted = self._read()
        if wanted is not self.mode:
            logger.warning("kvtier mode is now %s (was %s)", wanted, self.mode)
            self.mode = wanted
        return self.mode

    def _read(self) -> Mode:
        assert self._switch_file is not None
        try:
            with self._switch_file.open(encoding="utf-8", errors="replace") as file:
                text = file.read(_MAX_SWITCH_BYTES).strip().lower()
        except FileNotFoundError:
            return self._configured
        except OSError as error:
            self._complain(f"cannot read {self._switch_file}: {error}")
            return self.mode
        try:
            return Mode(text)
        except ValueError:
            self._complain(f"{self._switch_file} holds {text!r}; accepted: on, shadow, off")
            return self.mode

    def _complain(self, message: str) -> None:
        if message != self._complained:
            self._complained = message
            logger.error("%s; staying %s", message, self.mode)
