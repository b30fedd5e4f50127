"""References on vLLM's blocks: taken over, added and dropped without a walk through vLLM where possible."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvtier.turns.block_pool import VllmBlockPool, request_blocks, spare_lookups
from tests.unit.fake_vllm import FakeBlock, FakePool


class Rig:
    def __init__(self) -> None:
        self.vllm = FakePool(8)
        self.tables: dict[str, list[FakeBlock]] = {}
        self.pool = VllmBlockPool(self.vllm, self.tables)

    def run(self, request_id: str, n_blocks: int) -> Any:
        """A request that has so many hashed blocks."""
        blocks = self.vllm.take(n_blocks)
        assert blocks is not None
        for block in blocks:
            self.vllm.cache(block.block_id, b"%d" % block.block_id)
        self.tables[request_id] = blocks
        return np.array([block.block_id for block in blocks])

    def finish(self, request_id: str) -> None:
        """What vLLM does after the connector's hook."""
        self.vllm.free_blocks(reversed(self.tables.pop(request_id)))


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_finished_requests_references_become_ours(rig: Rig) -> None:
    ids = rig.run("r", 4)
    assert rig.pool.take_over("r", ids[:3])
    rig.finish("r")
    assert rig.vllm.references == dict.fromkeys(ids[:3].tolist(), 1), "the rest was given back"
    rig.pool.release(ids[:3])
    assert not rig.vllm.references
    assert rig.pool.n_free == 8


@pytest.mark.parametrize(
    ("request_id", "pick"),
    [
        ("another", [0, 1]),
        ("r", [1, 2]),
        ("r", [0, 2]),
        ("r", []),
        ("r", [0, 1, 2, 3, 0]),
    ],
)
def test_what_is_not_its_head_is_not_taken_over(rig: Rig, request_id: str, pick: list[int]) -> None:
    ids = rig.run("r", 4)
    assert not rig.pool.take_over(request_id, ids[pick])
    rig.finish("r")
    assert not rig.vllm.references


def test_nothing_is_taken_over_without_the_lists(rig: Rig) -> None:
    ids = rig.run("r", 2)
    assert not VllmBlockPool(rig.vllm).take_over("r", ids)


def test_one_group_of_blocks_has_lists_several_have_not() -> None:
    group = SimpleNamespace(req_to_blocks={"r": []})
    one = SimpleNamespace(coordinator=SimpleNamespace(single_type_managers=(group,)))
    two = SimpleNamespace(coordinator=SimpleNamespace(single_type_managers=(group, group)))
    assert request_blocks(one) is group.req_to_blocks
    assert request_blocks(two) is None
    assert request_blocks(SimpleNamespace()) is None


def test_shared_blocks_are_only_counted_down(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = rig.run("r", 3)
    rig.pool.acquire(ids)
    monkeypatch.setattr(rig.vllm, "free_blocks", None)
    rig.pool.release(ids)
    assert rig.vllm.references == dict.fromkeys(ids.tolist(), 1)


def test_a_mix_of_shared_blocks_and_ours_alone_is_given_back_exactly(rig: Rig) -> None:
    ids = rig.run("r", 3)
    rig.pool.acquire(ids)
    only_last = rig.vllm.blocks[ids[-1]]
    rig.vllm.free_blocks([b for b in rig.tables.pop("r") if b is not only_last])
    rig.pool.release(ids)
    assert rig.vllm.references == {only_last.block_id: 1}
    assert rig.pool.n_free == 7


HASHES = [b"hash %d" % i for i in range(8)]


def test_new_blocks_come_with_a_reference_or_not_at_all(rig: Rig) -> None:
    first = rig.pool.allocate(5)
    assert first is not None
    assert rig.vllm.references == dict.fromkeys(first.tolist(), 1)
    assert rig.pool.allocate(4) is None
    assert rig.pool.n_free == 3
    rig.pool.release(first)
    assert rig.pool.n_free == 8


def test_loaded_blocks_are_hit_from_then_on(rig: Rig) -> None:
    ids = rig.pool.allocate(3)
    assert ids is not None
    assert rig.pool.cached_prefix(HASHES).tolist() == []
    assert rig.pool.cache(ids, HASHES[:3], 0).tolist() == ids.tolist()
    assert rig.pool.cached_prefix(HASHES).tolist() == ids.tolist()
    assert rig.pool.cached_prefix(HASHES[1:]).tolist() == ids[1:].tolist()


def test_what_is_cached_already_stays(rig: Rig) -> None:
    theirs = rig.pool.allocate(2)
    ours = rig.pool.allocate(5)
    assert theirs is not None
    assert ours is not None
    rig.vllm.cache(theirs[0], HASHES[1])
    rig.vllm.cache(theirs[1], HASHES[4])
    hit = [ours[0], theirs[0], ours[2], ours[3], theirs[1]]
    assert rig.pool.cache(ours, HASHES[:5], 0).tolist() == hit
    assert rig.pool.cached_prefix(HASHES).tolist() == hit
    hashed = [rig.vllm.blocks[block].block_hash for block in ours]
    assert hashed == [HASHES[0], None, HASHES[2], HASHES[3], None]


class FakeManager:
    """vLLM's KV cache manager, of which only lookups matter here."""

    empty_kv_cache_blocks = "no blocks"

    def __init__(self) -> None:
        self.looked_up: list[str] = []

    def get_computed_blocks(self, request: Any, most_tokens: int = 64) -> tuple[str, int, int]:
        self.looked_up.append(request.request_id)
        return "blocks", most_tokens, 16


def test_a_deferred_request_is_not_looked_up() -> None:
    manager, deferred, asked = FakeManager(), {"b"}, []

    def defers(request_id: str) -> bool:
        asked.append(request_id)
        return request_id in deferred

    spare_lookups(manager, SimpleNamespace(defers=defers))
    a, b = SimpleNamespace(request_id="a"), SimpleNamespace(request_id="b")
    # Until vLLM has answered once, nobody knows what its answers look like.
    assert manager.get_computed_blocks(b) == ("blocks", 64, 16)
    assert manager.get_computed_blocks(b) == ("no blocks", 0, 0)
    assert manager.get_computed_blocks(a, most_tokens=32) == ("blocks", 32, 16)
    deferred.clear()
    assert manager.get_computed_blocks(b) == ("blocks", 64, 16)
    assert manager.looked_up == ["b", "a", "b"]
    assert asked == ["b", "a", "b"], "once each"
