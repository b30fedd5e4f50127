"""Faults in an engine's own process and on its machine; the table of docs/faults.md says what they look like."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from kvtier.assembly import server_spec
from kvtier.client import ControlError, KVTierClient
from kvtier.config import Settings
from kvtier.control.files import ControlFiles
from kvtier.supervisor import ensure_server
from tests.engine.conftest import GRACE_S
from tests.engine.tier_probe import WAIT_S, await_stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.engine.conftest import PlainVllm
    from tests.engine.engine_child import EngineChild

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SITE = Path(__file__).parent / "site"
SETTINGS = {"dram_gb": 0.05, "server_grace_s": GRACE_S, "integrity": "full"}
CONTROL = {"control": "on", "control_listen": "none", "control_grace_s": 1.0}

ANSWER_S = 10.0
"""A control server that does not answer within this is asked again."""

LIES = {
    "store_that_does_nothing": "load_integrity",
    "load_of_other_bytes": "load_integrity",
    "spoilt_memory": "load_integrity",
    "spoilt_before_a_prefetch": "prefetch_integrity",
}
"""Scenarios in which a copy, or memory, is not what it seems, and what is counted."""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Faults of the machine, in this process's children: see `site/sitecustomize.py`."""
    path = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTS_DIR", str(path))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")]))
        yield path


@pytest.fixture(scope="module")
def engine(
    start_engine: Callable[..., EngineChild],
    run_dir: Path,
    faults: Path,
    plain: PlainVllm,
) -> Iterator[EngineChild]:
    spec = server_spec(Settings.load({f"kvtier.{k}": v for k, v in SETTINGS.items()}, {}), run_dir)
    # These tests kill the server more often than a guardian puts up with.
    with ensure_server(replace(spec, max_starts_per_minute=1000), run_dir=run_dir, owner="tests"):
        control = CONTROL | {"control_state_file": str(run_dir / "overrides.json")}
        child = start_engine("tests.faults.scenarios", SETTINGS | control)
        child.call("ready")
        yield child
        # A stopped process would never end.
        _send(run_dir, signal.SIGCONT)
        child.close()


def run(engine: EngineChild, plain: PlainVllm, scenario: str, *told: str) -> dict[str, Any]:
    """Run a scenario: the tokens are right, and the engine's log says `told`."""
    begin = engine.log.stat().st_size
    answer = engine.call(scenario)
    plain.check(answer["records"])
    log = engine.log.read_bytes()[begin:].decode(errors="replace")
    assert [text for text in told if text not in log] == [], log
    value: dict[str, Any] = answer["value"]
    print(f"{scenario}: {value}")  # noqa: T201 - for docs/faults.md
    return value


def server_log(run_dir: Path) -> str:
    """What the server and its guardians have said; each guardian puts its predecessor's aside."""
    return "".join(path.read_text(errors="replace") for path in run_dir.glob("kvtier.log*"))


@pytest.mark.parametrize("scenario", LIES)
def test_a_copy_that_lies_is_found_out(
    engine: EngineChild, plain: PlainVllm, scenario: str
) -> None:
    value = run(engine, plain, scenario, "is not as it was stored")
    assert value["failures"] == {LIES[scenario]: 1}


def test_a_corrupt_calibration_file_is_measured_anew(engine: EngineChild, plain: PlainVllm) -> None:
    value = run(
        engine, plain, "corrupt_profile", "calibration profile", " ignored: UnicodeDecodeError: "
    )
    assert value["failures"] == {}


@pytest.mark.long
def test_no_room_for_another_server(engine: EngineChild, plain: PlainVllm, run_dir: Path) -> None:
    value = run(engine, plain, "memory_full_at_a_start", "CPU tier away", "starting LMCache server")
    assert value["failures"].keys() <= {"tier_lost", "stage_no_tier", "lookup_tier_away"}
    assert value["failures"]["tier_lost"] == 1
    assert "/dev/shm has 0 MiB free" in server_log(run_dir)


@pytest.mark.long
def test_memory_that_cannot_be_mapped(engine: EngineChild, plain: PlainVllm) -> None:
    value = run(engine, plain, "memory_full_at_mapping", "cannot map the CPU tier's shared memory")
    assert value["failures"]["tier_lost"] == 1
    assert value["failures"]["stage_store_copy"] >= 1


