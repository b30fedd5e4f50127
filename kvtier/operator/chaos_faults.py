"""The faults of `kvtier chaos`: which of kvtier's own processes gets which signal.

Processes are found by what they say of themselves in kvtier's run directory, and checked to be the very ones
before they are touched. No other process is ever signalled.

What looks into the run directory is imported when a fault is injected, so that `kvtier --help` stays quick.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SERVER_NAME: Final = "kvtier"
"""Of the host's LMCache server: `kvtier.assembly.SERVER_NAME`."""
_SIDECAR: Final = "kvtier.control.sidecar"

Part = Literal["server", "guardian", "control"]


class NotThereError(Exception):
    """The process that a fault is for does not run here."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        name: Its name on the command line.
        part: Whom it hits.
        number: The signal.
        holds: Whether it lasts until it is undone.
        effect: What is to be expected, for the help.
    """

    name: str
    part: Part
    number: signal.Signals
    holds: bool
    effect: str

    @property
    def loses_staged_kv(self) -> bool:
        """Whether the LMCache server is another one after it."""
        return self.part != "control" and not self.holds


FAULTS: Final = {
    fault.name: fault
    for fault in (
        Fault(
            "lmcache-kill",
            "server",
            signal.SIGKILL,
            holds=False,
            effect="The LMCache server is killed. Its guardian starts another one; staged KV is gone.",
        ),
        Fault(
            "lmcache-restart",
            "server",
            signal.SIGTERM,
            holds=False,
            effect="The LMCache server ends in good order. Its guardian starts another one.",
        ),
        Fault(
            "lmcache-stop",
            "server",
            signal.SIGSTOP,
            holds=True,
            effect="The LMCache server hangs for --hold. Engines give it up after 5 s and pin only.",
        ),
        Fault(
            "guardian-kill",
            "guardian",
            signal.SIGKILL,
            holds=False,
            effect="The LMCache server's guardian is killed, and the server ends with it. An engine that is "
            "at work has both started again after 15 s.",
        ),
        Fault(
            "control-kill",
            "control",
            signal.SIGKILL,
            holds=False,
            effect="The control server is killed. An engine that is at work starts it again within a minute.",
        ),
        Fault(
            "control-stop",
            "control",
            signal.SIGSTOP,
            holds=True,
            effect="The control server hangs for --hold. Engines go on; clients wait.",
        ),
    )
}


class Victim:
    """A process of kvtier's that cannot be mistaken for another one; use it in a `with` block."""

    def __init__(self, run_dir: Path, part: Part) -> None:
        """Find the process.

        Raises:
            NotThereError: It does not run.
        """
        self.pid, is_it = _control(run_dir) if part == "control" else _keeper(run_dir, part)
        try:
            self._descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError as error:
            raise NotThereError(f"process {self.pid} has just ended") from error
        # From here on the number means this process: was it the one that was looked for?
        if not is_it():
            self.close()
            raise NotThereError(f"process {self.pid} is not kvtier's any more")

    def send(self, number: signal.Signals) -> None:
        """Signal it.

        Raises:
            NotThereError: It has ended.
        """
        try:
            signal.pidfd_send_signal(self._descriptor, number)
        except ProcessLookupError as error:
            raise NotThereError(f"process {self.pid} has ended") from error

    def close(self) -> None:
        """Forget it."""
        os.close(self._descriptor)


def _keeper(run_dir: Path, part: Part) -> tuple[int, Callable[[], bool]]:
    """The LMCache server or its guardian."""
    from kvtier.server.files import ServerFiles  # noqa: PLC0415 - see above

    record = ServerFiles(run_dir, SERVER_NAME).read_record()
    process = None
    if record is not None:
        process = record.server if part == "server" else record.guardian
    if process is None or not process.alive():
        what = "LMCache server" if part == "server" else "guardian of an LMCache server"
        raise NotThereError(f"no {what} that kvtier started runs in {run_dir}")
    return process.pid, process.alive


def _control(run_dir: Path) -> tuple[int, Callable[[], bool]]:
    import psutil  # noqa: PLC0415 - see above

    from kvtier.control.files import ControlFiles  # noqa: PLC0415

    files = ControlFiles(run_dir)
    record = files.read_record()
    if record is None or not files.lock_held():
        raise NotThereError(f"no control server runs in {run_dir}")
    pid = record.pid

    def is_it() -> bool:
        try:
            words = psutil.Process(pid).cmdline()
        except psutil.Error:
            return False
        return _SIDECAR in words and str(run_dir) in words

    return pid, is_it
