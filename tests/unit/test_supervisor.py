"""The supervisor with a fake server: real processes, locks and signals, no LMCache."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from kvtier.server import launch as server_launch
from kvtier.server.files import ProcessId, ServerFiles, ServerRecord
from kvtier.supervisor import (
    ServerFailedError,
    ServerLease,
    ServerSpec,
    ServerState,
    ServerStatus,
    ServerTimeoutError,
    SpecMismatchError,
    ensure_server,
    status,
    stop_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.synchronize import Barrier

DEADLINE_S = 20.0
FAKE_SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
FAKE_COMMAND = (sys.executable, "-S", "-c", FAKE_SERVER, "{http_port}")
spawn = multiprocessing.get_context("spawn")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll until `condition` holds; fail the test at the deadline."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"timed out waiting until {what}")
        time.sleep(0.01)


def make_spec(**changes: object) -> ServerSpec:
    """Return a spec of the fake server."""
    fields: dict[str, object] = {
        "chunk_tokens": 64,
        "dram_bytes": 1 << 28,
        "grace_s": 0.3,
        "restart_backoff_s": 0.02,
        "command": FAKE_COMMAND,
    }
    return ServerSpec(**(fields | changes))  # type: ignore[arg-type]


def read_record(run_dir: Path) -> ServerRecord:
    """Return the published record of the default server."""
    record = ServerFiles(run_dir, "default").read_record()
    assert record is not None
    return record


def server_of(run_dir: Path) -> ProcessId:
    """Return the running server process."""
    server = read_record(run_dir).server
    assert server is not None
    return server


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """Return a run directory; whatever still runs there is killed at the end."""
    path = tmp_path / "run"
    yield path
    if not path.exists() or path.is_symlink():
        return
    for summary in status(path):
        for pid in (summary.guardian_pid, summary.server_pid):
            if pid is not None and pid != os.getpid():
                os.kill(pid, signal.SIGKILL)


def hold_in_process(run_dir: str, barrier: Barrier | None, answers: object, end: object) -> None:
    """Child process: take a lease, tell about it, hold it until told."""
    if barrier is not None:
        barrier.wait(DEADLINE_S)
    with ensure_server(make_spec(), run_dir=Path(run_dir), owner="child") as lease:
        state = lease.wait_ready(DEADLINE_S)
        server = server_of(Path(run_dir))
        answers.put((state.url, state.generation, server.pid))  # type: ignore[attr-defined]
        end.wait(DEADLINE_S)  # type: ignore[attr-defined]


def test_two_processes_at_once_get_one_server(run_dir: Path) -> None:
    barrier, answers, end = spawn.Barrier(2), spawn.Queue(), spawn.Event()
    children = [
        spawn.Process(target=hold_in_process, args=(str(run_dir), barrier, answers, end))
        for _ in range(2)
    ]
    for child in children:
        child.start()
    first, second = answers.get(timeout=DEADLINE_S), answers.get(timeout=DEADLINE_S)
    assert first == second
    # Not even for a moment was there a second one.
    assert ServerFiles(run_dir, "default").log_path.read_text().count("starting generation") == 1
    assert not (run_dir / "default.log.1").exists()
    (summary,) = status(run_dir)
    assert sorted(summary.lease_pids) == sorted(child.pid for child in children if child.pid)
    assert summary.state.status is ServerStatus.READY
    guardian = read_record(run_dir).guardian
    end.set()
    for child in children:
        child.join(DEADLINE_S)
        assert child.exitcode == 0
    wait_until(lambda: not guardian.alive(), "the guardian ends after the last lease")


def test_killed_holder_releases_its_lease_and_spares_the_other(run_dir: Path) -> None:
    answers, end = spawn.Queue(), spawn.Event()
    child = spawn.Process(target=hold_in_process, args=(str(run_dir), None, answers, end))
    child.start()
    answers.get(timeout=DEADLINE_S)
    lease = ensure_server(make_spec(), run_dir=run_dir, owner="other")
    guardian, server = read_record(run_dir).guardian, server_of(run_dir)
    assert len(status(run_dir)[0].lease_pids) == 2

    # An engine may kill its whole process tree at its end: the guardian must not be part of it.
    tree = {process.pid for process in psutil.Process(child.pid).children(recursive=True)}
    assert not tree & {guardian.pid, server.pid}
    child.kill()
    child.join(DEADLINE_S)
    assert status(run_dir)[0].lease_pids == (os.getpid(),)
    assert guardian.alive()
    assert server.alive()
    assert lease.state().status is ServerStatus.READY

    lease.close()
    wait_until(lambda: not guardian.alive() and not server.alive(), "all processes end")
    assert ServerFiles(run_dir, "default").read_record() is None
    assert lease.state().status is ServerStatus.FAILED


def test_server_outlives_a_gap_shorter_than_the_grace(run_dir: Path) -> None:
    spec = make_spec(grace_s=60.0)
    with ensure_server(spec, run_dir=run_dir, owner="first") as lease:
        first = lease.wait_ready(DEADLINE_S)
    with ensure_server(spec, run_dir=run_dir, owner="second") as lease:
        assert lease.state() == first


def hold_with_descendants(run_dir: str, ready: object) -> None:
    """Child process: take a lease, fork, start a program, and wait to be killed."""
    ensure_server(make_spec(), run_dir=Path(run_dir), owner="child")
    pids = [os.fork()]
    if pids[0] == 0:
        signal.pause()
    # All descriptors without O_CLOEXEC go along.
    program = (sys.executable, "-S", "-c", "import signal; signal.pause()")
    pids.append(subprocess.Popen(program, close_fds=False).pid)
    ready.put(pids)  # type: ignore[attr-defined]
    signal.pause()


def test_lease_of_a_killed_holder_is_not_kept_by_its_descendants(run_dir: Path) -> None:
    ready = spawn.Queue()
    child = spawn.Process(target=hold_with_descendants, args=(str(run_dir), ready))
    child.start()
    descendants = [ProcessId.of(pid) for pid in ready.get(timeout=DEADLINE_S)]
    try:
        guardian = read_record(run_dir).guardian
        assert guardian.alive()
        child.kill()
        # Not join(): its pipe is open in the descendants too.
        wait_until(lambda: not guardian.alive(), "the guardian ends")
        assert all(process.alive() for process in descendants)
    finally:
        for process in descendants:
            os.kill(process.pid, signal.SIGKILL)
    child.join(DEADLINE_S)
    assert child.exitcode == -signal.SIGKILL


def test_killed_guardian_takes_the_server_with_it_and_is_replaced(run_dir: Path) -> None:
    lease = ensure_server(make_spec(grace_s=30.0), run_dir=run_dir, owner="test")
    generation = lease.wait_ready(DEADLINE_S).generation
    guardian, server = read_record(run_dir).guardian, server_of(run_dir)
    os.kill(guardian.pid, signal.SIGKILL)
    wait_until(lambda: not server.alive(), "the server dies with its guardian")
    state = lease.state()
    assert state.status is ServerStatus.FAILED
    assert f"pid {guardian.pid}" in state.detail

    with ensure_server(make_spec(grace_s=0.3), run_dir=run_dir, owner="test") as second:
        assert second.wait_ready(DEADLINE_S).generation == generation + 1
    # The old lease counts for the new server.
    assert lease.state().status is ServerStatus.READY
    guardian = read_record(run_dir).guardian
    lease.close()
    wait_until(lambda: not guardian.alive(), "the guardian ends")


def test_a_lease_holder_has_the_server_started_again(run_dir: Path) -> None:
    lease = ensure_server(make_spec(), run_dir=run_dir, owner="test")
    generation = lease.wait_ready(DEADLINE_S).generation
    lease.revive()
    assert lease.generation == generation, "the server runs"
    os.kill(read_record(run_dir).guardian.pid, signal.SIGKILL)
    wait_until(lambda: lease.state().status is ServerStatus.FAILED, "the guardian is dead")
    for _ in range(3):
        lease.revive()
    wait_until(lambda: lease.state().status is ServerStatus.READY, "the server is back")
    assert lease.generation == generation + 1, "once, however often it was asked for"
    guardian = read_record(run_dir).guardian
    lease.close()
    wait_until(lambda: not guardian.alive(), "the guardian ends")


def test_server_that_ignores_sigterm_is_killed(run_dir: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FAKE_SERVER
    spec = make_spec(
        command=(sys.executable, "-S", "-c", stubborn, "{http_port}"), stop_timeout_s=0.2
    )
    lease = ensure_server(spec, run_dir=run_dir, owner="test")
    lease.wait_ready(DEADLINE_S)
    server, guardian = server_of(run_dir), read_record(run_dir).guardian
    os.kill(guardian.pid, signal.SIGKILL)
    wait_until(lambda: not guardian.alive(), "the guardian is dead")
    # Left behind; the next guardian kills it before it starts its own.
    assert server.alive()
    with ensure_server(spec, run_dir=run_dir, owner="test") as second:
        second.wait_ready(DEADLINE_S)
        assert not server.alive()
        server, guardian = server_of(run_dir), read_record(run_dir).guardian
    lease.close()
    wait_until(lambda: not guardian.alive(), "the guardian ends")
    assert not server.alive()


def test_crashed_server_restarts_with_a_new_generation(run_dir: Path) -> None:
    with ensure_server(make_spec(), run_dir=run_dir, owner="test") as lease:
        before = lease.wait_ready(DEADLINE_S)
        guardian, server = read_record(run_dir).guardian, server_of(run_dir)
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: lease.generation > before.generation, "a new generation starts")
        after = lease.wait_ready(DEADLINE_S)
        assert after.generation == before.generation + 1
        assert (after.url, after.shm_name) != (before.url, before.shm_name)
        assert after.shm_name.startswith("lmcache_l1_pool_")
        assert read_record(run_dir).guardian == guardian
        assert server_of(run_dir) != server


def test_server_that_always_crashes_is_given_up_with_its_last_words(run_dir: Path) -> None:
    command = (sys.executable, "-S", "-c", "raise SystemExit('no memory for you')")
    spec = make_spec(command=command, max_starts_per_minute=2)
    with ensure_server(spec, run_dir=run_dir, owner="test") as lease:
        with pytest.raises(ServerFailedError, match=r"(?s)2 times in a minute.*no memory for you"):
            lease.wait_ready(DEADLINE_S)
        # A failed record does not stop the next attempt.
        with ensure_server(make_spec(), run_dir=run_dir, owner="test") as second:
            assert second.wait_ready(DEADLINE_S).generation > 2


def test_command_that_does_not_exist_fails_clearly(run_dir: Path) -> None:
    spec = make_spec(command=("/nonexistent/server",))
    with (
        ensure_server(spec, run_dir=run_dir, owner="test") as lease,
        pytest.raises(ServerFailedError, match="cannot start /nonexistent/server"),
    ):
        lease.wait_ready(DEADLINE_S)


def test_wait_ready_times_out_and_reports_progress(run_dir: Path) -> None:
    deaf = (sys.executable, "-S", "-c", "import signal; signal.pause()")
    seen: list[ServerState] = []
    with ensure_server(make_spec(command=deaf), run_dir=run_dir, owner="test") as lease:
        with pytest.raises(ServerTimeoutError, match=r"not ready after 0\.1 s"):
            lease.wait_ready(0.1, lambda _waited_s, state: seen.append(state))
        assert [state.status for state in seen] == [ServerStatus.STARTING]


@pytest.mark.parametrize("garbage", ["{half a", "[]", '{"phase": "ready"}', "\udc80"])
def test_corrupt_state_of_a_dead_server_is_ignored(
    run_dir: Path, garbage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir.mkdir(mode=0o700)
    (run_dir / "default.json").write_text(garbage, errors="surrogateescape")
    with ensure_server(make_spec(), run_dir=run_dir, owner="test") as lease:
        assert lease.wait_ready(DEADLINE_S).generation == 1
    assert "ignoring corrupt server state" in caplog.text


def test_corrupt_state_of_a_running_server_is_repaired_not_doubled(run_dir: Path) -> None:
    with ensure_server(make_spec(), run_dir=run_dir, owner="first") as lease:
        before = lease.wait_ready(DEADLINE_S)
        server = server_of(run_dir)
        (run_dir / "default.json").write_text("{half a")
        with ensure_server(make_spec(), run_dir=run_dir, owner="second") as second:
            assert second.wait_ready(DEADLINE_S) == before
            assert server_of(run_dir) == server


def test_record_of_a_reused_pid_is_not_joined(run_dir: Path) -> None:
    with ensure_server(make_spec(), run_dir=run_dir, owner="first") as lease:
        lease.wait_ready(DEADLINE_S)
        fields = json.loads((run_dir / "default.json").read_text())
    guardian = ProcessId(**fields["guardian"])
    wait_until(lambda: not guardian.alive(), "the first guardian ends")
    fields["guardian"] = {"pid": os.getpid(), "start_ticks": 1}
    (run_dir / "default.json").write_text(json.dumps(fields))
    with ensure_server(make_spec(), run_dir=run_dir, owner="second") as lease:
        lease.wait_ready(DEADLINE_S)
        assert read_record(run_dir).guardian.pid not in {os.getpid(), guardian.pid}


def test_other_chunk_size_is_refused_other_size_joins_with_a_warning(run_dir: Path) -> None:
    with ensure_server(make_spec(), run_dir=run_dir, owner="first") as lease:
        with pytest.raises(SpecMismatchError, match=r"chunk_tokens=64, .* chunk_tokens=128"):
            ensure_server(make_spec(chunk_tokens=128), run_dir=run_dir, owner="second")
        assert len(status(run_dir)[0].lease_pids) == 1
        with ensure_server(make_spec(dram_bytes=1 << 29), run_dir=run_dir, owner="third") as other:
            assert other.url == lease.url
            (warning,) = other.warnings
            assert str(1 << 28) in warning
            assert str(1 << 29) in warning
        assert lease.warnings == ()


def test_other_version_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ensure_server(make_spec(), run_dir=run_dir, owner="first"):
        monkeypatch.setattr(server_launch, "__version__", "9.9")
        with pytest.raises(SpecMismatchError, match=r"runs kvtier .* has kvtier 9\.9"):
            ensure_server(make_spec(), run_dir=run_dir, owner="second")


def test_other_name_is_another_server(run_dir: Path) -> None:
    with (
        ensure_server(make_spec(), run_dir=run_dir, owner="a") as first,
        ensure_server(make_spec(name="big", chunk_tokens=256), run_dir=run_dir, owner="b") as other,
    ):
        assert first.url != other.url
        assert [summary.name for summary in status(run_dir)] == ["big", "default"]


def test_stop_all_spares_a_leased_server(run_dir: Path) -> None:
    spec = make_spec(grace_s=60.0)
    lease = ensure_server(spec, run_dir=run_dir, owner="test")
    lease.wait_ready(DEADLINE_S)
    (result,) = stop_all(run_dir)
    assert (result.stopped, result.reason) == (False, "1 other lease(s) held")
    assert lease.state().status is ServerStatus.READY
    guardian, server = read_record(run_dir).guardian, server_of(run_dir)
    lease.close()
    (result,) = stop_all(run_dir)
    assert result.stopped
    assert not guardian.alive()
    assert not server.alive()
    assert status(run_dir) == []
    assert stop_all(run_dir) == []


def test_guardian_stops_cleanly_on_sigterm(run_dir: Path) -> None:
    with ensure_server(make_spec(), run_dir=run_dir, owner="test") as lease:
        lease.wait_ready(DEADLINE_S)
        guardian, server = read_record(run_dir).guardian, server_of(run_dir)
        os.kill(guardian.pid, signal.SIGTERM)
        wait_until(lambda: not guardian.alive(), "the guardian ends")
        assert not server.alive()
        assert not (run_dir / "default.json").exists()


def test_close_is_idempotent(run_dir: Path) -> None:
    lease = ensure_server(make_spec(), run_dir=run_dir, owner="test")
    lease.close()
    descriptor = os.open(os.devnull, os.O_RDONLY)  # likely the number that was just closed
    lease.close()
    os.fstat(descriptor)
    os.close(descriptor)
    assert isinstance(lease, ServerLease)
    assert not list((run_dir / "leases" / "default").iterdir())


def test_supervisor_imports_no_engine() -> None:
    code = textwrap.dedent(
        """
        import sys, kvtier.supervisor, kvtier.server.guardian
        print([m for m in ("torch", "vllm", "lmcache", "numpy") if m in sys.modules])
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
