"""Staging: only what a commit has confirmed counts, blocks are held exactly while they are read."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.backend import Evicted, StateChanged, TierState
from kvtier.chunk_keys import ChunkChain, chain_seed
from kvtier.gpu_pin import PinTable
from kvtier.orders import Order, OrderIds, OrderResult
from kvtier.stats import Stats
from kvtier.turns.block_pool import VllmBlockPool
from kvtier.turns.stage_jobs import StageJob
from kvtier.turns.staging import ORDER_DEADLINE_S, Stager
from tests.unit.fake_vllm import BLOCK_TOKENS, FakePool, FakeRequest
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK_BLOCKS = 2
CHUNK_TOKENS = CHUNK_BLOCKS * BLOCK_TOKENS
SPLIT_CHUNKS = 3


def chain_of(tokens: Sequence[int]) -> ChunkChain:
    request = FakeRequest("r", list(tokens))
    start = ChunkChain(chain_seed(adapter=None, tenant=None), CHUNK_TOKENS)
    return start.extended(tokens, len(tokens), request.block_hashes, BLOCK_TOKENS)


def chunks(n_chunks: int, *, tail: int = 0) -> ChunkChain:
    """A chain; with another `tail` its last chunk is another one."""
    tokens = list(range(n_chunks * CHUNK_TOKENS))
    tokens[-1] += tail * 1000
    return chain_of(tokens)


class Rig:
    """A stager with its surroundings; `run` plays scheduler and workers."""

    def __init__(self, tier: VirtualTier | None = None) -> None:
        self.tier = tier or VirtualTier()
        self.pool = FakePool(60)
        self.pins = PinTable(VllmBlockPool(self.pool), 60)
        self.stats = Stats()
        self.now_s = 0.0
        self.stager = Stager(
            self.tier,
            self.pins,
            self.stats,
            namespace="ns",
            chunk_blocks=CHUNK_BLOCKS,
            split_chunks=SPLIT_CHUNKS,
            next_order_id=OrderIds(),
        )

    def start(
        self, key: str, chain: ChunkChain, *, program: str = "p", first_block: int = 1
    ) -> bool:
        blocks = tuple(range(first_block, first_block + len(chain) * CHUNK_BLOCKS + 1))
        return self.stager.start(key, program, chain, blocks, 1.0, 100.0)

    def events(self) -> None:
        for event in self.tier.poll(self.now_s):
            if isinstance(event, StateChanged):
                self.stager.forget_all()
            elif isinstance(event, Evicted):
                self.stager.copies.evicted(event)
            else:
                assert self.stager.on_event(event, self.now_s)

    def advance(self) -> list[Order]:
        self.events()
        return self.stager.advance(self.now_s)

    def orders(self, n_orders: int = 1) -> list[Order]:
        """Steps until this many orders have come."""
        found: list[Order] = []
        for _ in range(20):
            found += self.advance()
            if len(found) >= n_orders:
                return found
        raise AssertionError(f"{len(found)} orders")

    def end(self, order: Order, *, ok: bool = True) -> bool:
        return self.stager.on_result(OrderResult(order.order_id, "store", ok, 1, 0.1, 1))

    def run(self) -> list[Order]:
        """Steps until nothing is left to do; all copies succeed."""
        done: list[Order] = []
        for _ in range(100):
            ready = self.advance()
            for order in ready:
                assert self.end(order)
            done += ready
            if not self.stager.busy():
                return done
        raise AssertionError("still busy")

    def failures(self) -> dict[str, float]:
        return {
            key.removeprefix("failures|"): n
            for key, n in self.stats.totals.items()
            if key.startswith("failures|")
        }

    @property
    def quiet(self) -> bool:
        """Nothing is held anywhere."""
        return not self.pool.references and not self.tier.leaks() and not self.stager.busy()


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_turn_is_staged_in_splits(rig: Rig) -> None:
    chain = chunks(7)
    assert rig.start("t", chain)
    orders = rig.run()
    assert [len(order.slots[0]) for order in orders] == [3, 3, 1]
    assert [b for order in orders for b in order.block_ids] == list(range(1, 15))
    slots = [slot for order in orders for slot in order.slots[0]]
    assert len(set(slots)) == 7
    assert b"".join(order.keys for order in orders) == bytes(chain.keys)
    assert rig.stager.copies.chunks_of("p", chain) == 7
    assert rig.stats.totals["staged_tokens"] == 7 * CHUNK_TOKENS
    assert rig.quiet
    assert rig.failures() == {}


def test_an_order_says_where_and_until_when(rig: Rig) -> None:
    rig.now_s = 50.0
    rig.start("t", chunks(2), first_block=5)
    (order,) = rig.orders()
    assert (order.direction, order.request_id, order.skip_blocks) == ("store", "t", 0)
    assert order.block_ids == (5, 6, 7, 8)
    assert order.generation == rig.tier.region.generation
    assert order.deadline_s == 50.0 + ORDER_DEADLINE_S


def test_nothing_counts_before_its_commit(rig: Rig) -> None:
    chain = chunks(2)
    rig.start("t", chain)
    (order,) = rig.orders()
    assert rig.stager.copies.chunks_of("p", chain) == 0
    rig.end(order)
    assert rig.stager.copies.chunks_of("p", chain) == 0
    assert rig.pool.references
    rig.run()
    assert rig.stager.copies.chunks_of("p", chain) == 2


def test_blocks_are_held_until_the_last_commit(rig: Rig) -> None:
    rig.start("t", chunks(4))
    assert rig.pool.references == dict.fromkeys(range(1, 9), 1), "whole chunks only"
    first, second = rig.orders(2)
    rig.end(second)
    rig.end(first)
    assert len(rig.pool.references) == 8
    rig.run()
    assert not rig.pool.references


def test_splits_are_committed_in_order(rig: Rig) -> None:
    """A commit tells how long the prefix is: out of order, every one but the last would see a hole."""
    chain = chunks(4)
    rig.start("t", chain)
    first, second = rig.orders(2)
    rig.end(second)
    rig.advance()
    assert rig.stager.copies.chunks_of("p", chain) == 0
    rig.end(first)
    rig.run()
    assert rig.stager.copies.chunks_of("p", chain) == 4
    assert rig.failures() == {}
    assert rig.quiet


def test_more_may_be_under_way_where_chunks_are_small(rig: Rig) -> None:
    rig.stager._max_in_flight = 5
    for i in range(2):
        chain = chain_of(range(1000 * i, 1000 * i + 9 * CHUNK_TOKENS))
        rig.start(f"t{i}", chain, program=f"p{i}", first_block=1 + 20 * i)
    keys = [order.request_id for order in rig.orders(5)]
    assert sorted(keys) == ["t0", "t0", "t0", "t1", "t1"], "in turn"


def test_no_more_than_two_splits_are_under_way(rig: Rig) -> None:
    for i in range(4):
        rig.start(f"t{i}", chunks(3, tail=i), program=f"p{i}", first_block=1 + 7 * i)
    assert len(rig.orders(2)) == 2
    for _ in range(3):
        assert rig.advance() == []
    assert rig.tier.table.counts()["reservations"] == 2
    assert rig.stager.n_jobs == 4


def test_only_what_is_new_is_staged(rig: Rig) -> None:
    tokens = list(range(5 * CHUNK_TOKENS))
    rig.start("t1", chain_of(tokens[: 2 * CHUNK_TOKENS]))
    rig.run()
    rig.start("t2", chain_of(tokens))
    orders = rig.run()
    assert [b for order in orders for b in order.block_ids] == list(range(5, 11))
    assert rig.stats.totals["staged_tokens"] == 5 * CHUNK_TOKENS
    assert not rig.start("again", chain_of(tokens))
    assert rig.quiet


def test_what_another_program_stored_is_not_copied(rig: Rig) -> None:
    rig.start("t1", chunks(3))
    rig.run()
    rig.start("t2", chunks(3, tail=1), program="q")
    (order,) = rig.run()
    assert order.slots[0][:2] == [-1, -1]
    assert order.slots[0][2] >= 0
    rig.start("t3", chunks(3), program="r")
    assert rig.run() == [], "all there: confirmed without a copy"
    assert rig.stager.copies.chunks_of("r", chunks(3)) == 3
    assert rig.quiet


def test_a_longer_turn_replaces_the_job_that_it_includes(rig: Rig) -> None:
    rig.start("t1", chunks(2))
    rig.start("other", chunks(3, tail=1))
    assert rig.start("t2", chunks(4))
    assert rig.stager.n_jobs == 2, "the one with another tail goes on"
    rig.run()
    assert rig.quiet


@pytest.mark.parametrize("moment", ["reserving", "ordered", "copying", "committing"])
def test_cancelled_at_any_moment(rig: Rig, moment: str) -> None:
    chain = chunks(2)
    rig.start("t", chain)
    order = None
    if moment == "reserving":
        assert rig.advance() == []
    elif moment == "ordered":
        rig.advance()
        rig.events()
    else:
        (order,) = rig.orders()
        if moment == "committing":
            rig.end(order)
    rig.stager.cancel("t")
    assert not rig.pool.references, "blocks come back at once"
    if moment == "copying":
        assert order is not None
        rig.end(order)
    assert rig.run() == []
    assert rig.quiet
    # A commit that was sent is proof, whatever became of the job; a copy after the fact is not.
    assert rig.stager.copies.chunks_of("p", chain) == (2 if moment == "committing" else 0)
    rig.stager.cancel("t")


def test_a_failed_copy_ends_the_job(rig: Rig) -> None:
    chain = chunks(2)
    rig.start("t", chain)
    (order,) = rig.orders()
    rig.end(order, ok=False)
    rig.run()
    assert rig.failures() == {"stage_store_copy": 1}
    assert rig.stager.copies.chunks_of("p", chain) == 0
    assert rig.tier.l1.n_free == 1000
    assert rig.quiet


@pytest.mark.parametrize("operation", ["reserve", "commit"])
def test_a_refusal_of_the_tier_ends_the_job(rig: Rig, operation: str) -> None:
    chain = chunks(4)
    rig.tier.fail = lambda name: "server_error" if name == operation else None
    rig.start("t", chain)
    rig.run()
    assert rig.failures() == {"stage_server_error": 1}
    assert rig.stager.copies.chunks_of("p", chain) == 0
    assert rig.quiet


def test_a_full_tier_keeps_what_fitted() -> None:
    rig = Rig(VirtualTier(n_slots=4))
    chain = chunks(6)
    rig.start("t", chain)
    rig.run()
    assert rig.failures() == {"stage_l1_full": 1}
    assert rig.stager.copies.chunks_of("p", chain) == 3
    assert rig.quiet


def test_a_hole_found_in_a_full_tier_ends_the_job() -> None:
    """The second split finds no room, then the first one's commit tells that there is a hole."""
    rig = Rig(VirtualTier(n_slots=2 + SPLIT_CHUNKS))
    chain = chunks(8)
    rig.start("t1", chain_of(range(2 * CHUNK_TOKENS)))
    rig.run()
    rig.start("t2", chain)
    (order,) = rig.orders()
    rig.advance()
    assert rig.failures() == {"stage_l1_full": 1}
    rig.tier.table.drop("ns", "p")
    rig.end(order)
    rig.run()
    assert rig.quiet


