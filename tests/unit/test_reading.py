"""Reading back: every lock that a lookup took is given back, whatever becomes of the request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtier.backend import StateChanged
from kvtier.orders import Order, OrderIds, OrderResult
from kvtier.stats import Stats
from kvtier.turns.reading import LoadDone, TierReader
from kvtier.turns.staging import ORDER_DEADLINE_S
from kvtier.wire import KEY_BYTES
from tests.unit.fake_vllm import BLOCK_TOKENS
from tests.unit.test_staging import CHUNK_BLOCKS, CHUNK_TOKENS, chunks
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from kvtier.chunk_keys import ChunkChain

BLOCKS = tuple(range(10, 30))


class Rig:
    """A reader on a tier that holds 5 chunks."""

    def __init__(self, answer_after: int = 0) -> None:
        self.tier = VirtualTier(slot_bytes=100, answer_after=answer_after)
        self.stats = Stats()
        self.reader = TierReader(
            self.tier,
            self.stats,
            namespace="ns",
            block_tokens=BLOCK_TOKENS,
            chunk_blocks=CHUNK_BLOCKS,
            order_ids=OrderIds(),
        )
        self.chain: ChunkChain = chunks(8)
        keys = bytes(self.chain.keys)
        slots = self.tier.table.reserve("other", 1, "ns", "p", keys, 0, 5, 1, 100, 1.0, 99.0, 0.0)
        assert slots is not None
        self.slots: list[int] = slots[0]
        assert self.tier.table.commit("other", 1, 0.0, ok=True) == 5

    def poll(self) -> None:
        for event in self.tier.poll(0.0):
            if isinstance(event, StateChanged):
                self.reader.tier_lost()
            else:
                assert self.reader.on_event(event)

    def ask(self, request_id: str = "r") -> int | None:
        self.reader.ask(request_id, "p", self.chain)
        self.poll()
        return self.reader.hit_chunks(request_id)

    def load(self, start_token: int, n_tokens: int, request_id: str = "r") -> Order:
        self.reader.load(request_id, BLOCKS, start_token, n_tokens, now_s=7.0, predicted_s=0.5)
        (order,) = self.reader.take_orders()
        return order

    def end(self, order: Order, *, ok: bool = True) -> LoadDone | None:
        return self.reader.on_result(OrderResult(order.order_id, "load", ok, 1, 0.1, 1))

    @property
    def locked(self) -> int:
        return self.tier.table.counts()["locked_chunks"]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_an_answer_locks_what_is_there() -> None:
    rig = Rig(answer_after=1)
    assert rig.ask() is None
    assert rig.reader.asked("r")
    rig.poll()
    assert rig.reader.hit_chunks("r") == 5
    assert rig.locked == 5
    rig.reader.release("r")
    assert rig.locked == 0
    assert not rig.reader.asked("r")


def test_an_order_loads_exactly_what_was_chosen(rig: Rig) -> None:
    rig.ask()
    order = rig.load(CHUNK_TOKENS, 3 * CHUNK_TOKENS)
    assert order.direction == "load"
    assert order.block_ids == BLOCKS[2:8]
    assert order.slots == [rig.slots[1:4]]
    assert order.keys == bytes(rig.chain.keys[KEY_BYTES : 4 * KEY_BYTES])
    assert (order.skip_blocks, order.chunk_blocks) == (0, CHUNK_BLOCKS)
    assert order.generation == rig.tier.region.generation
    assert order.deadline_s == 7.0 + ORDER_DEADLINE_S
    assert rig.locked == 3, "the rest is unlocked at once"
    assert rig.reader.take_orders() == []


def test_a_load_never_writes_blocks_that_hold_valid_kv(rig: Rig) -> None:
    """The GPU holds a part of the first chunk: its blocks are shared with others."""
    rig.ask()
    start = CHUNK_TOKENS + BLOCK_TOKENS
    order = rig.load(start, 3 * CHUNK_TOKENS - start)
    assert order.slots == [rig.slots[1:3]]
    assert order.block_ids == BLOCKS[2:6]
    assert order.skip_blocks == 1


@pytest.mark.parametrize("ok", [True, False])
def test_locks_last_until_the_load_has_ended(rig: Rig, *, ok: bool) -> None:
    rig.ask()
    order = rig.load(0, 2 * CHUNK_TOKENS)
    assert rig.reader.loading("r")
    assert (rig.reader.n_loads, rig.reader.backlog_tokens) == (1, 2 * CHUNK_TOKENS)
    assert rig.locked == 2
    assert rig.end(order, ok=ok) == LoadDone("r", ok, 2 * CHUNK_TOKENS, 0.5)
    assert rig.locked == 0
    assert not rig.reader.loading("r")
    assert (rig.reader.n_loads, rig.reader.backlog_tokens) == (0, 0)
    assert rig.stats.totals.get("failures|load_copy", 0) == (0 if ok else 1)
    assert rig.end(order) is None


def test_an_aborted_request_keeps_its_load_but_not_its_lookup(rig: Rig) -> None:
    rig.ask()
    order = rig.load(0, 2 * CHUNK_TOKENS)
    rig.reader.release("r")
    assert rig.locked == 2, "the copy still reads"
    rig.end(order)
    assert rig.locked == 0


def test_released_while_the_answer_is_out() -> None:
    rig = Rig(answer_after=2)
    rig.ask()
    rig.reader.release("r")
    rig.reader.release("r")
    assert rig.locked == 5
    rig.poll()
    rig.poll()
    assert rig.tier.idle
    assert rig.locked == 0, "nobody waits for the answer: its locks go back"


def test_asked_anew_while_the_first_answer_is_out() -> None:
    rig = Rig(answer_after=2)
    rig.ask()
    rig.reader.release("r")
    assert rig.ask() is None
    rig.poll()
    assert rig.reader.hit_chunks("r") is None, "the first answer is not this question's"
    for _ in range(2):
        rig.poll()
    assert rig.reader.hit_chunks("r") == 5
    assert set(rig.tier.l1.locks.values()) == {1}
    rig.reader.release("r")
    assert rig.locked == 0


def test_a_failed_lookup_is_a_miss(rig: Rig) -> None:
    rig.tier.fail = lambda _: "server_error"
    assert rig.ask() == 0
    assert rig.stats.totals == {"failures|lookup_server_error": 1}
    rig.reader.release("r")
    assert rig.locked == 0


@pytest.mark.parametrize("restarted", [False, True])
def test_a_lost_tier_makes_answers_misses(rig: Rig, *, restarted: bool) -> None:
    assert rig.ask("answered") == 5
    rig.reader.ask("out", "p", rig.chain)
    rig.tier.lose()
    rig.poll()
    assert rig.reader.hit_chunks("answered") == 0
    assert rig.reader.hit_chunks("out") == 0
    rig.tier.come_back(restarted=restarted)
    rig.poll()
    for request_id in ("answered", "out"):
        rig.reader.release(request_id)
    assert rig.locked == 0
    assert rig.ask("again") == (0 if restarted else 5)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_load_ends_although_the_tier_went_away(rig: Rig, *, restarted: bool) -> None:
    rig.ask()
    order = rig.load(0, CHUNK_TOKENS)
    rig.tier.lose()
    rig.poll()
    rig.tier.come_back(restarted=restarted)
    done = rig.end(order)
    assert done is not None
    assert done.ok
    assert rig.locked == 0


def test_locks_that_were_handed_over_are_given_back_once(rig: Rig) -> None:
    rig.ask("p")
    found = rig.reader.take("p", 1, 4)
    assert rig.locked == 3
    assert found.slots[0] == rig.slots
    assert found.generation == rig.tier.region.generation
    rig.reader.release("p")
    assert rig.locked == 3, "it is no lookup any more"
    rig.reader.unlock(found)
    assert rig.locked == 0


def test_locks_that_a_lost_tier_has_taken_back(rig: Rig) -> None:
    rig.ask("p")
    found = rig.reader.take("p", 0, 5)
    rig.tier.lose()
    rig.reader.unlock(found)
    rig.tier.come_back(restarted=True)
    rig.reader.unlock(found)
    assert rig.locked == 0


def test_two_requests_share_chunks(rig: Rig) -> None:
    rig.ask("a")
    rig.ask("b")
    rig.reader.release("a")
    assert rig.locked == 5
    rig.reader.release("b")
    assert rig.locked == 0


def test_events_and_results_of_others_are_left_to_them(rig: Rig) -> None:
    rig.tier.commit(77, ok=True)
    (event,) = rig.tier.poll(0.0)
    assert not isinstance(event, StateChanged)
    assert not rig.reader.on_event(event)
    assert rig.reader.on_result(OrderResult(5, "store", True, 1, 0.1, 1)) is None
