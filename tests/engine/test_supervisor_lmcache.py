"""The supervisor with a real LMCache server."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from kvtier import wire
from kvtier.server.files import ServerFiles
from kvtier.supervisor import ServerSpec, ServerStatus, ensure_server, status, stop_all
from tests.engine.tier_probe import Probe

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

READY_TIMEOUT_S = 180.0
END_TIMEOUT_S = 60.0
DRAM_BYTES = 256 << 20
SHM = Path("/dev/shm")


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """Return a run directory; a server that a failing test leaves there is killed."""
    path = tmp_path / "run"
    yield path
    for summary in status(path):
        for pid in (summary.guardian_pid, summary.server_pid):
            if pid is not None:
                psutil.Process(pid).kill()
        (SHM / summary.state.shm_name).unlink(missing_ok=True)


def test_real_server_lives_as_long_as_its_leases(run_dir: Path) -> None:
    spec = ServerSpec(chunk_tokens=64, dram_bytes=DRAM_BYTES, grace_s=0.5)
    first = ensure_server(spec, run_dir=run_dir, owner="first")
    second = ensure_server(spec, run_dir=run_dir, owner="second")
    assert first.state().status is ServerStatus.STARTING
    state = first.wait_ready(READY_TIMEOUT_S)
    assert second.state() == state

    segment = SHM / state.shm_name
    assert segment.stat().st_size == DRAM_BYTES
    assert segment.stat().st_mode & 0o077 == 0

    record = ServerFiles(run_dir, "default").read_record()
    assert record is not None
    assert record.server is not None
    server = psutil.Process(record.server.pid)
    family = [psutil.Process(record.guardian.pid), server, *server.children(recursive=True)]
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {
        ("127.0.0.1", record.endpoint.port),
        ("127.0.0.1", record.endpoint.http_port),
    }

    first.close()
    # Past the grace, the other lease still keeps the server.
    with pytest.raises(psutil.TimeoutExpired):
        server.wait(2.0)
    assert second.state() == state

    second.close()
    _, alive = psutil.wait_procs(family, timeout=END_TIMEOUT_S)
    assert alive == []
    assert not segment.exists()
    assert status(run_dir) == []


def test_stopping_and_starting_again_at_once_gives_a_new_segment(run_dir: Path) -> None:
    spec = ServerSpec(chunk_tokens=64, dram_bytes=DRAM_BYTES)
    with ensure_server(spec, run_dir=run_dir, owner="first") as lease:
        old = lease.wait_ready(READY_TIMEOUT_S)
    (result,) = stop_all(run_dir)
    assert result.stopped
    assert not (SHM / old.shm_name).exists()
    with ensure_server(spec, run_dir=run_dir, owner="second") as lease:
        begin_s = time.monotonic()
        new = lease.wait_ready(READY_TIMEOUT_S)
        print(f"ready after {time.monotonic() - begin_s:.1f} s")  # noqa: T201 - for the reader
        assert new.shm_name != old.shm_name
        assert (SHM / new.shm_name).exists()
        assert os.getpid() in status(run_dir)[0].lease_pids
    stop_all(run_dir)
    assert not (SHM / new.shm_name).exists()


def test_engines_are_told_what_had_to_make_room_and_nobody_else_is(run_dir: Path) -> None:
    """By the server itself, behind its answers; who has been silent is told when it speaks again."""
    slot_bytes = 1 << 20
    spec = ServerSpec(
        chunk_tokens=64,
        dram_bytes=16 * slot_bytes,
        server_module="kvtier.server_module",
        server_module_config_json=json.dumps({"endpoint": f"ipc://{run_dir}/s"}),
    )
    with ensure_server(spec, run_dir=run_dir, owner="tests") as lease, ExitStack() as ends:
        lease.wait_ready(READY_TIMEOUT_S)
        one, two, bystander = (
            ends.enter_context(Probe(f"ipc://{run_dir}/s", name))
            for name in ("one", "two", "bystander")
        )
        for probe in (one, two):
            assert probe.store("program", 6, slot_bytes, value_s=1.0) == 6
        assert two.store("another", 12, slot_bytes, value_s=1e6) == 12
        for probe in (one, two, bystander):
            probe.ask(wire.Status(9))
        told = {probe.name: probe.evictions for probe in (one, two, bystander)}
        assert told["bystander"] == []
        assert told["one"] or told["two"]
        assert {notice.program for notice in told["one"] + told["two"]} == {"program"}
        assert {notice.namespace for notice in told["one"]} <= {"one"}
        assert {notice.namespace for notice in told["two"]} <= {"two"}
        for probe in (one, two):
            if probe.evictions:
                assert probe.resident("program", 6) == probe.evictions[-1].resident_chunks