def test_a_lost_prefix_is_staged_again_once(rig: Rig) -> None:
    chain = chunks(8)
    rig.start("t1", chain_of(range(2 * CHUNK_TOKENS)))
    rig.run()
    rig.tier.table.drop("ns", "p")
    rig.start("t2", chain)
    orders = rig.run()
    assert rig.stager.copies.chunks_of("p", chain) == 8
    assert rig.failures() == {}
    assert orders[0].block_ids[0] == 5, "first what seemed to be missing"
    assert rig.quiet


def test_a_prefix_that_does_not_stay_is_given_up(rig: Rig) -> None:
    chain = chunks(4)
    rig.start("t", chain)
    for _ in range(20):
        for order in rig.advance():
            rig.end(order)
            rig.tier.table.drop("ns", "p")
            for chunk in list(rig.tier.l1.chunks):
                rig.tier.l1.delete([chunk])
        if not rig.stager.busy():
            break
    # Each commit says what is resident: with everything gone behind it, never the whole chain.
    assert rig.stager.copies.chunks_of("p", chain) < 4
    assert not rig.stager.busy()
    assert not rig.pool.references


def test_two_engines_stage_the_same_chunks(rig: Rig) -> None:
    """The chunks that the other one is writing get no slot; they are there when it commits."""
    chain = chunks(8)
    keys = bytes(chain.keys)
    other = rig.tier.table.reserve("other", 1, "ns", "p", keys, 0, 8, 1, 1, 1.0, 100.0, 0.0)
    assert other is not None
    rig.start("t", chain)
    rig.advance()
    rig.advance()
    rig.tier.table.commit("other", 1, 0.0, ok=True)
    rig.run()
    assert rig.failures() == {}
    assert rig.stager.copies.chunks_of("p", chain) == 8
    assert rig.quiet


