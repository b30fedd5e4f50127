"""The control server's process: who starts it, that there is one, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest

from kvtier import link_messages as link
from kvtier.config import ConfigError, Settings
from kvtier.control import launch
from kvtier.control.control_server import ControlServer
from kvtier.control.files import ControlFiles, ControlRecord
from kvtier.control.log_file import MAX_BYTES, LogFile
from kvtier.v1 import observability_pb2
from tests.unit.control.control_host import Client, FakeEngine, Host, Refused, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STATUS = observability_pb2.GetStatusRequest()


def settings(run_dir: Path, **values: Any) -> Settings:
    extra: dict[str, Any] = {
        "control_listen": "none",
        "control_state_file": str(run_dir / "overrides.json"),
        "control_grace_s": 0.05,
    }
    return Settings.load({"kvtier": extra | values}, {})


@pytest.fixture
def files(tmp_path: Path) -> Iterator[ControlFiles]:
    """Files of a run directory in which nothing is left running."""
    files = ControlFiles(tmp_path)
    yield files
    if (record := files.read_record()) is not None and psutil.pid_exists(record.pid):
        os.kill(record.pid, signal.SIGKILL)
    for remembered in (launch._last_starts_s, launch._seen, launch._warned):
        remembered.clear()  # type: ignore[attr-defined]


def serving(files: ControlFiles) -> ControlRecord:
    def record() -> ControlRecord | None:
        found = files.read_record()
        return found if found is not None and found.phase == "serving" else None

    return wait_until(record, "the control server serves")


def gone(files: ControlFiles, pid: int) -> None:
    wait_until(lambda: not psutil.pid_exists(pid) or _is_zombie(pid), "its process has ended")
    assert not files.lock_held()
    left = {path.name for path in files.run_dir.iterdir()}
    assert left == {"kvtier.control.lock", "kvtier.control.log"}, left


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ask(files: ControlFiles) -> Any:
    with grpc.insecure_channel(files.unix_target) as channel:
        return Client(channel).observability.GetStatus(STATUS, wait_for_ready=True, timeout=20)


# -- a life ------------------------------------------------------------------------------------------


def test_an_engine_starts_it_detached_a_second_one_joins_and_it_ends_after_the_last(
    files: ControlFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(files.run_dir)
    launch.ensure_control_server(chosen, files.run_dir)
    record = serving(files)
    # Nobody's child: an engine that ends with all its children does not end it.
    process = psutil.Process(record.pid)
    wait_until(
        lambda: os.getpid() not in {parent.pid for parent in process.parents()},
        "the process between has ended",
    )
    assert os.getsid(record.pid) != os.getsid(0)
    assert (record.tcp_target, record.unix_target) == (None, files.unix_target)

    # Another one that is started nevertheless ends at once, and changes nothing.
    with start_in_foreground(files.run_dir) as second:
        assert second.wait(20) == 0
        assert second.stderr is not None
        assert second.stderr.read() == b""
    monkeypatch.setattr(launch, "RETRY_INTERVAL_S", 0.0)
    launch.ensure_control_server(chosen, files.run_dir)
    # Closed also where something fails: to collect a socket's context that is open would wait for ever.
    with (
        closing(FakeEngine(files.run_dir)) as first,
        closing(FakeEngine(files.run_dir, "engine-1")) as last,
    ):
        for engine in (first, last):
            engine.join()
        assert [e.engine_id for e in ask(files).engines] == ["engine-0", "engine-1"]
        assert serving(files) == record

        first.send(link.EngineBye(engine_id="engine-0"))
        last.settle()
        assert [e.engine_id for e in ask(files).engines] == ["engine-1"]
        last.send(link.EngineBye(engine_id="engine-1"))
        gone(files, record.pid)
        assert "stopping: no engine for 0.05 s" in files.log_path.read_text()


def start_in_foreground(
    run_dir: Path, *arguments: str, **variables: str
) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVTIER_")}
    environment |= {
        "KVTIER_CONTROL_LISTEN": "127.0.0.1:0",
        "KVTIER_CONTROL_STATE_FILE": str(run_dir / "overrides.json"),
        **variables,
    }
    command = [sys.executable, "-m", "kvtier.control.sidecar", "--run-dir", str(run_dir)]
    return subprocess.Popen([*command, *arguments], env=environment, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_gracefully(files: ControlFiles, number: signal.Signals) -> None:
    with start_in_foreground(files.run_dir) as process:
        record = serving(files)
        assert record.pid == process.pid
        with grpc.insecure_channel(str(record.tcp_target)) as channel:
            stream = Client(channel).observability.WatchEvents(
                observability_pb2.WatchEventsRequest()
            )
            stream.initial_metadata()
            process.send_signal(number)
            refused = Refused(lambda: next(stream))
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.UNAVAILABLE,
            "SERVER_STOPS",
        )
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert b"stopping: told to stop" in process.stderr.read()
    gone(files, record.pid)


def test_without_any_engine_it_ends_after_a_while(files: ControlFiles) -> None:
    with start_in_foreground(files.run_dir, "--start-grace-s", "0.2") as process:
        assert process.wait(20) == 0
    assert "no engine for 0.2 s" in files.log_path.read_text()


def test_one_that_was_killed_leaves_nothing_that_hinders_the_next(files: ControlFiles) -> None:
    with start_in_foreground(files.run_dir) as process:
        first = serving(files)
        process.kill()
    assert files.grpc_socket_path.exists()
    with start_in_foreground(files.run_dir) as process:
        wait_until(lambda: serving(files).pid != first.pid, "the next one serves")
        ask(files)
        process.terminate()


def test_a_port_that_is_taken_leaves_it_the_unix_socket(files: ControlFiles) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with start_in_foreground(files.run_dir, KVTIER_CONTROL_LISTEN=address) as process:
            record = serving(files)
            ask(files)
            process.terminate()
    assert record.tcp_target is None
    assert f"control_listen='{address}'" in record.tcp_problem
    assert "only the Unix socket serves" in files.log_path.read_text()


def test_two_servers_never_share_a_port(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir(mode=0o700)
    with Host(tmp_path / "a", listen="127.0.0.1:0") as first:
        target = first.listening.tcp_target
        with Host(tmp_path / "b", listen=target) as second:
            assert second.listening.tcp_target is None
            second.client.observability.GetStatus(STATUS)


def test_bad_settings_end_it_with_a_message(files: ControlFiles) -> None:
    with start_in_foreground(files.run_dir, KVTIER_CONTROL_LISTEN="0.0.0.0:1") as process:
        assert process.wait(20) == 2
        assert process.stderr is not None
        assert b"control_listen='0.0.0.0:1'" in process.stderr.read()
    assert not files.log_path.exists()


def test_an_engine_that_comes_in_the_last_moment_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []
    tell = ControlServer._tell

    def told(server: ControlServer, phase: Any) -> None:
        tell(server, phase)
        phases.append(phase)
        if phase == "stopping" and len(phases) == 2:
            late.send(late.hello)

    monkeypatch.setattr(ControlServer, "_tell", told)
    with Host(tmp_path, grace_s=0.05) as host:
        early, late = host.engine(), host.engine("late")
        early.join()
        early.send(link.EngineBye(engine_id="engine-0"))
        late.answer(late.next(link.OverridesCommand))
        wait_until(lambda: phases == ["serving", "stopping", "serving"], "it serves again")
        assert [e.engine_id for e in host.client.observability.GetStatus(STATUS).engines] == [
            "late"
        ]


# -- starting it -------------------------------------------------------------------------------------


def starts(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would be started."""
    found: list[list[str]] = []
    monkeypatch.setattr(launch, "_start", lambda _, files: found.append([str(files.run_dir)]))
    return found


