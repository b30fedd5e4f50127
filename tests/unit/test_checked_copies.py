"""Checksums of chunks: what a load brings is what was stored, or the load fails and says where."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvtier.copies.checked import SHARES, CheckedCopies
from kvtier.copies.checksums import Checksums, load_checksums
from kvtier.copies.kernel import DONE, LATE
from kvtier.copies.kv_layout import KVLayout
from kvtier.copies.plan import CopyOrder, CopyResult
from kvtier.copy_engine import LEASE_ENDED, CpuCopyEngine
from kvtier.orders import TRAILER_BYTES
from kvtier.wire import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

N_BLOCKS = 24
CHUNK_BLOCKS = 3
N_SLOTS = 6
WAIT_S = 30.0
KEYS = [bytes([i]) + bytes(KEY_BYTES - 1) for i in range(1, N_SLOTS + 1)]


@pytest.mark.parametrize(
    ("text", "seed", "expected"),
    [
        (b"", 0, 0xEF46DB3751D8E999),
        (b"a", 0, 0xD24EC4F1A98C6E5B),
        (b"abc", 0, 0x44BC2CF5AD770999),
        (b"xxhash", 20141025, 0xB559B98D844E0635),
        (b"Nobody inspects the spammish repetition", 0, 0xFBCEA83C8A378BF1),
    ],
)
def test_the_sum_is_xxh64(text: bytes, seed: int, expected: int) -> None:
    data = np.frombuffer(text or b"x", np.uint8)
    found = load_checksums().xxh64(data.ctypes.data, len(text), np.uint64(seed))
    assert int(found) == expected


class Rig:
    """Two layers in host memory, slots of three blocks, and an engine that checks."""

    def __init__(self, share: int = SHARES["full"]) -> None:
        torch.manual_seed(1)
        # 40 bytes a block and plane: no whole stripes.
        self.caches = {
            f"l{i}": torch.randn((2, N_BLOCKS, 5, 1, 2), dtype=torch.float32) for i in (0, 1)
        }
        self.layout = KVLayout.from_kv_caches(self.caches, num_blocks=N_BLOCKS)
        self.slot_bytes = self.layout.slot_bytes(CHUNK_BLOCKS)
        self.pitch = self.slot_bytes + TRAILER_BYTES
        self.region = np.zeros(N_SLOTS * self.pitch, np.uint8)
        self.now_s = 0.0
        self.inner = CpuCopyEngine(self.layout, self.region, clock=lambda: self.now_s)
        self.engine = self.checking(share)
        self._n = 0

    def checking(self, share: int, rank: int = 0) -> CheckedCopies:
        return CheckedCopies(
            self.inner, self.layout, self.region, share=share, rank=rank, clock=lambda: self.now_s
        )

    def run(
        self, direction: Any, chunks: list[int], blocks: list[int], **changes: Any
    ) -> CopyResult:
        """Copy these chunks, whose slots and keys have their numbers, from or to these blocks."""
        self._n += 1
        fields: dict[str, Any] = {
            "order_id": self._n,
            "direction": direction,
            "request_id": "r",
            "block_ids": blocks,
            "slots": [c * self.pitch for c in chunks],
            "chunk_blocks": CHUNK_BLOCKS,
            "keys": b"".join(KEYS[c] for c in chunks),
        }
        self.engine.submit(CopyOrder(**(fields | changes)), self.now_s)
        deadline_s = time.monotonic() + WAIT_S
        while not (results := self.engine.poll()):
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        (result,) = results
        return result

    def stored(self) -> None:
        assert self.run("store", [0, 1], [0, 1, 2, 3, 4, 5]).ok

    def kv(self, blocks: list[int]) -> list[Any]:
        return [cache[:, blocks].clone() for cache in self.caches.values()]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.engine.close()


def spoilt(result: CopyResult) -> bool:
    return not result.ok and bool(result.spoilt_key)


def test_what_was_stored_is_loaded(rig: Rig) -> None:
    rig.stored()
    assert rig.run("load", [0, 1], [6, 7, 8, 9, 10, 11]).ok
    for whole, copied in zip(rig.kv([0, 1, 2, 3, 4, 5]), rig.kv([6, 7, 8, 9, 10, 11]), strict=True):
        assert torch.equal(whole, copied)


def test_a_part_of_a_chunk_is_loaded_and_checked_with_the_rest_of_it(rig: Rig) -> None:
    """A load may begin within its first chunk and end within its last."""
    rig.stored()
    assert rig.run("load", [0, 1], [0, 7, 8, 9, 10], skip_blocks=1).ok
    rig.region[rig.pitch + rig.slot_bytes - 1] ^= 1  # of a block that is not loaded
    assert spoilt(rig.run("load", [0, 1], [0, 7, 8, 9, 10], skip_blocks=1))


@pytest.mark.parametrize("where", ["first", "middle", "last", "sum", "key", "mark"])
def test_any_changed_byte_of_a_chunk_fails_its_load(rig: Rig, where: str) -> None:
    rig.stored()
    at = {"first": 0, "middle": rig.slot_bytes // 2, "last": rig.slot_bytes - 1}
    at |= {"mark": rig.slot_bytes, "key": rig.slot_bytes + 8, "sum": rig.slot_bytes + 24}
    rig.region[rig.pitch + at[where]] ^= 0x10
    result = rig.run("load", [0, 1], [6, 7, 8, 9, 10, 11])
    assert spoilt(result)
    # What came before it is as it was stored.
    assert result.missing_blocks == {9, 10, 11}
    assert result.spoilt_key == KEYS[1]


def test_a_whole_chunk_of_something_else_fails(rig: Rig) -> None:
    rig.stored()
    assert spoilt(rig.run("load", [0], [6, 7, 8], keys=KEYS[1]))
    assert spoilt(rig.run("load", [0], [6, 7, 8], slots=[rig.pitch]))


def test_another_ranks_chunk_fails(rig: Rig) -> None:
    rig.stored()
    first = rig.engine
    rig.engine = rig.checking(SHARES["full"], rank=1)
    result = rig.run("load", [1], [6, 7, 8])
    assert spoilt(result)
    assert result.spoilt_key == KEYS[1]
    rig.engine.close()
    rig.engine = first


def test_loads_are_checked_before_stores_are_summed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.stored()
    checked: list[int | str] = []
    begun, go_on = threading.Event(), threading.Event()
    check = rig.engine._checked

    def slow(order: CopyOrder, result: CopyResult) -> CopyResult:
        checked.append(order.order_id)
        begun.set()
        assert go_on.wait(WAIT_S)
        return check(order, result)

    monkeypatch.setattr(rig.engine, "_checked", slow)
    results: list[CopyResult] = []
    for name, direction in (("busy", "store"), ("store", "store"), ("load", "load")):
        chunk = {"busy": 2, "store": 3, "load": 0}[name]
        order = CopyOrder(
            order_id=name, direction=direction, request_id="r", block_ids=[6, 7, 8],
            slots=[chunk * rig.pitch], chunk_blocks=CHUNK_BLOCKS, keys=KEYS[chunk],
        )  # fmt: skip
        rig.engine.submit(order, 0.0)
        assert rig.inner.drain(WAIT_S)
        results += rig.engine.poll()
        assert begun.wait(WAIT_S)
    go_on.set()
    assert rig.engine.drain(WAIT_S)
    results += rig.engine.poll()
    assert checked == ["busy", "load", "store"]
    assert all(result.ok for result in results)


def test_memory_that_was_never_written_fails(rig: Rig) -> None:
    assert spoilt(rig.run("load", [3], [6, 7, 8]))
    rig.stored()
    rig.region[:] = 0
    assert spoilt(rig.run("load", [0], [6, 7, 8]))


def test_a_store_that_claims_success_is_found_out_by_the_load(rig: Rig) -> None:
    rig.stored()
    kernel, rig.inner._kernel = rig.inner._kernel, lambda *_: DONE
    assert rig.run("store", [0, 1], [12, 13, 14, 15, 16, 17]).ok
    rig.inner._kernel = kernel
    assert spoilt(rig.run("load", [0, 1], [6, 7, 8, 9, 10, 11]))


def test_a_load_that_claims_success_is_found_out(rig: Rig) -> None:
    rig.stored()
    rig.inner._kernel = lambda *_: DONE
    assert spoilt(rig.run("load", [0, 1], [6, 7, 8, 9, 10, 11]))


def test_what_is_being_written_anew_is_not_whole(rig: Rig) -> None:
    rig.stored()
    kernel, rig.inner._kernel = rig.inner._kernel, lambda *_: LATE
    assert not rig.run("store", [0], [0, 1, 2]).ok
    rig.inner._kernel = kernel
    assert spoilt(rig.run("load", [0], [6, 7, 8]))
    assert rig.run("load", [1], [6, 7, 8]).ok


def test_a_store_that_comes_late_leaves_its_slots_alone(rig: Rig) -> None:
    """They may be another engine's by then."""
    rig.stored()
    before, rig.now_s = rig.region.copy(), 100.0
    result = rig.run("store", [0], [6, 7, 8], deadline_s=50.0, keys=KEYS[3])
    assert (result.ok, result.error) == (False, LEASE_ENDED)
    assert (rig.region == before).all()


