"""When a call that failed is sent again: only what is idempotent, only on UNAVAILABLE, within its timeout."""

from __future__ import annotations

import random
import time
from typing import Final

from kvtier.client.errors import ControlError, Unavailable

RETRIES: Final = 3
FIRST_DELAY_S: Final = 0.1
"""Doubled with each try; up to half of it is left out at random, so that clients do not come at once."""


class Attempts:
    """The tries of one call."""

    def __init__(self, timeout_s: float, *, retry: bool) -> None:
        """Begin: all tries together have `timeout_s` seconds."""
        self._deadline_s = time.monotonic() + timeout_s
        self._delays_s = [FIRST_DELAY_S * 2**n for n in range(RETRIES if retry else 0)]

    def left_s(self) -> float:
        """Time left, seconds; never negative."""
        return max(0.0, self._deadline_s - time.monotonic())

    def delay_after(self, error: ControlError) -> float | None:
        """Seconds to wait before the next try; None: there is none."""
        if not isinstance(error, Unavailable) or not self._delays_s:
            return None
        delay_s = self._delays_s.pop(0) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        delay_s = max(delay_s, error.retry_after_s or 0.0)
        return delay_s if delay_s < self.left_s() else None
