"""Making room: a pin never makes a request wait that could otherwise run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvtier.gpu_pin import PinTable, ReleaseCause
from kvtier.orders import OrderIds
from kvtier.stats import Stats
from kvtier.turns.block_pool import VllmBlockPool, wrap_allocation
from kvtier.turns.room import Room
from kvtier.turns.staging import STALL_S, STALL_STEPS, Stager
from tests.unit.fake_vllm import FakePool, FakeRequest
from tests.unit.test_staging import CHUNK_BLOCKS, chunks
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from kvtier.gpu_pin import Pin, Released

N_BLOCKS = 12


class Rig:
    """A pool of 12 blocks; `fill` pins KV of finished turns, `ask` allocates for a request."""

    def __init__(self) -> None:
        self.pool = FakePool(N_BLOCKS)
        adapter = VllmBlockPool(self.pool)
        self.pins = PinTable(adapter, N_BLOCKS)
        self.stager = Stager(
            VirtualTier(),
            self.pins,
            Stats(),
            namespace="ns",
            chunk_blocks=CHUNK_BLOCKS,
            split_chunks=4,
            next_order_id=OrderIds(),
        )
        self.noted: list[Released] = []
        self.room = Room(adapter, self.pins, self.stager, self._note)
        self.regret: dict[str, float] = {}
        self.retries = 0
        # Blocks that vLLM keeps for requests whose KV is being loaded.
        self.reserved = 0
        self.now_s = 0.0

    def _note(self, *released: Released) -> None:
        self.noted += released

    def fill(self, **turns: int) -> dict[str, list[int]]:
        """Pin new blocks for each turn; its program is the key's first letter."""
        blocks = {}
        for key, n_blocks in turns.items():
            taken = self.pool.take(n_blocks)
            assert taken is not None
            blocks[key] = [b.block_id for b in taken]
            assert self.pins.pin(key, key[0], blocks[key], now_s=0.0, ttl_s=100.0)
            self.pool.free_blocks(taken)
        return blocks

    def ask(
        self,
        n_blocks: int,
        status: str = "WAITING",
        *,
        program: str = "?",
        knows_need: bool = False,
    ) -> Any:
        """What the wrapped `allocate_slots` does; `knows_need`: where vLLM tells what it needs."""

        def allocate() -> Any:
            self.retries += 1
            if n_blocks > self.pool.get_num_free_blocks() - self.reserved:
                return None
            return self.pool.take(n_blocks)

        request = FakeRequest("w", [1])
        request.set_status(status)
        result = allocate()
        if result is not None:
            return result
        return self.room.make(
            request,
            allocate,
            own_program=program,
            regret_s_per_block=self._regret,
            now_s=self.now_s,
            need_blocks=(lambda: n_blocks) if knows_need else (lambda: 0),
        )

    def _regret(self, pin: Pin) -> float:
        return self.regret.get(pin.key, 0.0)

    @property
    def released(self) -> list[str]:
        return [item.pin.key for item in self.noted]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_the_cheapest_pins_go_and_no_more_than_needed(rig: Rig) -> None:
    rig.fill(a=4, b=4, c=4)
    rig.regret = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert len(rig.ask(6)) == 6
    assert rig.released == ["b", "c"]
    assert {item.cause for item in rig.noted} == {ReleaseCause.PRESSURE}
    assert "a" in rig.pins


def test_the_requests_own_program_goes_last(rig: Rig) -> None:
    rig.fill(own=4, b=4)
    rig.regret = {"own": 0.0, "b": 9.0}
    rig.ask(6, program="o")
    assert rig.released == ["b"]
    rig.ask(6, program="o")
    assert rig.released == ["b", "own"]


def test_pins_stay_when_ending_them_would_not_help(rig: Rig) -> None:
    running = rig.pool.take(6)
    rig.fill(a=3, b=3)
    before = rig.pool.references
    assert rig.ask(8) is None
    assert rig.pool.references == before
    assert {"a", "b"} == {pin.key for pin in rig.pins.pins()}
    assert rig.noted == [], "nothing ended, so nothing is counted"
    assert running is not None


def test_a_futile_attempt_is_not_repeated_until_there_is_more(rig: Rig) -> None:
    running = rig.pool.take(6)
    assert running is not None
    rig.fill(a=3, b=3)
    assert rig.ask(8) is None
    rig.retries = 0
    assert rig.ask(8) is None
    assert rig.retries == 1, "only the attempt that failed to begin with"
    rig.pool.free_blocks(running[:2])
    assert len(rig.ask(8)) == 8


