"""References on GPU blocks: exact whatever happens, never over budget, gone at the end."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.block_ids import as_block_ids
from kvtier.gpu_pin import PinTable, ReleaseCause

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtier.gpu_pin import Pin

N_BLOCKS = 12
BUDGET = 7


class CountingPool:
    """References only. `foreign` ones are held by running requests."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.released: list[tuple[int, ...]] = []
        self.own: dict[str, list[int]] = {}

    def take_over(self, request_id: str, block_ids: Sequence[int]) -> bool:
        own, wanted = self.own.get(request_id, []), list(map(int, block_ids))
        if own[: len(wanted)] != wanted:
            return False
        self.own[request_id] = own[len(wanted) :]
        return True

    def acquire(self, block_ids: Sequence[int]) -> None:
        self.counts.update(map(int, block_ids))

    def release(self, block_ids: Sequence[int]) -> None:
        self.released.append(tuple(map(int, block_ids)))
        for block in block_ids:
            assert self.counts[int(block)] > 0, f"block {block} was released once too often"
            self.counts[int(block)] -= 1

    def references(self, block_ids: Sequence[int]) -> Any:
        return np.array([self.counts[int(b)] for b in block_ids], dtype=np.int64)


@pytest.fixture
def pool() -> CountingPool:
    return CountingPool()


@pytest.fixture
def pins(pool: CountingPool) -> PinTable:
    return PinTable(pool, BUDGET)


def pin(pins: PinTable, key: str, blocks: Sequence[int], *, program: str = "p") -> bool:
    return pins.pin(key, program, blocks, now_s=0.0, ttl_s=10.0)


def test_nothing_makes_room_for_more_than_the_budget(pins: PinTable) -> None:
    too_many = list(range(BUDGET + 1))
    assert pins.to_end_for(too_many, pins.pins) is None
    assert pin(pins, "a", [0])
    assert pins.to_end_for(too_many, pins.pins) is None


def test_shared_blocks_count_once_towards_the_budget(pins: PinTable, pool: CountingPool) -> None:
    assert pin(pins, "a", [0, 1, 2, 3])
    assert pins.new_blocks([2, 3, 4]) == 1
    assert pin(pins, "b", [0, 1, 2, 3, 4, 5, 6])
    assert (pins.pinned_blocks, len(pins)) == (BUDGET, 2)
    assert pool.counts[0] == 2
    assert not pin(pins, "c", [7])
    assert pin(pins, "d", [6])
    pins.unpin("b", ReleaseCause.HANDOFF)
    assert pins.pinned_blocks == 5


