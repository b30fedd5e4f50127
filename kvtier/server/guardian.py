"""The guardian: a small detached process that owns one LMCache server.

Started by `supervisor.ensure_server` under the election lock; reads the `ServerSpec` from standard
input. It forks, so that it is nobody's child (an engine that kills its process tree must not take
the server of the other engines with it), and its parent returns when the record is published.

It starts the server, publishes its state, restarts it when it crashes while leases exist, and ends
it when no lease has been held for the grace period. If the guardian itself is killed, the kernel
sends the server SIGTERM (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Literal, NoReturn

from kvtier.server.files import ProcessId, ServerFiles, ServerRecord
from kvtier.server.health import is_healthy
from kvtier.server.launch import (
    LOOPBACK,
    SHM_DIR,
    Endpoint,
    ServerSpec,
    installed_versions,
    server_command,
    server_environment,
    shm_free_bytes,
)
from kvtier.server.numa import gpu_nodes, place_memory

POLL_S = 0.5
HEALTH_POLL_S = 0.1
PREDECESSOR_TIMEOUT_S = 15.0
MAX_BACKOFF_S = 10.0
CRASH_WINDOW_S = 60.0
_WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Guardian:
    """State machine around one server process. Times are `time.monotonic()` seconds."""

    def __init__(self, files: ServerFiles, spec: ServerSpec, previous: ServerRecord | None) -> None:
        """Take over from `previous`, the record of a guardian that is gone or stopping."""
        self._files = files
        self._spec = spec
        self._previous_server = previous.server if previous else None
        self._child: subprocess.Popen[bytes] | None = None
        self._lock_descriptor = -1
        self._starts_s: deque[float] = deque()
        self._crashes_in_row = 0
        self._start_due_s = 0.0
        self._started_s = 0.0
        self._lease_seen_s = time.monotonic()
        self._poll_s = max(0.02, min(POLL_S, spec.grace_s / 3))
        self._record = ServerRecord(
            phase="starting",
            detail="guardian started",
            generation=previous.generation + 1 if previous else 1,
            guardian=ProcessId.of(os.getpid()),
            server=None,
            endpoint=_new_endpoint(files),
            spec=spec,
            versions=installed_versions(),
        )

    def publish_first(self) -> None:
        """Write the first record; the starter holds the election lock."""
        self._files.write_record(self._record)

    def run(self) -> int:
        """Guard the server until it is no longer needed. Returns the exit status."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        try:
            if not self._wait_for_predecessor():
                return 1
            while True:
                if not self._keep_server_running():
                    return 1
                if reason := self._reason_to_stop():
                    return self._stop(reason)
                wait_s = self._poll_s
                if self._record.phase != "ready":
                    wait_s = min(wait_s, HEALTH_POLL_S)
                if self._wait_signal(wait_s):
                    return self._stop("told to stop by a signal")
        finally:
            self._end_server()

    def _wait_for_predecessor(self) -> bool:
        """Wait until no guardian or server of this name runs; kill a server left behind."""
        kill_due_s = time.monotonic() + self._spec.stop_timeout_s
        give_up_s = kill_due_s + PREDECESSOR_TIMEOUT_S
        while (descriptor := self._files.try_guardian_lock()) is None:
            now_s = time.monotonic()
            orphan = self._previous_server
            if now_s > kill_due_s and orphan is not None and orphan.alive():
                _log(f"killing the server left behind by an earlier guardian, pid {orphan.pid}")
                _signal_group(orphan.pid, signal.SIGKILL)
            if now_s > give_up_s:
                self._fail(
                    f"an earlier server of this name does not end (it holds "
                    f"{self._files.guardian_lock_path}; `fuser` shows its pid)"
                )
                return False
            if self._wait_signal(HEALTH_POLL_S):
                self._stop("told to stop by a signal")
                return False
        self._lock_descriptor = descriptor
        # Whoever left segments of this run directory and name behind is gone: the lock says so.
        for segment in SHM_DIR.glob(f"{_shm_prefix(self._files)}*"):
            if segment.stat().st_uid == os.geteuid():
                _log(f"removing left-over shared memory {segment}")
                segment.unlink(missing_ok=True)
        return True

    def _keep_server_running(self) -> bool:
        """Start the server when due, notice its death, publish its health. False: given up."""
        now_s = time.monotonic()
        if self._child is None:
            return now_s < self._start_due_s or self._start(now_s)
        if (status := self._child.poll()) is not None:
            return self._crashed(now_s, f"exited with status {status}")
        if self._record.phase == "ready" and not self._has_segment():
            # Engines that have mapped it go on; but no other one could, and what is stored is lost with them.
            return self._crashed(now_s, "has lost its shared memory, which somebody has removed")
        if self._record.phase == "starting":
            if is_healthy(self._record.endpoint.http_port):
                return self._became_ready(now_s)
            if now_s - self._started_s > self._spec.start_timeout_s:
                return self._crashed(now_s, f"not healthy after {self._spec.start_timeout_s:g} s")
        return True

    def _start(self, now_s: float) -> bool:
        while self._starts_s and now_s - self._starts_s[0] > CRASH_WINDOW_S:
            self._starts_s.popleft()
        if len(self._starts_s) >= self._spec.max_starts_per_minute:
            return self._fail(f"crashed {len(self._starts_s)} times in a minute")
        spec = self._spec
        if spec.command is None and shm_free_bytes() < spec.dram_bytes:
            # LMCache would only warn, and then serve without shared memory.
            return self._fail(
                f"{SHM_DIR} has {shm_free_bytes() >> 20} MiB free, the CPU tier needs "
                f"{spec.dram_bytes >> 20} MiB: choose a smaller size or enlarge it "
                "(Docker: --shm-size)"
            )
        if self._started_s:
            self._record = replace(
                self._record,
                generation=self._record.generation + 1,
                endpoint=_new_endpoint(self._files),
            )
        endpoint = self._record.endpoint
        self._starts_s.append(now_s)
        self._started_s = now_s
        guardian_pid, nodes = os.getpid(), gpu_nodes()
        argv = server_command(spec, endpoint)
        _log(f"starting generation {self._record.generation}: {' '.join(argv)}")
        try:
            self._child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                env=server_environment(spec),
                start_new_session=True,
                # The server shares the lock: it counts as running until it is really gone.
                pass_fds=(self._lock_descriptor,),
                preexec_fn=lambda: _become_server(guardian_pid, nodes),  # noqa: PLW1509 - single-threaded
            )
        except OSError as error:
            return self._fail(f"cannot start {argv[0]}: {error}")
        with contextlib.suppress(ProcessLookupError):  # ended already: seen at the next poll
            server = ProcessId.of(self._child.pid)
            self._record = replace(self._record, server=server)
        return self._publish("starting", "server is starting")

    def _became_ready(self, now_s: float) -> bool:
        if not self._has_segment():
            return self._fail(f"the server runs without shared memory; see {self._files.log_path}")
        self._crashes_in_row = 0
        return self._publish("ready", f"healthy after {now_s - self._started_s:.1f} s")

    def _has_segment(self) -> bool:
        """Whether the server's shared memory is there; servers of another command need none."""
        name = self._record.endpoint.shm_name
        return self._spec.command is not None or (SHM_DIR / name).exists()

    def _crashed(self, now_s: float, what: str) -> bool:
        detail = f"server {what}; last output:\n{self._files.log_tail()}"
        _log(f"server {what}")
        self._end_server()
        backoff_s = min(MAX_BACKOFF_S, self._spec.restart_backoff_s * 2**self._crashes_in_row)
        self._crashes_in_row += 1
        self._start_due_s = now_s + backoff_s
        self._record = replace(self._record, server=None)
        return self._publish("starting", f"restart in {backoff_s:g} s: {detail}")

    def _reason_to_stop(self) -> str | None:
        """Return why the server is not needed any more; None while it is."""
        with self._files.election():
            published = self._files.read_record()
            if published is None:
                _log("the state file was lost or damaged; writing it again")
                self._files.write_record(self._record)
            elif published.guardian != self._record.guardian:
                return "another guardian took over"
            elif published.phase == "stopping":
                return "told to stop"
            now_s = time.monotonic()
            if self._files.held_leases():
                self._lease_seen_s = now_s
            elif now_s - self._lease_seen_s >= self._spec.grace_s:
                # Marked under the same lock: who joins from now on starts a server of its own.
                self._record = self._record.with_phase("stopping", "no lease")
                self._files.write_record(self._record)
                return f"no lease for {self._spec.grace_s:g} s"
        return None

    def _publish(self, phase: Literal["starting", "ready", "failed"], detail: str) -> bool:
        """Publish a phase, unless the record now belongs to another guardian or says stop."""
        self._record = self._record.with_phase(phase, detail)
        with self._files.election():
            published = self._files.read_record()
            if published is None or (
                published.guardian == self._record.guardian and published.phase != "stopping"
            ):
                self._files.write_record(self._record)
        return True

    def _fail(self, detail: str) -> Literal[False]:
        """Give up; the record stays to tell the lease holders why."""
        detail = f"{detail}; log: {self._files.log_path}"
        if self._record.detail.startswith("restart in"):
            detail = f"{detail}; {self._record.detail}"
        _log(detail)
        self._publish("failed", detail)
        return False

    def _stop(self, reason: str) -> int:
        _log(f"stopping: {reason}")
        with self._files.election():
            published = self._files.read_record()
            if published is not None and published.guardian == self._record.guardian:
                self._files.write_record(self._record.with_phase("stopping", reason))
        self._end_server()
        with self._files.election():
            published = self._files.read_record()
            if published is not None and published.guardian == self._record.guardian:
                self._files.remove_record()
        return 0

    def _end_server(self) -> None:
        """SIGTERM, then SIGKILL for what is left of the server's session; remove its segment."""
        child, self._child = self._child, None
        if child is None:
            return
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(self._spec.stop_timeout_s)
            except subprocess.TimeoutExpired:
                _log(f"the server ignores SIGTERM for {self._spec.stop_timeout_s:g} s; killing it")
        _signal_group(child.pid, signal.SIGKILL)
        child.wait()
        (SHM_DIR / self._record.endpoint.shm_name).unlink(missing_ok=True)

    @staticmethod
    def _wait_signal(timeout_s: float) -> bool:
        """Wait; True if told to stop. A change of the child's state ends the wait early."""
        info = signal.sigtimedwait(_WATCHED, timeout_s)
        return info is not None and info.si_signo != signal.SIGCHLD


