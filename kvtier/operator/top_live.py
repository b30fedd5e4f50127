"""The live view of `kvtier top`: frames on the terminal's second screen, until a key ends it."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.live import Live

from kvtier.client import ControlError
from kvtier.operator.command import describe_failure
from kvtier.operator.top_frame import frame
from kvtier.operator.top_view import collect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvtier.operator.command import Session
    from kvtier.operator.top_view import Decisions, View


def show_live(session: Session, decisions: Decisions, view: View, interval_s: float) -> None:
    """Draw a frame every so many seconds, until q or Ctrl-C."""
    with (
        suppress(KeyboardInterrupt),
        _keys() as pressed,
        Live(console=session.console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            live.update(frame(view), refresh=True)
            if pressed(interval_s) == "q":
                return
            view = _next(session, decisions, view)


def _next(session: Session, decisions: Decisions, view: View) -> View:
    """Collect anew; where the server is away, show the old figures and say so."""
    try:
        return collect(session.client, decisions)
    except ControlError as error:
        message, _ = describe_failure(error, view.where, session.timeout_s)
        return replace(view, trouble=f"old figures: {message}")


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Give a function that waits so many seconds for a key; "" where none was pressed."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)

    def pressed(wait_s: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], wait_s)
        # Nothing to read from a terminal that is ready: it has gone.
        return (os.read(descriptor, 1) or b"q").decode(errors="replace") if ready else ""

    try:
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _sleep(wait_s: float) -> str:
    time.sleep(wait_s)
    return ""