def test_it_is_started_once_and_again_only_after_a_while(
    files: ControlFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = starts(monkeypatch)
    for _ in range(3):
        launch.ensure_control_server(settings(files.run_dir), files.run_dir)
    assert len(found) == 1
    monkeypatch.setattr(launch, "RETRY_INTERVAL_S", 0.0)
    launch.ensure_control_server(settings(files.run_dir), files.run_dir)
    assert len(found) == 2


def test_it_is_not_started_while_one_runs_unless_that_one_ends(
    files: ControlFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = starts(monkeypatch)
    lock = files.try_lock()
    assert lock is not None
    try:
        record = ControlRecord(
            pid=1,
            phase="serving",
            version="x",
            started_s=0.0,
            unix_target="",
            settings={"control_grace_s": 9.0, "control_listen": None},
        )
        files.write_record(record)
        for _ in range(2):
            launch.ensure_control_server(settings(files.run_dir), files.run_dir)
        assert found == []
        # What of its settings does not hold is told once.
        (line,) = caplog.messages
        assert "control_grace_s=9.0; this engine's control_grace_s=0.05 is not applied" in line
        files.record_path.write_text(json.dumps({"pid": 1, "phase": "stopping"}))
        launch.ensure_control_server(settings(files.run_dir), files.run_dir)
        assert found == []
        fields = {f: getattr(record, f) for f in record.__struct_fields__}
        files.write_record(ControlRecord(**(fields | {"phase": "stopping"})))
        launch.ensure_control_server(settings(files.run_dir), files.run_dir)
        assert len(found) == 1
    finally:
        os.close(lock)


def test_off_is_off(files: ControlFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    found = starts(monkeypatch)
    launch.ensure_control_server(settings(files.run_dir, control="off"), files.run_dir)
    assert found == []
    assert list(files.run_dir.iterdir()) == []


def test_bad_files_stop_the_engine_and_a_bad_run_directory_does_not(
    tmp_path: Path, files: ControlFiles, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    found = starts(monkeypatch)
    chosen = settings(files.run_dir, control_tokens_file="/nowhere")
    with pytest.raises(ConfigError, match="control_tokens_file="):
        launch.ensure_control_server(chosen, files.run_dir)
    assert found == []
    # What goes wrong later is the server's own business, not the engine's.
    launch.ensure_control_server(chosen, files.run_dir)
    assert len(found) == 1
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o777)
    long = tmp_path / ("x" * 120)
    for run_dir, words in ((public, "writable by other users"), (long, "shorter path")):
        for _ in range(2):
            launch.ensure_control_server(settings(files.run_dir), run_dir)
        assert caplog.text.count(words) == 1
    assert len(found) == 1


def test_a_server_that_does_not_start_is_told_of(
    files: ControlFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch, "to_json", lambda _: b"nonsense")
    launch.ensure_control_server(settings(files.run_dir), files.run_dir)
    wait_until(lambda: "the control server did not start (2)" in caplog.text, "it is told of")


def test_an_engines_process_never_imports_grpc_for_it() -> None:
    code = (
        "import sys; import kvtier.control.launch, kvtier.link_messages;"
        "assert not {'grpc', 'zmq', 'google.protobuf'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- its log -----------------------------------------------------------------------------------------


def test_the_log_does_not_grow_without_end_whoever_writes_to_it(tmp_path: Path) -> None:
    path = tmp_path / "kvtier.control.log"
    log = LogFile(path, take_over=False)
    with path.open("a") as other:
        other.write("x" * (MAX_BYTES + 1))
    log.trim()
    assert path.stat().st_size == 0
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    log.trim()
    assert path.exists()
    log.close()