def test_a_forgotten_request_starts_over(rig: Rig) -> None:
    rig.pool.take(6)
    rig.fill(a=6)
    assert rig.ask(8) is None
    rig.room.forget("w")
    rig.retries = 0
    rig.ask(8)
    assert rig.retries == 2


def test_it_is_tried_again_when_a_copy_lets_go_of_pinned_blocks(rig: Rig) -> None:
    """While a turn is staged, ending its pin frees nothing; afterwards it does."""
    blocks = rig.fill(a=12)["a"]
    chain = chunks(12 // CHUNK_BLOCKS)
    rig.stager.start("a", "a", chain, tuple(blocks), 1.0, 10.0)
    assert rig.ask(4) is None
    rig.stager.cancel("a")
    assert rig.ask(4) is not None
    assert rig.released == ["a"]


def test_it_is_tried_again_when_a_request_lets_go_of_pinned_blocks(rig: Rig) -> None:
    """A sub-agent runs on the same prefix as a pinned turn, and others grow meanwhile."""
    shared = rig.fill(a=6)["a"]
    users = [rig.pool.blocks[b] for b in shared]
    rig.pool.touch(users)
    rig.pool.take(4)
    assert rig.ask(3) is None
    rig.pool.take(1)
    rig.pool.free_blocks(users)
    rig.room.given_back()
    assert rig.ask(3) is not None


def test_whether_it_lacks_room_can_be_asked_before_it_tries(rig: Rig) -> None:
    shared = rig.fill(a=6)["a"]
    users = [rig.pool.blocks[b] for b in shared]
    rig.pool.touch(users)
    rig.pool.take(4)
    assert not rig.room.lacks("w", 3), "it has not tried yet"
    assert rig.ask(3) is None
    assert rig.room.lacks("w", 3)
    rig.pool.take(1)
    rig.pool.free_blocks(users)
    rig.room.given_back()
    assert not rig.room.lacks("w", 3)
    assert rig.ask(3) is not None


def test_who_wanted_more_than_it_needs_beyond_its_prefix_lacks_that_much(rig: Rig) -> None:
    """What of its prefix is cached and free counts, too: vLLM takes that from the free blocks."""
    rig.pool.take(6)
    assert rig.ask(8, knows_need=True) is None
    assert rig.room.lacks("w", 2)
    rig.room.forget("w")
    assert not rig.room.lacks("w", 2)


def test_it_is_tried_again_when_what_vllm_kept_for_another_request_is_free(rig: Rig) -> None:
    rig.fill(a=12)
    rig.reserved = 8
    assert rig.ask(8, knows_need=True) is None
    rig.reserved = 0
    assert rig.ask(8, knows_need=True) is None, "nothing has happened that it could know of"
    rig.room.given_back()
    assert len(rig.ask(8, knows_need=True)) == 8


def test_a_running_request_takes_what_it_can_get(rig: Rig) -> None:
    """It would be preempted otherwise: pins end for it even if they are not enough."""
    rig.pool.take(6)
    rig.fill(a=3, b=3)
    assert rig.ask(7, "RUNNING") is None
    assert sorted(rig.released) == ["a", "b"]
    assert len(rig.ask(6, "RUNNING")) == 6


def test_a_running_request_stops_staging_last(rig: Rig) -> None:
    blocks = rig.fill(a=6, b=6)
    chain = chunks(6 // CHUNK_BLOCKS)
    rig.stager.start("b", "b", chain, tuple(blocks["b"]), 1.0, 10.0)
    rig.regret = {"a": 2.0}
    assert len(rig.ask(6, "RUNNING")) == 6
    assert rig.stager.n_jobs == 1, "ending pin a was enough"
    assert len(rig.ask(6, "RUNNING")) == 6
    assert rig.stager.n_jobs == 0


def test_a_waiting_request_does_not_stop_staging(rig: Rig) -> None:
    blocks = rig.fill(a=6)["a"]
    rig.stager.start("a", "a", chunks(3), tuple(blocks), 1.0, 10.0)
    rig.pool.take(6)
    assert rig.ask(1) is None
    assert rig.stager.n_jobs == 1


def test_a_waiting_request_ends_staging_that_stands_still(rig: Rig) -> None:
    blocks = rig.fill(a=6, b=4)
    for key in blocks:
        rig.stager.start(key, key, chunks(len(blocks[key]) // CHUNK_BLOCKS), blocks[key], 1.0, 9.0)
    for _ in range(STALL_STEPS):
        rig.stager.advance(rig.now_s)
    rig.now_s = STALL_S * 0.9
    assert rig.ask(5, knows_need=True) is None
    rig.now_s = STALL_S
    assert len(rig.ask(5, knows_need=True)) == 5
    assert rig.stager.n_jobs == 2, "one cancelled, but its reservation is still out"
    assert (rig.pins.held_blocks, rig.released) == (6, ["b"]), "the younger was enough"


def test_what_stalled_staging_held_is_enough_without_any_pin(rig: Rig) -> None:
    taken = rig.pool.take(8)
    assert taken is not None
    rig.stager.start("a", "a", chunks(4), [b.block_id for b in taken], 1.0, 9.0)
    rig.pool.free_blocks(taken)
    for _ in range(STALL_STEPS):
        rig.stager.advance(rig.now_s)
    rig.now_s = STALL_S
    assert len(rig.ask(9, knows_need=True)) == 9


def test_one_long_step_is_no_standstill(rig: Rig) -> None:
    blocks = rig.fill(a=6, b=4)
    for key in blocks:
        rig.stager.start(key, key, chunks(len(blocks[key]) // CHUNK_BLOCKS), blocks[key], 1.0, 9.0)
    for _ in range(STALL_STEPS - 1):
        rig.stager.advance(rig.now_s)
    rig.now_s = 100 * STALL_S
    assert rig.ask(5, knows_need=True) is None


def test_staging_goes_on_where_its_blocks_would_not_be_enough(rig: Rig) -> None:
    rig.pool.take(6)
    blocks = rig.fill(a=6)["a"]
    rig.stager.start("a", "a", chunks(3), blocks, 1.0, 10.0)
    rig.stager.advance(0.0)
    rig.now_s = 100.0
    assert rig.ask(7, knows_need=True) is None
    assert rig.pins.held_blocks == 6


def test_a_known_need_saves_trying(rig: Rig) -> None:
    rig.pool.take(6)
    rig.fill(a=2, b=2, c=2)
    assert rig.ask(7, knows_need=True) is None
    assert rig.retries == 1, "the need is more than all pins could give"
    rig.retries = 0
    assert rig.ask(4, knows_need=True) is not None
    assert rig.retries == 2, "again only once enough pins had ended"


class FakeManager:
    """vLLM's KV cache manager: `allocate_slots` and `reset_prefix_cache`."""

    def __init__(self, pool: FakePool) -> None:
        self.pool = pool
        self.arguments: list[Any] = []

    def allocate_slots(self, request: Any, n_blocks: int, *, flag: bool = False) -> Any:
        self.arguments.append((n_blocks, flag))
        return self.pool.take(n_blocks)

    def reset_prefix_cache(self) -> bool:
        return self.pool.reset()


def test_the_managers_methods_are_wrapped(rig: Rig) -> None:
    manager = FakeManager(rig.pool)
    asked: list[str] = []

    def make_room(request: Any, retry: Any, _: Any) -> Any:
        asked.append(request.request_id)
        rig.pins.release_all(ReleaseCause.PRESSURE)
        return retry()

    wrap_allocation(manager, make_room, lambda: rig.pins.release_all(ReleaseCause.RESET))
    request: Any = FakeRequest("w", [1])
    taken = manager.allocate_slots(request, 2)
    assert (len(taken), asked) == (2, [])
    rig.pool.free_blocks(taken)
    rig.fill(a=8)
    assert len(manager.allocate_slots(request, 6, flag=True)) == 6
    assert asked == ["w"]
    assert manager.arguments[1:] == [(6, True), (6, True)], "the same call, repeated"


def test_a_reset_of_the_prefix_cache_is_not_refused_for_pins(rig: Rig) -> None:
    manager = FakeManager(rig.pool)
    rig.fill(a=2)
    assert not manager.reset_prefix_cache()
    wrap_allocation(
        manager, lambda _, retry, __: retry(), lambda: rig.pins.release_all(ReleaseCause.RESET)
    )
    assert manager.reset_prefix_cache()


def test_what_is_written_to_is_held_again_behind_a_reset(rig: Rig) -> None:
    manager = FakeManager(rig.pool)
    rig.pins.hold("copy", [1, 2], written=True)
    wrap_allocation(
        manager,
        lambda _, retry, __: retry(),
        lambda: rig.pins.unhold("copy"),
        lambda: rig.pins.hold("copy", [1, 2], written=True),
    )
    assert manager.reset_prefix_cache()
    assert rig.pool.references == {1: 1, 2: 1}
