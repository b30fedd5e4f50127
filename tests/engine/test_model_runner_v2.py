"""vLLM's second model runner, the default on GPUs, asks connectors in another order: its own caller of hooks, on a CPU."""

from __future__ import annotations

import os
import time
import uuid
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

pytest.importorskip("vllm.v1.worker.gpu.kv_connector")

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

from kvtier.backend import Region
from kvtier.connector import KVTierConnector
from kvtier.cpu_pool import SHM_DIRECTORY
from kvtier.metadata import KVTierMetadata
from kvtier.orders import Order, StepOrders
from kvtier.worker_half import WorkerHalf

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

N_BLOCKS, CHUNK_BLOCKS = 12, 2
SHAPE = (N_BLOCKS, 2, 4, 16)
SLOT_BYTES = 2 * CHUNK_BLOCKS * 2 * 4 * 16 * 2
REGION_BYTES = 1 << 16
WAIT_S = 30.0


@pytest.fixture
def region() -> Iterator[Region]:
    path = SHM_DIRECTORY / f"kvtier-test-{uuid.uuid4().hex}"
    path.touch(mode=0o600)
    os.truncate(path, REGION_BYTES)
    yield Region(path.name, REGION_BYTES, "one")
    path.unlink()


@pytest.fixture
def caches() -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.randn(SHAPE, dtype=torch.bfloat16) for i in range(2)}


@pytest.fixture
def runner(
    caches: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ActiveKVConnector]:
    """What calls the hooks in the second model runner."""
    connector = KVTierConnector.__new__(KVTierConnector)
    connector._connector_metadata = None
    connector.scheduler_half = connector._lease = None
    connector._stats_off, connector._step_id = {}, 0
    connector.worker_half = WorkerHalf(
        rank=0, slot_bytes=SLOT_BYTES, chunk_blocks=CHUNK_BLOCKS, n_blocks=N_BLOCKS
    )
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", connector)
    yield ActiveKVConnector(VllmConfig(), caches)
    connector.shutdown()


def order(direction: str, order_id: int, blocks: tuple[int, ...], slots: list[int]) -> Order:
    return Order(
        order_id=order_id,
        direction=direction,  # type: ignore[arg-type]
        request_id=f"r{order_id}",
        block_ids=blocks,
        slots=[slots],
        chunk_blocks=CHUNK_BLOCKS,
        skip_blocks=0,
        generation="one",
        deadline_s=time.monotonic() + 600.0,
    )


def steps(runner: ActiveKVConnector, orders: StepOrders) -> list[Any]:
    """Steps in which nothing is computed, until one tells of the orders' end; what each said."""
    said = []
    deadline_s = time.monotonic() + WAIT_S
    while True:
        assert time.monotonic() < deadline_s
        output = SimpleNamespace(
            kv_connector_metadata=KVTierMetadata(orders),
            has_sync_kv_loads=False,
            finished_req_ids=set(),
        )
        said.append(runner.no_forward(output).kv_connector_output)
        if said[-1].kv_connector_worker_meta.results:
            return said
        assert runner.kv_connector.worker_half._pool.drain(WAIT_S)
        orders = StepOrders(orders.region, [], [])


def test_what_it_stores_it_loads(
    runner: ActiveKVConnector, region: Region, caches: dict[str, torch.Tensor]
) -> None:
    wanted = [cache[[3, 7]].clone() for cache in caches.values()]
    said = steps(runner, StepOrders(region, [], [order("store", 1, (3, 7), [0])]))
    assert all(not step.finished_recving for step in said)
    said = steps(runner, StepOrders(region, [order("load", 2, (8, 2), [0])], []))
    assert said[-1].finished_recving == {"r2"}
    assert not said[-1].invalid_block_ids
    assert not said[-1].failed_recving
    for cache, was in zip(caches.values(), wanted, strict=True):
        assert torch.equal(cache[[8, 2]], was)


def test_a_load_that_fails_names_its_blocks_in_the_step_that_ends_it(
    runner: ActiveKVConnector, region: Region
) -> None:
    beyond = order("load", 1, (8, 2), [REGION_BYTES])
    said = steps(runner, StepOrders(region, [beyond], []))
    assert said[-1].finished_recving == {"r1"}
    assert said[-1].invalid_block_ids == {8, 2}
    (result,) = said[-1].kv_connector_worker_meta.results
    assert not result.ok


def test_copies_begin_before_the_step_computes(runner: ActiveKVConnector, region: Region) -> None:
    # It starts "asynchronous loads" behind the model's work, for connectors whose starting takes long.
    output = SimpleNamespace(
        kv_connector_metadata=KVTierMetadata(
            StepOrders(region, [], [order("store", 1, (3, 7), [0])])
        ),
        has_sync_kv_loads=False,
        finished_req_ids=set(),
    )
    runner.pre_forward(output)
    assert runner.kv_connector.worker_half._pool.drain(WAIT_S)
    runner.finish_forward()
    said = runner.post_forward(set())
    assert said is not None
    assert [result.ok for result in said.kv_connector_worker_meta.results] == [True]
