"""Copies that a test holds back."""

from __future__ import annotations

import threading

from tests.engine.tier_probe import WAIT_S


class HeldCopies:
    """Holds the copy thread back before a copy."""

    def __init__(self) -> None:
        self._begun, self._go = threading.Event(), threading.Event()

    def hold(self) -> None:
        """In the copy thread: wait to be let go."""
        self._begun.set()
        self._go.wait(WAIT_S)

    def await_begun(self) -> None:
        """Wait for a copy to be under way: an order that still waits is cancelled at once, unlike this one."""
        assert self._begun.wait(WAIT_S), "no copy began"

    def set(self) -> None:
        """Let the copies go."""
        self._go.set()