def test_a_sum_that_comes_late_is_not_written(rig: Rig) -> None:
    rig.stored()
    before, seal = rig.region.copy(), rig.engine._sums.seal

    def stopped_behind_one(*arguments: Any) -> int:
        outcome = seal(*arguments)
        rig.now_s = 100.0
        return outcome

    sums = rig.engine._sums
    rig.engine._sums = Checksums(sums.xxh64, stopped_behind_one, sums.verify)
    keys = KEYS[2] + KEYS[3]
    result = rig.run("store", [0, 1], [6, 7, 8, 9, 10, 11], deadline_s=50.0, keys=keys)
    assert (result.ok, result.error) == (False, LEASE_ENDED)
    key_of_second = slice(rig.pitch + rig.slot_bytes + 8, rig.pitch + rig.slot_bytes + 24)
    assert (rig.region[key_of_second] == before[key_of_second]).all()


def test_an_order_that_the_copies_refuse_is_not_remembered(rig: Rig) -> None:
    rig.inner.close()
    with pytest.raises(RuntimeError):
        rig.run("load", [0], [6, 7, 8])
    assert not rig.engine._orders


def test_chunks_that_are_left_out_are_neither_summed_nor_checked(rig: Rig) -> None:
    blocks, keys = [0, 1, 2, 3, 4, 5], KEYS[0] + KEYS[1]
    assert rig.run("store", [0, 1], blocks, slots=[-1, rig.pitch], keys=keys).ok
    assert rig.run("load", [0, 1], blocks, slots=[-1, rig.pitch], keys=keys).ok
    assert spoilt(rig.run("load", [0], [6, 7, 8]))