@pytest.mark.long
def test_memory_that_somebody_removes(engine: EngineChild, plain: PlainVllm, run_dir: Path) -> None:
    value = run(engine, plain, "memory_removed", "CPU tier away", "CPU tier ready")
    assert value["failures"]["tier_lost"] == 1
    assert "has lost its shared memory" in server_log(run_dir)


@pytest.mark.long
def test_a_clock_that_is_set_back(engine: EngineChild, plain: PlainVllm) -> None:
    value = run(engine, plain, "clock_set_back")
    # Of the server that the scenario kills, not of the clock.
    assert value["failures"] == {"tier_lost": 1}


# -- the control server ----------------------------------------------------------------------------


def _send(run_dir: Path, number: signal.Signals) -> int | None:
    """Send the control server a signal; its pid."""
    record = ControlFiles(run_dir).read_record()
    if record is None:
        return None
    with suppress(ProcessLookupError):
        os.kill(record.pid, number)
    return record.pid


def _await(condition: Callable[[], Any], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def _engines(run_dir: Path, timeout_s: float = ANSWER_S) -> int:
    """How many engines the control server knows, if it answers."""
    with KVTierClient(f"unix:{run_dir}/kvtier.control.sock") as client:
        return len(client.get_status(timeout_s=timeout_s).engines)


def _knows_the_engine(run_dir: Path) -> bool:
    with suppress(ControlError):
        return _engines(run_dir) > 0
    return False


def _followed(engine: EngineChild) -> None:
    _await(lambda: engine.call("run_hooks", settle=False, seconds=0.2)["value"], "followed")


def test_clients_of_the_control_server_that_hang(
    engine: EngineChild, plain: PlainVllm, run_dir: Path
) -> None:
    """Some connect and say nothing, some ask for events and read none."""
    _followed(engine)
    target = f"{run_dir}/kvtier.control.sock"
    with ExitStack() as hanging:
        for _ in range(50):
            silent = hanging.enter_context(socket.socket(socket.AF_UNIX))
            silent.connect(target)
        for _ in range(8):
            client = hanging.enter_context(KVTierClient(f"unix:{target}"))
            hanging.enter_context(client.watch()).wait_started()
        answer = engine.call("works", name="hanging")
        plain.check(answer["records"])
        assert answer["value"]["failures"] == {}
        _await(lambda: _knows_the_engine(run_dir), "an answer to others")


def test_a_control_server_that_hangs(engine: EngineChild, plain: PlainVllm, run_dir: Path) -> None:
    _followed(engine)
    pid = _send(run_dir, signal.SIGSTOP)
    assert pid is not None
    try:
        await_stopped(pid)
        answer = engine.call("works", name="stopped")
        with pytest.raises(ControlError):
            _engines(run_dir, timeout_s=1.0)
    finally:
        _send(run_dir, signal.SIGCONT)
    plain.check(answer["records"])
    assert answer["value"]["failures"] == {}
    _followed(engine)
    _await(lambda: _knows_the_engine(run_dir), "the engine is known")


def test_a_control_server_that_is_killed(
    engine: EngineChild, plain: PlainVllm, run_dir: Path
) -> None:
    _followed(engine)
    pid = _send(run_dir, signal.SIGKILL)
    assert pid is not None
    _await(lambda: not psutil.pid_exists(pid), "its end")
    with pytest.raises(ControlError):
        _engines(run_dir, timeout_s=1.0)
    answer = engine.call("works", name="killed")
    plain.check(answer["records"])
    assert answer["value"]["failures"] == {}
    engine.call("call_the_control_server_back", settle=False)
    begin_s = time.monotonic()

    def another_follows() -> bool:
        is_followed = engine.call("run_hooks", settle=False, seconds=0.1)["value"]
        record = ControlFiles(run_dir).read_record()
        return is_followed and record is not None and record.pid != pid

    # The engine may have called it back before, during the work above.
    _await(another_follows, "another server follows")
    print(f"another control server after {time.monotonic() - begin_s:.1f} s")  # noqa: T201
    _await(lambda: _knows_the_engine(run_dir), "the engine is known again")