def test_a_refused_pin_takes_nothing(pins: PinTable, pool: CountingPool) -> None:
    assert not pin(pins, "a", range(BUDGET + 1))
    assert not pin(pins, "a", [])
    assert not +pool.counts
    assert "a" not in pins


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan")])
def test_a_pin_needs_a_positive_ttl(pins: PinTable, ttl_s: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        pins.pin("a", "p", [1], now_s=0.0, ttl_s=ttl_s)


def test_keys_are_unique(pins: PinTable) -> None:
    pin(pins, "a", [1])
    pins.hold("a", [1])
    with pytest.raises(ValueError, match="pinned already"):
        pin(pins, "a", [2])
    with pytest.raises(ValueError, match="holds blocks already"):
        pins.hold("a", [2])


def test_ending_twice_is_harmless(pins: PinTable, pool: CountingPool) -> None:
    pin(pins, "a", [1])
    pins.hold("h", [1])
    assert pins.unpin("a", ReleaseCause.TTL) is not None
    assert pins.unpin("a", ReleaseCause.TTL) is None
    pins.unhold("h")
    pins.unhold("h")
    assert not +pool.counts


def test_expiry_is_by_deadline(pins: PinTable) -> None:
    pins.pin("long", "p", [1], now_s=0.0, ttl_s=5.0)
    pins.pin("short", "p", [2], now_s=1.0, ttl_s=2.0)
    assert pins.expire(2.9) == []
    assert [(r.pin.key, r.cause) for r in pins.expire(3.0)] == [("short", ReleaseCause.TTL)]
    assert "long" in pins


def test_program_ends_with_all_its_pins(pins: PinTable) -> None:
    pin(pins, "a", [1])
    pin(pins, "b", [2], program="q")
    pin(pins, "c", [3])
    released = pins.unpin_program("p", ReleaseCause.ENDED)
    assert [r.pin.key for r in released] == ["a", "c"]
    assert pins.of_program("p") == []
    assert [p.key for p in pins.of_program("q")] == ["b"]


def test_a_hold_outlives_its_pin(pins: PinTable, pool: CountingPool) -> None:
    pin(pins, "a", [1, 2])
    pins.hold("copy", [1, 2])
    pins.unpin("a", ReleaseCause.PRESSURE)
    assert pool.counts[1] == 1
    assert (pins.pinned_blocks, pins.held_blocks) == (0, 2)
    pins.unhold("copy")
    assert pool.counts[1] == 0


def test_reclaimable_is_what_nobody_else_references(pins: PinTable, pool: CountingPool) -> None:
    pin(pins, "a", [1, 2, 3])
    pin(pins, "b", [1, 4])
    assert pins.reclaimable_blocks() == pins.loose_blocks == 4
    pool.acquire([2])
    pins.hold("copy", [3, 9])
    assert pins.reclaimable_blocks() == 2
    assert pins.loose_blocks == 3, "what other requests hold is not known without a walk"
    assert pins.kept_blocks == 5


def test_release_order_is_by_regret_then_deadline(pins: PinTable) -> None:
    for key, ttl_s in (("a", 9.0), ("b", 3.0), ("c", 5.0)):
        pins.pin(key, "p", [ord(key)], now_s=0.0, ttl_s=ttl_s)
    regret = {"a": 0.5, "b": 2.0, "c": 0.5}
    assert [p.key for p in pins.in_release_order(lambda p: regret[p.key])] == ["c", "a", "b"]


def test_of_many_pins_only_those_are_valued_that_come_first() -> None:
    pool, n_pins = CountingPool(), 3000
    table = PinTable(pool, 4 * n_pins)
    for i in range(n_pins):
        table.pin(f"r{i}", f"p{i}", [2 * i, 2 * i + 1], now_s=0.0, ttl_s=50.0)
    valued = 0

    def regret(pin: Pin) -> float:
        nonlocal valued
        valued += 1
        return float(pin.key[1:])

    for i in range(100):
        table.budget_blocks = table.pinned_blocks
        blocks = [2 * n_pins + i]
        chosen = table.to_end_for(blocks, lambda: table.in_release_order(regret, 10.0))
        assert chosen is not None
        assert [pin.key for pin in chosen] == [f"r{i}"]
        table.unpin(f"r{i}", ReleaseCause.BUDGET)
    assert valued < n_pins + 100 * 20


def test_what_must_end_for_a_new_pin(pins: PinTable) -> None:
    pin(pins, "a", [0, 1, 2])
    pin(pins, "b", [0, 1, 2, 3])
    pin(pins, "c", [4, 5, 6])

    def to_end(*blocks: int) -> list[str] | None:
        chosen = pins.to_end_for(blocks, pins.pins)
        return None if chosen is None else [p.key for p in chosen]

    assert to_end(1, 5) == [], "kept already"
    assert to_end(7) == ["a", "b"], "a shares all of its blocks: its end alone makes no room"
    assert to_end(7, 8, 9, 10) == ["a", "b"]
    assert to_end(7, 8, 9, 0, 1) == ["a", "b", "c"], "0 and 1 stay in use"
    assert to_end(*range(10, 10 + BUDGET)) == ["a", "b", "c"]
    assert to_end(*range(10, 11 + BUDGET)) is None


def test_blocks_go_to_the_pool_in_sequence_order(pins: PinTable, pool: CountingPool) -> None:
    # The pool's adapter frees from the tail on; it needs to know which end is the tail.
    pin(pins, "a", [5, 3, 4])
    pins.unpin("a", ReleaseCause.TTL)
    assert pool.released == [(5, 3, 4)]


class PinMachine(RuleBasedStateMachine):
    """Any sequence of operations against a plain model of who lists which block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = CountingPool()
        self.foreign: Counter[int] = Counter()
        self.pins = PinTable(self.pool, BUDGET)
        self.pinned: dict[str, Pin] = {}
        self.held: dict[str, tuple[int, ...]] = {}
        self.shared: dict[str, str] = {}
        self.now_s = 0.0
        self.next_key = 0

    blocks = st.lists(st.integers(0, N_BLOCKS - 1), unique=True, max_size=6)
    programs = st.sampled_from(["p", "q", "r"])

    @rule(blocks=blocks, program=programs, ttl_s=st.floats(0.1, 20.0))
    def pin(self, blocks: list[int], program: str, ttl_s: float) -> None:
        self.next_key += 1
        key = str(self.next_key)
        kept = {b for pin in self.pinned.values() for b in pin.block_ids}
        fits = bool(blocks) and len(kept | set(blocks)) <= BUDGET
        assert self.pins.pin(key, program, blocks, now_s=self.now_s, ttl_s=ttl_s) is fits
        if fits:
            (self.pinned[key],) = (pin for pin in self.pins.pins() if pin.key == key)

    @rule(blocks=blocks, n_kept=st.integers(1, 6), data=st.data())
    def pin_what_a_request_gives_back(
        self, blocks: list[int], n_kept: int, data: st.DataObject
    ) -> None:
        self.next_key += 1
        key = str(self.next_key)
        kept = blocks[:n_kept]
        self.pool.acquire(blocks)
        self.pool.own[key] = blocks
        owner = data.draw(st.sampled_from([key, "another", None]))
        before = self.pool.counts.copy()
        done = self.pins.pin(key, "p", kept, now_s=self.now_s, ttl_s=9.0, owner=owner)
        if done:
            (self.pinned[key],) = (pin for pin in self.pins.pins() if pin.key == key)
            assert (self.pool.counts == before) is (owner == key)
        self.pool.release(self.pool.own.pop(key))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data(), blocks=blocks)
    def extend(self, data: st.DataObject, blocks: list[int]) -> None:
        """A prefetch has loaded more of what a pin keeps."""
        pin = self.pinned[data.draw(st.sampled_from(sorted(self.pinned)))]
        before = pin.block_ids.tolist()
        more = [block for block in blocks if block not in before]
        kept = {b for pin in self.pinned.values() for b in pin.block_ids}
        fits = len(kept | set(more)) <= BUDGET
        assert self.pins.extend(pin.key, as_block_ids(more)) is fits
        assert pin.block_ids.tolist() == (before + more if fits else before)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.pinned)))
        released = self.pins.unpin(key, ReleaseCause.HANDOFF)
        assert released is not None
        assert released.pin is self.pinned.pop(key)

    @rule(blocks=blocks, data=st.data())
    def displace(self, blocks: list[int], data: st.DataObject) -> None:
        order = data.draw(st.permutations(sorted(self.pinned)))
        chosen = self.pins.to_end_for(blocks, lambda: [self.pinned[key] for key in order])

        def excess(n_ended: int) -> int:
            kept = {b for key in order[n_ended:] for b in self.pinned[key].block_ids}
            return len(kept | set(blocks)) - BUDGET

        if chosen is None:
            assert excess(len(order)) > 0
            return
        assert [pin.key for pin in chosen] == order[: len(chosen)]
        assert excess(len(chosen)) <= 0
        assert not chosen or excess(len(chosen) - 1) > 0, "one more than needed"

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def try_without_some(self, data: st.DataObject) -> None:
        """What `Room` does when a waiting request does not fit even without pins."""
        keys = data.draw(st.lists(st.sampled_from(sorted(self.pinned)), unique=True))
        ended = [self.pins.unpin(key, ReleaseCause.PRESSURE) for key in keys]
        self.shared = {hold: pin for hold, pin in self.shared.items() if pin not in keys}
        for released in reversed(ended):
            assert released is not None
            self.pins.repin(released.pin)

    @rule(program=programs)
    def end_program(self, program: str) -> None:
        released = {r.pin.key for r in self.pins.unpin_program(program, ReleaseCause.ENDED)}
        assert released == {k for k, pin in self.pinned.items() if pin.program == program}
        for key in released:
            del self.pinned[key]

    @rule(seconds=st.floats(0.0, 15.0))
    def expire(self, seconds: float) -> None:
        self.now_s += seconds
        released = {r.pin.key for r in self.pins.expire(self.now_s)}
        assert released == {k for k, pin in self.pinned.items() if pin.deadline_s <= self.now_s}
        for key in released:
            del self.pinned[key]

    @rule(blocks=blocks)
    def hold(self, blocks: list[int]) -> None:
        self.next_key += 1
        self.pins.hold(f"h{self.next_key}", blocks)
        self.held[f"h{self.next_key}"] = tuple(blocks)

    @rule(data=st.data(), blocks=blocks, n_kept=st.integers(1, 6))
    def hold_what_a_request_gives_back(
        self, data: st.DataObject, blocks: list[int], n_kept: int
    ) -> None:
        self.next_key += 1
        key = f"o{self.next_key}"
        kept = blocks[:n_kept]
        self.pool.acquire(blocks)
        self.pool.own[key] = blocks
        owner = data.draw(st.sampled_from([key, "another", None]))
        before = self.pool.counts.copy()
        self.pins.hold(key, kept, owner=owner)
        assert (self.pool.counts == before) is (owner == key or not kept)
        self.held[key] = tuple(kept)
        self.pool.release(self.pool.own.pop(key))

    @rule(blocks=blocks, owned=st.booleans())
    def hold_what_is_written(self, blocks: list[int], owned: bool) -> None:
        self.next_key += 1
        key = f"w{self.next_key}"
        if owned:
            self.pool.acquire(blocks)
        self.pins.hold(key, blocks, written=True, owned=owned)
        self.held[key] = tuple(blocks)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data(), n_blocks=st.integers(0, 6))
    def hold_what_is_pinned(self, data: st.DataObject, n_blocks: int) -> None:
        self.next_key += 1
        key, pin = f"h{self.next_key}", data.draw(st.sampled_from(sorted(self.pinned)))
        blocks = self.pinned[pin].block_ids[:n_blocks].tolist()
        before = self.pool.counts.copy()
        self.pins.hold(key, blocks, share=pin)
        self.held[key] = tuple(blocks)
        if pin not in self.shared.values():
            assert self.pool.counts == before, "no references are taken twice"
            self.shared[key] = pin

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unhold(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.held)))
        self.pins.unhold(key)
        del self.held[key]
        self.shared.pop(key, None)

    @rule(block=st.integers(0, N_BLOCKS - 1))
    def request_takes(self, block: int) -> None:
        self.pool.acquire([block])
        self.foreign[block] += 1

    @precondition(lambda self: +self.foreign)
    @rule(data=st.data())
    def request_returns(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(+self.foreign)))
        self.pool.release([block])
        self.foreign[block] -= 1

    @rule()
    def release_all(self) -> None:
        assert {r.pin.key for r in self.pins.release_all(ReleaseCause.RESET)} == set(self.pinned)
        self.pinned.clear()
        self.shared.clear()
        self.held = {key: ids for key, ids in self.held.items() if key.startswith("w")}
        written = Counter(block for ids in self.held.values() for block in ids)
        assert +self.pool.counts == +(self.foreign + written)

    @invariant()
    def references_are_exact(self) -> None:
        listed = Counter(self.foreign)
        for pin in self.pinned.values():
            listed.update(pin.block_ids)
        for key, blocks in self.held.items():
            if self.shared.get(key) not in self.pinned:
                listed.update(blocks)
        assert +self.pool.counts == +listed
        ours = Counter(b for ids in self.pins.references() for b in ids.tolist())
        assert +(ours + self.foreign) == +listed

    @invariant()
    def views_agree(self) -> None:
        kept = {b for pin in self.pinned.values() for b in pin.block_ids}
        assert self.pins.pinned_blocks == len(kept) <= BUDGET
        assert self.pins.held_blocks == sum(map(len, self.held.values()))
        assert len(self.pins) == len(self.pinned)
        assert {pin.key: pin for pin in self.pins.pins()} == self.pinned
        for program in ("p", "q", "r"):
            assert {pin.key for pin in self.pins.of_program(program)} == {
                key for key, pin in self.pinned.items() if pin.program == program
            }
        alone = sum(
            1
            for block in kept
            if not self.foreign[block] and not any(block in held for held in self.held.values())
        )
        assert self.pins.reclaimable_blocks() == alone
        held = {b for held in self.held.values() for b in held}
        assert self.pins.loose_blocks == len(kept - held)
        assert self.pins.kept_blocks == len(kept | held)

    def teardown(self) -> None:
        self.pins.release_all(ReleaseCause.SHUTDOWN)
        for key in self.held:
            self.pins.unhold(key)
        assert +self.pool.counts == +self.foreign


TestPinMachine = PinMachine.TestCase
TestPinMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