@pytest.mark.parametrize("restarted", [False, True])
def test_a_lost_tier_ends_all_jobs(rig: Rig, *, restarted: bool) -> None:
    chain = chunks(4)
    rig.start("t1", chain)
    orders = rig.orders(2)
    rig.start("t2", chunks(3, tail=1), program="q", first_block=20)
    rig.tier.lose()
    rig.advance()
    assert not rig.pool.references
    assert rig.stager.copies.chunks_of("p", chain) == 0
    for order in orders:
        rig.end(order)
    rig.tier.come_back(restarted=restarted)
    assert rig.run() == []
    assert rig.quiet
    assert rig.start("t3", chain)
    assert len(rig.run()) == 2
    assert rig.stager.copies.chunks_of("p", chain) == 4


def test_an_order_that_waited_too_long_is_not_sent(rig: Rig) -> None:
    rig.start("t", chunks(2))
    rig.advance()
    rig.events()
    rig.now_s += ORDER_DEADLINE_S
    assert rig.stager.advance(rig.now_s) == []
    rig.run()
    assert not rig.tier.leaks()
    assert not rig.stager.busy(), "a job without a live split would keep the engine stepping"
    assert not rig.pool.references


def test_pressure_cancels_the_youngest(rig: Rig) -> None:
    for i in range(2):
        rig.start(f"t{i}", chunks(2, tail=i), program=f"p{i}", first_block=1 + 10 * i)
    assert rig.stager.cancel_one_for_room()
    assert set(rig.pool.references) == {1, 2, 3, 4}
    assert rig.stager.cancel_one_for_room()
    assert not rig.stager.cancel_one_for_room()
    assert rig.failures() == {"stage_cancelled_pressure": 2}


