"""`kvtier chaos`: it breaks what it was told to, nothing else, and tells what became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import psutil
import pytest
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.config import Settings
from kvtier.control import launch
from kvtier.control.files import ControlFiles, ControlRecord
from kvtier.operator import chaos
from kvtier.operator.chaos_faults import FAULTS, SERVER_NAME, NotThereError, Victim
from kvtier.server.files import ServerFiles
from kvtier.supervisor import ServerLease, ensure_server, status
from tests.unit.test_supervisor import DEADLINE_S, make_spec, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typer.testing import Result


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "LOOK_INTERVAL_S", 0.02)
    monkeypatch.setattr(chaos, "ANSWER_S", 0.2)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    yield path
    for summary in status(path):
        for pid in (summary.guardian_pid, summary.server_pid):
            if pid is not None:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def lease(run_dir: Path) -> Iterator[ServerLease]:
    """A lease on a stand-in for the LMCache server, under a real guardian."""
    with ensure_server(make_spec(name=SERVER_NAME), run_dir=run_dir, owner="tests") as lease:
        lease.wait_ready(DEADLINE_S)
        yield lease


def run(run_dir: Path, *words: str) -> Result:
    options = ["--run-dir", str(run_dir), "--wait", "20s", "--hold", "500ms"]
    return CliRunner().invoke(app, ["chaos", *words, *options])


def told(result: Result) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = json.loads(result.stdout)["faults"]
    return reports


def server_pid(run_dir: Path) -> int:
    record = ServerFiles(run_dir, SERVER_NAME).read_record()
    assert record is not None
    assert record.server is not None
    return record.server.pid


def test_nothing_is_done_without_the_word_that_it_is_a_test(
    run_dir: Path, lease: ServerLease
) -> None:
    pid = server_pid(run_dir)
    result = run(run_dir, "lmcache-kill")
    assert result.exit_code == 2
    assert "--test-deployment" in result.stderr
    assert psutil.pid_exists(pid)
    assert lease.generation == 1


@pytest.mark.parametrize(
    "words", [["nonsense"], ["lmcache-kill", "--metrics", "file:///etc/passwd"]]
)
def test_what_is_not_known_is_refused_before_anything_breaks(
    run_dir: Path, lease: ServerLease, words: list[str]
) -> None:
    assert run(run_dir, "--test-deployment", "lmcache-kill", *words).exit_code == 2
    assert lease.generation == 1


def test_where_nothing_runs_nothing_breaks(run_dir: Path, tmp_path: Path) -> None:
    result = run(run_dir, "--test-deployment", "--json")
    assert result.exit_code == 3
    assert [report["fault"] for report in told(result)] == list(FAULTS)
    assert all(report["problem"] and not report["pid"] for report in told(result))
    missing = tmp_path / "missing"
    assert run(missing, "--test-deployment").exit_code == 3
    assert not missing.exists()


@pytest.mark.parametrize("fault", ["lmcache-kill", "lmcache-restart"])
def test_a_server_that_ends_is_another_one_after_it(
    run_dir: Path, lease: ServerLease, fault: str
) -> None:
    pid = server_pid(run_dir)
    result = run(run_dir, "--test-deployment", fault, "--json")
    assert result.exit_code == 0, result.output
    (report,) = told(result)
    assert (report["pid"], report["problem"]) == (pid, "")
    assert report["recovered_s"] >= 0
    assert report["failures"] is None
    assert report["changes"][-1]["health"]["lmcache"] == "ready"
    assert report["changes"][-1]["health"]["generation"] == 2
    assert lease.generation == 2
    assert server_pid(run_dir) != pid


def test_a_server_that_has_not_noticed_its_end_yet_has_not_recovered() -> None:
    before = chaos.Health("ready", 1, "answers", {"a": "ready", "b": "lost"})
    assert not chaos.is_recovered(FAULTS["lmcache-kill"], before, before)
    assert chaos.is_recovered(FAULTS["lmcache-stop"], before, before)
    assert chaos.is_recovered(FAULTS["lmcache-kill"], before, replace(before, generation=2))
    for changes in ({"lmcache": "silent"}, {"control": "silent"}, {"engines": {"b": "ready"}}):
        assert not chaos.is_recovered(FAULTS["control-stop"], before, replace(before, **changes))


def test_a_server_that_hangs_is_let_go_on(run_dir: Path, lease: ServerLease) -> None:
    pid = server_pid(run_dir)
    result = run(run_dir, "--test-deployment", "lmcache-stop", "--json")
    assert result.exit_code == 0, result.output
    (report,) = told(result)
    states = [change["health"]["lmcache"] for change in report["changes"]]
    assert states[-2:] == ["silent", "ready"]
    assert (server_pid(run_dir), lease.generation) == (pid, 1)
    assert psutil.Process(pid).status() != psutil.STATUS_STOPPED


def test_what_hangs_goes_on_when_the_command_is_ended(
    run_dir: Path, lease: ServerLease, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = server_pid(run_dir)

    def ended_while_it_hangs(_seconds: float) -> None:
        assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(chaos.time, "sleep", ended_while_it_hangs)
    before = signal.getsignal(signal.SIGTERM)
    result = run(run_dir, "--test-deployment", "lmcache-stop")
    assert result.exit_code != 0
    assert psutil.Process(pid).status() != psutil.STATUS_STOPPED
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_that_ends_before_it_is_broken_is_told(
    run_dir: Path, lease: ServerLease, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise NotThereError("it has just ended")

    monkeypatch.setattr(Victim, "send", gone)
    result = run(run_dir, "--test-deployment", "lmcache-kill", "guardian-kill", "--json")
    assert [report["problem"] for report in told(result)] == ["it has just ended"] * 2


def test_what_does_not_come_back_is_told(run_dir: Path, lease: ServerLease) -> None:
    """There is no engine that would call the guardian back."""
    words = ["chaos", "--test-deployment", "guardian-kill", "--run-dir", str(run_dir)]
    result = CliRunner().invoke(app, [*words, "--wait", "300ms"])
    assert result.exit_code == 1
    assert "not as before within 300ms" in result.stdout
    lease.revive()
    wait_until(lambda: lease.generation == 2, "another guardian")


def test_the_failures_of_engines_are_counted(
    run_dir: Path, lease: ServerLease, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = 'vllm:kvtier_failures_total{engine="0",kind="tier_lost",model_name="m"} '
    pages = iter([f"# HELP x\n{page}3.0\n", f"{page}5.0\n"])

    class Answer:
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self) -> bytes:
            return next(pages).encode()

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Answer())
    url = "http://127.0.0.1:1/metrics"
    result = run(run_dir, "--test-deployment", "lmcache-kill", "--metrics", url, "--json")
    assert told(result)[0]["failures"] == {"tier_lost": 2}


# -- the control server ----------------------------------------------------------------------------


@pytest.fixture
def control(run_dir: Path) -> Iterator[ControlFiles]:
    settings = {
        "control_listen": "none",
        "control_state_file": str(run_dir / "overrides.json"),
        "control_grace_s": 0.05,
    }
    launch.ensure_control_server(Settings.load({"kvtier": settings}, {}), run_dir)
    files = ControlFiles(run_dir)
    wait_until(lambda: (r := files.read_record()) is not None and r.phase == "serving", "it serves")
    yield files
    if (record := files.read_record()) is not None and psutil.pid_exists(record.pid):
        os.kill(record.pid, signal.SIGKILL)
    for remembered in (launch._last_starts_s, launch._seen, launch._warned):
        remembered.clear()  # type: ignore[attr-defined]


def test_a_control_server_hangs_and_is_killed(run_dir: Path, control: ControlFiles) -> None:
    record = control.read_record()
    assert record is not None
    (report,) = told(run(run_dir, "--test-deployment", "control-stop", "--json"))
    states = [change["health"]["control"] for change in report["changes"]]
    assert (report["pid"], states[-2:]) == (record.pid, ["silent", "answers"])
    words = ["chaos", "--test-deployment", "control-kill", "--run-dir", str(run_dir)]
    result = CliRunner().invoke(app, [*words, "--wait", "100ms", "--json"])
    assert result.exit_code == 1, "no engine starts another one"
    assert told(result)[0]["changes"][-1]["health"]["control"] == "silent"
    wait_until(lambda: not control.lock_held(), "its end")


def test_a_process_that_is_not_kvtiers_is_not_touched(run_dir: Path) -> None:
    """Somebody else's has the number that the record names."""
    files = ControlFiles(run_dir)
    lock = files.try_lock()
    assert lock is not None
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        record = ControlRecord(
            pid=stranger.pid, phase="serving", version="0", started_s=0.0, unix_target="unix:none"
        )
        files.write_record(record)
        result = run(run_dir, "--test-deployment", "control-kill", "--json")
        assert result.exit_code == 3
        assert "not kvtier's" in told(result)[0]["problem"]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
        os.close(lock)