def test_a_sample_is_of_the_same_chunks_at_both_ends() -> None:
    rig = Rig(share=2)
    summed = [c for c in range(N_SLOTS) if KEYS[c][0] % 2 == 0]
    assert 0 < len(summed) < N_SLOTS
    for chunk in range(N_SLOTS):
        assert rig.run("store", [chunk], [0, 1, 2]).ok
        rig.region[chunk * rig.pitch] ^= 1
    found = [c for c in range(N_SLOTS) if spoilt(rig.run("load", [c], [6, 7, 8]))]
    assert found == summed
    # Who checks all of them can check those that have a sum.
    rig.engine = rig.checking(SHARES["full"])
    assert [c for c in range(N_SLOTS) if spoilt(rig.run("load", [c], [6, 7, 8]))] == summed
    # Another chunk's memory is found out in any case.
    assert all(
        spoilt(rig.run("load", [c], [6, 7, 8], keys=bytes(KEY_BYTES))) for c in range(N_SLOTS)
    )
    rig.engine.close()


def test_a_check_after_the_deadline_says_nothing(rig: Rig) -> None:
    rig.stored()
    kernel = rig.inner._kernel

    def slow(*arguments: Any) -> int:
        outcome = kernel(*arguments)
        rig.region[:] = 0
        return outcome

    rig.inner._kernel = slow
    is_late, answers = rig.engine._is_late, iter([False, False, True])
    rig.engine._is_late = lambda order: next(answers, is_late(order))  # type: ignore[method-assign]
    result = rig.run("load", [0], [6, 7, 8])
    assert (result.ok, result.spoilt_key, result.error) == (False, b"", LEASE_ENDED)


def test_slots_without_room_for_a_sum_are_refused(rig: Rig) -> None:
    last = rig.region.nbytes - rig.slot_bytes
    assert not rig.run("store", [0], [0, 1, 2], slots=[last]).ok
    assert not rig.run("store", [0], [0, 1, 2], keys=b"").ok
    assert not rig.region.any()


def test_closing_ends_every_order(rig: Rig) -> None:
    rig.stored()
    for i in range(5):
        order = CopyOrder(
            f"o{i}", "load", "r", [6, 7, 8], [0], CHUNK_BLOCKS, keys=KEYS[0], generation=0
        )
        rig.engine.submit(order, rig.now_s)
    rig.engine.close()
    assert len(rig.engine.poll()) == 5


def test_draining_waits_for_checks(rig: Rig) -> None:
    order = CopyOrder("o", "store", "r", [0, 1, 2], [0], CHUNK_BLOCKS, keys=KEYS[0])
    rig.engine.submit(order, rig.now_s)
    assert rig.engine.drain(WAIT_S)
    assert [result.ok for result in rig.engine.poll()] == [True]
