"""An LMCache server that comes late, goes, comes back otherwise, and what is behind it; docs/faults.md has the table."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from kvtier.supervisor import ServerLease, ServerSpec, ensure_server, stop_all
from kvtier.wire import KEY_BYTES
from tests.engine.conftest import GRACE_S
from tests.engine.tier_probe import WAIT_S, occupy, server_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.engine.conftest import PlainVllm
    from tests.engine.engine_child import EngineChild

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(900)]

NAME = "own"
READY_S = 180.0
SLOT_BYTES = 256 << 10
"""Of the tiny model's chunks of 64 tokens."""
N_SLOTS = 92
LOSSES = {"tier_lost", "stage_no_tier", "lookup_tier_away"}


class Keeper:
    """Starts and stops the one server that the engine is told of."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lease: ServerLease | None = None
        self.endpoint = f"ipc://{run_dir}/own.sock"
        config = {"endpoint": self.endpoint, "eviction_policy": "noop"}
        self._spec = ServerSpec(
            chunk_tokens=256,
            dram_bytes=N_SLOTS * SLOT_BYTES,
            name=NAME,
            server_module="kvtier.server_module",
            server_module_config_json=json.dumps(config),
            grace_s=GRACE_S,
        )

    def start(self, **changes: Any) -> None:
        """Start a server anew, and wait until it is ready."""
        self.stop()
        spec = replace(self._spec, **changes)
        self._lease = ensure_server(spec, run_dir=self._run_dir, owner="tests")
        self._lease.wait_ready(READY_S)

    def disk_is_idle(self) -> bool:
        """Whether LMCache has written through, or given up, all that it was to."""
        assert self._lease is not None
        answer = httpx.get(f"{self._lease.http_url}/status", timeout=WAIT_S, trust_env=False)
        found = re.findall(r'"(?:in_flight_task|pending_keys)_count": ?(\d+)', answer.text)
        assert found, answer.text
        return not any(map(int, found))

    def stop(self) -> None:
        """End it in good order."""
        if self._lease is not None:
            self._lease.close()
            self._lease = None
            (result,) = stop_all(self._run_dir, name=NAME)
            assert result.stopped, result


@pytest.fixture(scope="module")
def keeper(run_dir: Path) -> Iterator[Keeper]:
    made = Keeper(run_dir)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def engine(
    start_engine: Callable[..., EngineChild], keeper: Keeper, plain: PlainVllm
) -> EngineChild:
    return start_engine("tests.faults.scenarios", {"lmcache_url": keeper.endpoint})


def call(engine: EngineChild, plain: PlainVllm, scenario: str, **arguments: Any) -> Any:
    """Run a scenario; the tokens are right."""
    answer = engine.call(scenario, **arguments)
    if answer["records"]:
        plain.check(answer["records"])
    print(f"{scenario} {arguments.get('name', '')}: {str(answer['value'])[:200]}")  # noqa: T201
    return answer["value"]


def logged(engine: EngineChild) -> str:
    """What the engine has said so far."""
    return engine.log.read_text(errors="replace")


def _await(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def until_it_works(engine: EngineChild, plain: PlainVllm, name: str) -> None:
    """From the server's start on: the engine finds it, and reloads from it."""
    begin_s = time.monotonic()
    engine.call("found_another")
    print(f"{name}: found {time.monotonic() - begin_s:.1f} s after it was ready")  # noqa: T201
    assert call(engine, plain, "works", name=name)["failures"].keys() <= LOSSES


def test_a_server_that_is_started_late(
    engine: EngineChild, plain: PlainVllm, keeper: Keeper
) -> None:
    assert call(engine, plain, "no_tier", name="early")["tier"] == "connecting"
    assert "CPU tier ready" not in logged(engine)
    keeper.start()
    until_it_works(engine, plain, "late")
    assert "CPU tier ready" in logged(engine)


def test_a_server_that_is_stopped_and_started(
    engine: EngineChild, plain: PlainVllm, keeper: Keeper
) -> None:
    begin = len(logged(engine))
    keeper.stop()
    value = call(engine, plain, "no_tier", name="stopped")
    assert value["tier"] == "away"
    assert value["failures"]["tier_lost"] == 1
    keeper.start()
    until_it_works(engine, plain, "after")
    _, away, ready = logged(engine)[begin:].partition("CPU tier away")
    assert away
    assert "CPU tier ready" in ready


def test_a_server_with_another_chunk_size(
    engine: EngineChild, plain: PlainVllm, keeper: Keeper
) -> None:
    """LMCache's chunks are not kvtier's slots: it serves as before."""
    keeper.start(chunk_tokens=16)
    until_it_works(engine, plain, "small-chunks")


def test_a_server_full_of_another_models_data(
    engine: EngineChild, plain: PlainVllm, keeper: Keeper
) -> None:
    """The same tokens' KV of other weights, and of another dtype, is no hit, and makes room."""
    keeper.start()
    until_it_works(engine, plain, "own")
    staged = call(engine, plain, "stage_one", name="same-keys")
    keeper.start()
    keys = bytes.fromhex(staged["keys"])
    n_same = len(keys) // KEY_BYTES
    weights, dtype = staged["others"]
    assert occupy(keeper.endpoint, weights, keys, SLOT_BYTES) == n_same
    rest = [blake2b(b"%d" % i, digest_size=KEY_BYTES).digest() for i in range(N_SLOTS - 2 * n_same)]
    keys += b"".join(rest)
    assert occupy(keeper.endpoint, dtype, keys, SLOT_BYTES) == N_SLOTS - n_same
    assert server_status(keeper.endpoint).used_bytes == N_SLOTS * SLOT_BYTES
    engine.call("found_another")
    assert call(engine, plain, "load_one", name="same-keys", prompt=staged["prompt"]) == 0
    assert call(engine, plain, "works", name="among-others")["failures"] == {}
    assert server_status(keeper.endpoint).evicted_chunks > 0


DISKS = {
    "slow": {"type": "mock", "max_size_gb": 1.0, "mock_bandwidth_gb": 0.0002},
    "full": {"type": "mock", "max_size_gb": 0.001, "mock_bandwidth_gb": 1.0},
    "failing": {
        "type": "fault_inject",
        "rate": 1.0,
        "inner": {"type": "mock", "max_size_gb": 1.0, "mock_bandwidth_gb": 1.0},
    },
}


@pytest.mark.parametrize("disk", DISKS)
def test_a_disk_behind_the_server(
    engine: EngineChild, plain: PlainVllm, keeper: Keeper, disk: str
) -> None:
    """LMCache writes through to it; kvtier reads nothing from it, and waits for nothing of it."""
    keeper.start(extra_args=("--l2-adapter", json.dumps(DISKS[disk])))
    engine.call("found_another")
    # Twice what memory holds.
    value = call(engine, plain, "many", n_programs=16)
    assert value["failures"].keys() <= LOSSES | {"stage_l1_full"}
    assert value["loaded"] > 0
    # Behind the disk's back nothing is forgotten: all memory in use is known to be.
    status = server_status(keeper.endpoint)
    assert status.used_bytes == status.chunks * SLOT_BYTES
    _await(keeper.disk_is_idle)
    assert call(engine, plain, "works", name=f"{disk}-disk")["failures"] == {}
    assert call(engine, plain, "many", n_programs=7)["loaded"] == 7
    status = server_status(keeper.endpoint)
    assert status.used_bytes == status.chunks * SLOT_BYTES