def test_a_lookup_corrects_what_was_believed(rig: Rig) -> None:
    chain = chunks(4)
    rig.start("t", chain)
    rig.run()
    rig.stager.copies.correct("p", chain, 4)
    assert rig.stager.copies.chunks_of("p", chain) == 4
    rig.stager.copies.correct("p", chain, 3)
    assert rig.stager.copies.chunks_of("p", chain) == 3
    rig.stager.copies.correct("unknown", chain, 0)


def test_a_lookup_of_another_branch_corrects_nothing_beyond_it(rig: Rig) -> None:
    """A sub-agent asks for a shorter or another chain: all that it shares was found."""
    chain = chunks(4)
    rig.start("t", chain)
    rig.run()
    rig.stager.copies.correct("p", chunks(2), 2)
    assert rig.stager.copies.chunks_of("p", chain) == 4
    branch = chain_of([*range(2 * CHUNK_TOKENS), *range(900, 900 + 2 * CHUNK_TOKENS)])
    rig.stager.copies.correct("p", branch, 2)
    assert rig.stager.copies.chunks_of("p", chain) == 4
    rig.stager.copies.correct("p", branch, 1)
    assert rig.stager.copies.chunks_of("p", chain) == 1


@pytest.mark.parametrize("how", ["program", "all"])
@pytest.mark.parametrize("moment", ["copying", "committing"])
def test_what_is_forgotten_does_not_come_back(rig: Rig, how: str, moment: str) -> None:
    """The program ended, or the weights changed, while its turn was being staged."""
    chain = chunks(2)
    rig.start("t", chain)
    (order,) = rig.orders()
    if moment == "committing":
        rig.end(order)
    if how == "program":
        rig.stager.forget("p")
    else:
        rig.stager.forget_all()
    assert not rig.pool.references, "nobody will read the copy: its blocks are free"
    if moment == "copying":
        rig.end(order)
    rig.run()
    assert rig.stager.copies.chunks_of("p", chain) == 0
    assert rig.stager.copies._staged == {}, "memory would grow with every program that ends"
    assert rig.quiet


def test_a_forgotten_program_leaves_others_alone(rig: Rig) -> None:
    rig.start("t", chunks(2))
    rig.start("u", chunks(2, tail=1), program="q", first_block=20)
    rig.stager.forget("p")
    rig.run()
    assert rig.stager.copies.chunks_of("q", chunks(2, tail=1)) == 2


def test_events_and_results_of_others_are_left_to_them(rig: Rig) -> None:
    rig.tier.lookup("ns", "p", b"")
    (event,) = rig.tier.poll(0.0)
    assert not isinstance(event, StateChanged | Evicted)
    assert not rig.stager.on_event(event, 0.0)
    assert not rig.stager.on_result(OrderResult(99, "store", True, 1, 0.1, 1))


def test_without_a_tier_nothing_starts_to_move(rig: Rig) -> None:
    rig.tier.lose()
    rig.tier.poll(0.0)
    assert rig.tier.state is TierState.AWAY
    rig.start("t", chunks(2))
    assert rig.stager.advance(0.0) == []
    assert rig.failures() == {"stage_no_tier": 1}
    assert rig.quiet


class CountedJobs(OrderedDict[str, StageJob]):
    """Jobs, and how many of them somebody has looked at."""

    looked_at = 0

    def values(self) -> Any:
        for job in super().values():
            self.looked_at += 1
            yield job


def test_of_many_jobs_a_step_looks_at_those_whose_turn_it_is() -> None:
    rig = Rig()
    rig.stager._jobs = jobs = CountedJobs()
    for i in range(1000):
        assert rig.start(f"r{i}", chunks(2, tail=i), program=f"p{i}")
    assert jobs.looked_at == 0
    rig.advance()
    rig.advance()
    assert jobs.looked_at < 20
    rig.stager.cancel("r0")
    rig.stager.cancel_all()
    assert not rig.stager._jobs_of
