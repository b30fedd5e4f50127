"""The end of the host's LMCache server, as the control server sees it without any engine's help."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvtier import link_messages as link
from kvtier.control import control_server
from kvtier.control.api.grpc_server import SERVICES
from kvtier.server.files import SERVER_NAME, ProcessId, ServerFiles, ServerRecord
from kvtier.server.launch import Endpoint, ServerSpec
from kvtier.v1 import observability_pb2
from tests.unit.control.control_host import GAUGES, Host, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.control.control_host import FakeEngine

SERVING, NOT_SERVING = 1, 2
LOST = msgspec.structs.replace(GAUGES, tier_state="lost")
OFF = msgspec.structs.replace(GAUGES, tier_state="off")


class Lmcache:
    """A process that is taken for the LMCache server, and the record of it."""

    def __init__(self, host: Host) -> None:
        self.files = ServerFiles(host.files.run_dir, SERVER_NAME)
        self.generation = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE
        )
        self.generation += 1
        self.publish("ready")

    def publish(self, phase: str) -> None:
        process = self._process
        assert process is not None
        one = ProcessId.of(process.pid)
        spec = ServerSpec(chunk_tokens=256, dram_bytes=1 << 20, name=SERVER_NAME)
        record = ServerRecord(phase, "", self.generation, one, one, Endpoint(1, 2, "shm"), spec, {})
        with self.files.election():
            self.files.write_record(record)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None


@pytest.fixture
def lmcache(host: Host) -> Iterator[Lmcache]:
    made = Lmcache(host)
    yield made
    made.kill()


@pytest.fixture
def look(host: Host, lmcache: Lmcache) -> Any:
    """Looks at once, as each tick of the server does: `look()`."""
    lmcache.start()
    return lambda: host.call(host.server._look_at_tier)


def health(host: Host) -> int:
    stub: Any = health_pb2_grpc.HealthStub(host.channel())
    return int(stub.Check(health_pb2.HealthCheckRequest(service=SERVICES[0])).status)


def tier_states(host: Host) -> list[str]:
    request = observability_pb2.GetStatusRequest()
    return [engine.cpu.state for engine in host.client.observability.GetStatus(request).engines]


def test_an_idle_engine_has_no_tier_once_the_server_has_gone(
    host: Host, engine: FakeEngine, lmcache: Lmcache
) -> None:
    host.engine("pins-alone").join(OFF)
    host.engine("silent").join(None)
    lmcache.start()
    wait_until(lambda: host.server._tier_watch._last_seen is not None, "the server is seen to run")
    watch = host.client.observability.WatchEvents(
        observability_pb2.WatchEventsRequest(kinds=["engine"])
    )
    watch.initial_metadata()
    assert tier_states(host) == ["ready", "off", ""]
    lmcache.kill()
    # Nothing but time tells: no engine says anything.
    event = next(watch).event
    assert (event.engine_id, event.fields["change"]) == ("engine-0", "tier")
    assert event.fields["tier_state"] == "lost"
    assert tier_states(host) == ["lost", "off", ""]
    watch.cancel()


def test_health_follows_the_server_and_then_what_engines_report(
    host: Host, engine: FakeEngine, lmcache: Lmcache, look: Any
) -> None:
    look()
    assert health(host) == SERVING
    lmcache.kill()
    look()
    assert health(host) == NOT_SERVING
    # It has not noticed yet.
    engine.report()
    assert health(host) == NOT_SERVING
    engine.report(gauges=LOST)
    lmcache.start()
    # What it reports counts at once, whenever somebody looked last.
    engine.report()
    assert health(host) == SERVING
    assert tier_states(host) == ["ready"]


def test_a_server_that_has_come_back_meanwhile_does_not_know_the_engines(
    host: Host, engine: FakeEngine, lmcache: Lmcache, look: Any
) -> None:
    look()
    lmcache.kill()
    lmcache.start()
    look()
    assert health(host) == NOT_SERVING
    engine.report()
    look()
    assert health(host) == SERVING


def test_a_server_that_is_being_started_again_does_not_work_yet(
    host: Host, engine: FakeEngine, lmcache: Lmcache, look: Any
) -> None:
    look()
    lmcache.publish("starting")
    look()
    assert tier_states(host) == ["lost"]


def test_a_record_that_is_lost_or_damaged_is_no_end_of_the_server(
    host: Host, engine: FakeEngine, lmcache: Lmcache, look: Any
) -> None:
    look()
    lmcache.files.record_path.write_text("{")
    look()
    assert health(host) == SERVING
    lmcache.files.remove_record()
    look()
    assert health(host) == SERVING
    lmcache.kill()
    look()
    assert health(host) == NOT_SERVING


def test_an_old_record_says_nothing(
    host: Host, engine: FakeEngine, lmcache: Lmcache, look: Any
) -> None:
    """Nobody has seen the server that it names."""
    lmcache.kill()
    look()
    engine.report()
    assert health(host) == SERVING


def test_the_end_of_the_hosts_server_says_nothing_of_one_that_an_engine_was_given(
    host: Host, engine: FakeEngine, lmcache: Lmcache, look: Any
) -> None:
    """With `lmcache_url`."""
    given = host.engine("given", on_hosts_tier=False)
    given.join()
    look()
    lmcache.kill()
    look()
    assert tier_states(host) == ["lost", "ready"]
    given.report()
    assert tier_states(host) == ["lost", "ready"]


def test_idle_engines_whose_tier_is_away_are_woken_now_and_then(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes back in a hook; and whoever asks for health first sends no request."""
    monkeypatch.setattr(control_server, "TIER_WAKE_INTERVAL_S", 0.0)
    monkeypatch.setattr(control_server, "TICK_S", 0.02)
    busy = msgspec.structs.replace(LOST, running_requests=1)
    engines = {1: ("away", LOST), 2: ("busy", busy), 3: ("works", GAUGES)}
    waker = host.peer()
    waker.send(link.WakerHello(link=link.LINK_VERSION, pid=os.getpid(), parent_pid=77))
    assert link.waker_decoder.decode(waker.next_frame()).dp_rank == link.ALL_RANKS
    for rank, (engine_id, gauges) in engines.items():
        engine = host.engine(engine_id, dp_rank=rank, parent_pid=77)
        engine.join(gauges)
    # The overrides of a hello may have woken any of them; after that, it is one.
    seen: list[int] = []
    while seen[-3:] != [1, 1, 1]:
        seen.append(link.waker_decoder.decode(waker.next_frame()).dp_rank)
        assert len(seen) < 100
