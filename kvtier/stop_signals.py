"""Signals that end a command as Ctrl-C does, so that it undoes what it has begun."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def as_interrupt(*numbers: signal.Signals) -> Iterator[None]:
    """Turn these signals into KeyboardInterrupt. For the main thread."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = [(number, signal.signal(number, interrupt)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