def _become_server(guardian_pid: int, nodes: set[int]) -> None:
    """Run in the server's process before its program: die with the guardian, signals unblocked.

    Its memory comes from ``nodes`` first, if there are any.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != guardian_pid:  # the guardian died before the call above
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
    place_memory(nodes, _libc)


def _new_endpoint(files: ServerFiles) -> Endpoint:
    """Pick two free loopback ports and a new segment name.

    Another process may still take a port: the server then ends and is started on other ports.
    """
    shm_name = f"{_shm_prefix(files)}{uuid.uuid4().hex[:8]}"
    with socket.socket() as first, socket.socket() as second:
        first.bind((LOOPBACK, 0))
        second.bind((LOOPBACK, 0))
        return Endpoint(first.getsockname()[1], second.getsockname()[1], shm_name)


def _shm_prefix(files: ServerFiles) -> str:
    """Return the prefix of this server's segments. LMCache requires its first part."""
    place = uuid.uuid5(uuid.NAMESPACE_URL, f"{files.run_dir}/{files.name}").hex[:12]
    return f"lmcache_l1_pool_kvtier_{place}_"


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _log(message: str) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{stamp} kvtier guardian {os.getpid()}: {message}", flush=True)  # noqa: T201 - its log


def main(argv: list[str] | None = None) -> int:
    """Detach a guardian. Returns 0 as soon as it has published its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args(argv)
    spec = ServerSpec.from_json(sys.stdin.read())
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.close(read_end)
        _run_detached(ServerFiles(arguments.run_dir, arguments.name), spec, write_end)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        problem = answer.read()
    if problem != "published":
        sys.stderr.write(problem or "the guardian died before it published its state")
        return 1
    return 0


def _run_detached(files: ServerFiles, spec: ServerSpec, write_end: int) -> NoReturn:
    """Be the guardian: publish, detach from the starter's files, run, exit."""
    status = 1
    try:
        os.chdir("/")
        guardian = Guardian(files, spec, files.read_record())
        guardian.publish_first()
        if files.log_path.exists():
            files.log_path.replace(files.log_path.with_suffix(".log.1"))
        log = os.open(files.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.write(write_end, b"published")
        os.close(write_end)
        write_end = -1
        status = guardian.run()
    except BaseException:  # noqa: BLE001 - last resort: the text goes to the starter or to the log
        text = traceback.format_exc()
        if write_end >= 0:
            os.write(write_end, text.encode())
        else:
            _log(text)
    finally:
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
