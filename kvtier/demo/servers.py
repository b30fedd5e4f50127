"""Server processes of the demo: started, awaited, and stopped without leaving any behind.

Every process gets a group of its own and an environment variable that names the run. The
group is stopped at the end of an arm; whatever else carries the run's name by then (a
server that detached itself) is stopped too. If the demo itself is killed,
:mod:`kvtier.serving.child_process` stops the groups.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
import psutil

from kvtier.server.launch import LOOPBACK
from kvtier.serving.child_process import tied_to_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

# Not KVTIER_...: those are settings of the connector, and an unknown one stops it.
_RUN_VARIABLE = "DEMO_RUN_ID"
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.25
_LOG_TAIL_LINES = 20
_MAX_LINE_CHARS = 400
_MAX_CAUSES = 3
_CAUSE = re.compile(r"\b\w*(Error|Exception): ")


class ServerError(RuntimeError):
    """A server did not start or ended early; the message holds the end of its log."""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nothing listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Server:
    """One server process in its own process group, logging to a file."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path
    ) -> None:
        """Start the process. ``command`` is searched on PATH, this Python's scripts first."""
        self.name = name
        self._log = log
        scripts = str(Path(sys.executable).parent)
        path = os.pathsep.join(filter(None, (scripts, env.get("PATH", os.defpath))))
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                tied_to_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**env, "PATH": path},
                start_new_session=True,
            )

    def wait_healthy(self, url: str, on_wait: Callable[[float], None]) -> None:
        """Return once ``url`` answers 200.

        Args:
            url: Health check of this server.
            on_wait: Called between checks with the seconds waited so far.

        Raises:
            ServerError: the process ended, or it was not healthy in time.
        """
        started_s = time.monotonic()
        with httpx.Client(timeout=2.0, trust_env=False) as client:
            while True:
                self.check()
                with suppress(httpx.TransportError):
                    if client.get(url).status_code == httpx.codes.OK:
                        return
                waited_s = time.monotonic() - started_s
                if waited_s > _START_TIMEOUT_S:
                    raise ServerError(self._report(f"was not healthy after {waited_s:.0f} s"))
                on_wait(waited_s)
                time.sleep(_POLL_S)  # nothing signals that a server listens

    def check(self) -> None:
        """Raise :class:`ServerError` if the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerError(self._report(f"ended with exit status {code}"))

    def stop(self) -> None:
        """End the whole group: SIGTERM, then SIGKILL to whatever is left."""
        self._signal_group(signal.SIGTERM)
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_STOP_TIMEOUT_S)
        while self._group_alive() and time.monotonic() < deadline_s:
            time.sleep(0.05)  # the group's members are not all children of this process
        self._signal_group(signal.SIGKILL)
        self._process.wait()

    def _group_alive(self) -> bool:
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _report(self, what: str) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        # vLLM's cause stands far above its last traceback.
        causes = [line[:_MAX_LINE_CHARS] for line in lines if _CAUSE.search(line)][:_MAX_CAUSES]
        tail = [line[:_MAX_LINE_CHARS] for line in lines[-_LOG_TAIL_LINES:]]
        return "\n    ".join(
            [f"{self.name} {what}. First errors in {self._log}:", *causes, "Its end:", *tail]
        )


class ServerGroup:
    """The servers of one arm; leaving the context stops them all, last started first."""

    def __init__(self, work_dir: Path) -> None:
        """Prepare; logs and run-time files go to ``work_dir``."""
        self._work_dir = work_dir
        self._run = uuid.uuid4().hex
        self._servers: list[Server] = []

    def __enter__(self) -> Self:
        """Nothing runs yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop everything."""
        for server in reversed(self._servers):
            server.stop()
        _stop_run(self._run)

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Server:
        """Start one server of this arm."""
        log = self._work_dir / f"{name.replace(' ', '-')}.log"
        server = Server(name, command, {**env, _RUN_VARIABLE: self._run}, log)
        self._servers.append(server)
        return server

    def check(self) -> None:
        """Raise :class:`ServerError` if one of the servers has ended."""
        for server in self._servers:
            server.check()


def _stop_run(run: str) -> None:
    """Stop processes of the run that left their group."""
    left = list(_processes_of(run))
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(left, timeout=_STOP_TIMEOUT_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_STOP_TIMEOUT_S)


def _processes_of(run: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            if process.pid != os.getpid() and process.environ().get(_RUN_VARIABLE) == run:
                yield process
