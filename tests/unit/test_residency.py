"""Residency in the CPU tier: what is read stays, what is written is hidden, what is cheap goes."""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvtier.backend import Activity
from kvtier.server.eviction_order import DISPLACE_MARGIN, IDLE_SCALE_S
from kvtier.server.l1_store import ChunkId
from kvtier.server.residency import ResidencyTable
from kvtier.wire import KEY_BYTES, split_keys
from tests.unit.fake_l1 import FakeL1

if TYPE_CHECKING:
    from random import Random

SLOT_BYTES = 10
NS = "model"


def keys_of(path: str) -> bytes:
    """Chunk keys of a sequence; each letter is a chunk, equal prefixes have equal keys."""
    return b"".join(
        blake2b(path[: i + 1].encode(), digest_size=KEY_BYTES).digest() for i in range(len(path))
    )


class Tier:
    """A table on `n_slots` slots, called with what the tests vary."""

    def __init__(self, n_slots: int, ranks: int = 1) -> None:
        self.l1 = FakeL1(n_slots)
        self.table = ResidencyTable(self.l1)
        self.ranks = ranks
        self.now_s = 0.0
        self.next_id = 0

    def reserve(
        self,
        program: str,
        path: str,
        start: int = 0,
        end: int | None = None,
        *,
        value_s: float = 1.0,
        lease_s: float = 100.0,
        owner: str = "e",
        namespace: str = NS,
    ) -> tuple[int, list[list[int]] | None]:
        self.next_id += 1
        end = len(path) if end is None else end
        slots = self.table.reserve(
            owner,
            self.next_id,
            namespace,
            program,
            keys_of(path),
            start,
            end,
            self.ranks,
            SLOT_BYTES,
            value_s,
            lease_s,
            self.now_s,
        )
        return self.next_id, slots

    def commit(self, reserve_id: int, *, ok: bool = True, owner: str = "e") -> int | None:
        return self.table.commit(owner, reserve_id, self.now_s, ok=ok)

    def store(self, program: str, path: str, **how: Any) -> int | None:
        """Reserve and commit; the resident prefix, None when full."""
        reserve_id, slots = self.reserve(program, path, **how)
        owner = {"owner": how["owner"]} if "owner" in how else {}
        return self.commit(reserve_id, **owner) if slots is not None else None

    def lookup(
        self, path: str, program: str = "p", owner: str = "e", namespace: str = NS
    ) -> tuple[int, int, list[list[int]]]:
        self.next_id += 1
        hit, slots = self.table.lookup(
            owner, self.next_id, namespace, program, keys_of(path), self.ranks, self.now_s
        )
        return self.next_id, hit, slots

    def hit(self, path: str) -> int:
        """Resident prefix, without keeping the locks."""
        lookup_id, hit, _ = self.lookup(path)
        self.table.trim("e", lookup_id, 0, 0)
        return hit


def test_a_reservation_is_invisible_until_it_is_committed() -> None:
    tier = Tier(4)
    reserve_id, slots = tier.reserve("p", "abc")
    assert slots == [[0, SLOT_BYTES, 2 * SLOT_BYTES]]
    assert tier.hit("abc") == 0
    assert tier.table.counts()["reservations"] == 1
    assert tier.commit(reserve_id) == 3
    lookup_id, hit, found = tier.lookup("abcd")
    assert (hit, found) == (3, slots)
    assert tier.table.counts() == {
        "programs": 1,
        "chunks": 3,
        "locked_chunks": 3,
        "reservations": 0,
        "evicted_chunks": 0,
    }
    assert lookup_id


def test_a_failed_copy_leaves_nothing_behind() -> None:
    tier = Tier(4)
    reserve_id, _ = tier.reserve("p", "abc")
    assert tier.commit(reserve_id, ok=False) == 0
    assert tier.hit("abc") == 0
    assert tier.l1.n_free == 4
    assert tier.commit(reserve_id) is None


def test_a_split_reserves_only_what_is_missing() -> None:
    tier = Tier(8)
    tier.store("p", "ab")
    _, slots = tier.reserve("p", "abcd", 1, 4)
    assert slots is not None
    assert slots[0][0] == -1
    assert all(slot >= 0 for slot in slots[0][1:])


def test_what_every_rank_has_is_a_hit() -> None:
    tier = Tier(8, ranks=2)
    tier.store("p", "abc")
    second = ChunkId(NS, split_keys(keys_of("ab"))[1], 1)
    tier.l1.delete([second])
    _, hit, slots = tier.lookup("abc")
    assert hit == 1
    assert [len(rank) for rank in slots] == [1, 1]
    assert slots[0] != slots[1]
    assert sum(tier.l1.locks.values()) == 2, "the chunk with a hole stays unlocked"


def test_namespaces_share_nothing() -> None:
    tier = Tier(8)
    tier.store("p", "abc")
    assert tier.lookup("abc", namespace="other")[1] == 0


def test_trim_keeps_a_range_locked_until_it_is_empty() -> None:
    tier = Tier(8)
    tier.store("p", "abcdef")
    lookup_id, _, _ = tier.lookup("abcdef")

    def locked() -> list[int]:
        chunks = [ChunkId(NS, key, 0) for key in split_keys(keys_of("abcdef"))]
        return [i for i, chunk in enumerate(chunks) if tier.l1.locks[chunk]]

    tier.table.trim("e", lookup_id, 1, 5)
    assert locked() == [1, 2, 3, 4]
    tier.table.trim("e", lookup_id, 0, 3)
    assert locked() == [1, 2]
    tier.table.trim("e", lookup_id, 2, 9)
    assert locked() == [2]
    tier.table.trim("e", lookup_id, 0, 0)
    assert locked() == []
    tier.table.trim("e", lookup_id, 0, 0)
    assert tier.table.counts()["locked_chunks"] == 0


def test_locked_chunks_are_never_evicted() -> None:
    tier = Tier(3)
    tier.store("p", "abc", value_s=0.0, lease_s=0.0)
    lookup_id, hit, _ = tier.lookup("abc")
    assert hit == 3
    assert tier.store("q", "xy", value_s=1e9) is None
    tier.table.trim("e", lookup_id, 0, 2)
    assert tier.store("q", "x", value_s=1e9) == 1
    assert tier.hit("abc") == 2


def test_full_when_nothing_is_cheaper() -> None:
    tier = Tier(4)
    assert tier.store("rich", "abcd", value_s=4.0) == 4
    # Equal value per byte, and a little more: no thrash between equals.
    assert tier.store("equal", "vw", value_s=2.0) is None
    assert tier.store("similar", "xy", value_s=2.0 * DISPLACE_MARGIN) is None
    assert tier.hit("abcd") == 4
    assert tier.store("worth", "zt", value_s=2.0 * DISPLACE_MARGIN * 1.01) == 2
    assert tier.hit("abcd") == 2, "evicted from the tail, and no more than needed"
    assert tier.table.counts()["evicted_chunks"] == 2


def test_value_counts_per_byte() -> None:
    tier = Tier(6)
    tier.store("large", "abcd", value_s=6.0)
    tier.store("small", "xy", value_s=4.0)
    assert tier.store("new", "m", value_s=5.0) == 1
    assert (tier.hit("abcd"), tier.hit("xy")) == (3, 2)


def test_a_lease_protects_for_its_time_only() -> None:
    tier = Tier(4)
    tier.store("p", "abcd", value_s=100.0, lease_s=10.0)
    assert tier.store("q", "x", value_s=0.1) is None
    tier.now_s = 10.0
    assert tier.store("q", "x", value_s=0.1) == 1
    assert tier.hit("abcd") == 3


def test_without_a_lease_the_least_worth_goes_first() -> None:
    tier = Tier(4)
    tier.store("worth", "ab", value_s=9.0, lease_s=1.0)
    tier.store("cheap", "xy", value_s=1.0, lease_s=1.0)
    tier.now_s = 5.0
    assert tier.store("new", "mn", value_s=0.1) == 2
    assert (tier.hit("ab"), tier.hit("xy")) == (2, 0)


def test_what_is_left_of_a_chain_is_worth_no_more_a_byte() -> None:
    tier = Tier(4)
    tier.store("old", "abcd", value_s=4.0)
    assert tier.store("new", "xy", value_s=3.0) == 2, "its tail has gone"
    assert tier.hit("abcd") == 2
    assert tier.store("newer", "mn", value_s=3.0) == 2, "and now the rest"
    assert (tier.hit("abcd"), tier.hit("xy")) == (0, 2)


def test_what_is_not_used_loses_its_worth() -> None:
    tier = Tier(4)
    tier.store("a", "ab", value_s=2.0)
    tier.now_s = IDLE_SCALE_S
    tier.store("b", "cd", value_s=2.0)
    assert tier.store("c", "xy", value_s=2.0) == 2
    assert (tier.hit("ab"), tier.hit("cd")) == (0, 2)


def test_the_copy_of_a_program_that_runs_goes_first() -> None:
    tier = Tier(4)
    tier.store("runs", "ab", value_s=3.0)
    tier.store("pauses", "cd", value_s=2.0)
    tier.table.mark("e", NS, "runs", "running", tier.now_s)
    assert tier.store("new", "xy", value_s=1.0) == 2
    assert (tier.hit("ab"), tier.hit("cd")) == (0, 2)


def test_what_a_waiting_turn_needs_loses_neither_worth_nor_lease() -> None:
    tier = Tier(4)
    tier.store("waits", "ab", value_s=2.0, lease_s=1.0)
    tier.store("pauses", "cd", value_s=2.0, lease_s=1.0)
    tier.table.mark("e", NS, "waits", "waiting", tier.now_s)
    tier.now_s = 100 * IDLE_SCALE_S
    assert tier.store("new", "xy", value_s=1.0) == 2
    assert (tier.hit("ab"), tier.hit("cd")) == (2, 0)
    assert tier.store("newer", "mn", value_s=2.0) == 2, "the other new one is worth less"
    assert (tier.hit("ab"), tier.hit("xy")) == (2, 0)


@pytest.mark.parametrize("ends", ["paused", "engine gone"])
def test_the_copy_of_a_program_that_has_run_is_worth_as_much_as_before(ends: str) -> None:
    tier = Tier(4)
    tier.store("has run", "ab", value_s=3.0)
    tier.store("pauses", "cd", value_s=2.0)
    tier.table.mark("e", NS, "has run", "running", tier.now_s)
    # What another engine says of its own turns is another matter.
    tier.table.mark("other", NS, "has run", "paused", tier.now_s)
    tier.table.mark("e", NS, "nobody knows", "running", tier.now_s)
    assert tier.table._programs[NS, "has run"].activity == "running"
    if ends == "paused":
        tier.table.mark("e", NS, "has run", "paused", tier.now_s)
    else:
        tier.table.owner_gone("e")
    assert tier.store("new", "xy", value_s=1.0) is None
    assert tier.store("new", "xy", value_s=3.0) == 2
    assert (tier.hit("ab"), tier.hit("cd")) == (2, 0)


def test_a_pause_begins_when_the_turn_ends() -> None:
    tier = Tier(4)
    tier.store("a", "ab", value_s=2.0)
    tier.table.mark("e", NS, "a", "running", tier.now_s)
    tier.now_s = 100 * IDLE_SCALE_S
    tier.store("b", "cd", value_s=1.0)
    tier.table.mark("e", NS, "a", "paused", tier.now_s)
    assert tier.store("c", "xy", value_s=1.5) == 2
    assert (tier.hit("ab"), tier.hit("cd")) == (2, 0)


def test_what_nobody_references_goes_before_any_program() -> None:
    tier = Tier(4)
    tier.store("p", "ab", value_s=1e9)
    tier.store("p", "cd", value_s=1e9)  # its former chain is nobody's now
    assert tier.hit("ab") == 2
    assert tier.store("q", "xy", value_s=1e-9) == 2
    assert (tier.hit("ab"), tier.hit("cd")) == (0, 2)


def test_no_more_orphans_go_than_needed() -> None:
    """Also when no program of their namespace is left to tell a chunk's size."""
    tier = Tier(4)
    tier.store("p", "abcd")
    lookup_id, _, _ = tier.lookup("abcd")
    tier.table.drop(NS, "p")
    tier.table.trim("e", lookup_id, 0, 0)
    assert tier.reserve("q", "m", namespace="other")[1] is not None
    assert tier.table.counts()["evicted_chunks"] == 1


def test_what_a_slow_disk_still_reads_is_neither_lost_nor_taken_for_room() -> None:
    """LMCache reads chunks to write them through: their memory comes back only after that."""
    tier = Tier(4)
    tier.store("p", "abcd")
    tier.l1.read_by_others = set(tier.l1.chunks)
    assert tier.store("q", "xy", value_s=10.0) is None
    assert tier.table.counts()["evicted_chunks"] == 0
    assert tier.hit("abcd") == 4
    assert len(tier.table._programs[NS, "p"].keys) == 4, "a chain was made shorter for nothing"
    tier.table.drop(NS, "p")
    assert tier.l1.n_free == 0
    assert tier.table.counts()["chunks"] == 4
    tier.l1.read_by_others.clear()
    assert tier.store("q", "wxyz") == 4
    assert tier.table.counts()["evicted_chunks"] == 4


def test_what_cannot_go_yet_does_not_stand_before_what_can() -> None:
    tier = Tier(4)
    tier.store("p", "abcd", value_s=1e9)
    tier.store("p", "z", value_s=1e9)  # None: nothing may go for it
    lookup_id, _, _ = tier.lookup("abcd")
    tier.table.drop(NS, "p")
    tier.table.trim("e", lookup_id, 0, 0)
    orphans = list(tier.table._orphans)
    tier.l1.read_by_others = {ChunkId(*chunk, 0) for chunk in orphans[:3]}
    assert tier.store("q", "y") == 1
    assert tier.table.counts()["evicted_chunks"] == 1


def test_room_is_made_after_a_program_has_gone_with_a_spoilt_chunk() -> None:
    tier = Tier(4)
    tier.store("p", "ab")
    tier.store("q", "cd")
    tier.table.spoilt(NS, keys_of("a"))
    assert tier.store("r", "wxyz", value_s=1e9) == 4


def test_a_spoilt_chunk_that_is_read_is_found_by_nobody_and_goes_when_that_ends() -> None:
    tier = Tier(8)
    tier.store("p", "abcd")
    lookup_id, _, _ = tier.lookup("abcd")
    tier.table.spoilt(NS, keys_of("ab")[KEY_BYTES:])
    assert tier.hit("abcd") == 1
    assert tier.store("p", "abcd") == 1, "what nobody can replace yet was taken for good"
    tier.table.trim("e", lookup_id, 0, 0)
    assert tier.l1.n_free == 7
    assert tier.store("p", "abcd") == 4
    assert tier.hit("abcd") == 4
    assert not tier.table._doomed


def test_a_spoilt_chunk_that_a_disk_still_reads_stands_in_nobodys_way_after_that() -> None:
    tier = Tier(8)
    tier.store("p", "ab")
    tier.l1.read_by_others = set(tier.l1.chunks)
    tier.table.spoilt(NS, keys_of("a"))
    assert tier.store("p", "ab") == 0, "what nobody can replace yet was taken for good"
    tier.l1.read_by_others.clear()
    assert tier.store("p", "ab") == 2
    assert not tier.table._doomed


def test_who_staged_what_had_to_go_is_told_once() -> None:
    tier = Tier(4)
    tier.store("p", "ab", value_s=1.0, owner="one")
    tier.store("q", "cd", value_s=2.0, owner="two")
    assert (tier.table.take_shortened("one"), tier.table.take_shortened("two")) == ([], [])
    tier.store("r", "x", value_s=50.0, owner="two")
    assert tier.table.take_shortened("one") == [(NS, "p", 1)]
    assert (tier.table.take_shortened("one"), tier.table.take_shortened("two")) == ([], [])
    tier.store("r", "xyz", value_s=50.0, owner="two")
    assert tier.table.take_shortened("one") == [(NS, "p", 0)]
    assert tier.table.take_shortened("two") == [(NS, "q", 1)]


def test_who_counts_on_what_others_change_is_told() -> None:
    tier = Tier(8)
    tier.store("p", "sysA", owner="one")
    tier.store("q", "sysB", owner="two")
    tier.table.spoilt(NS, keys_of("sy")[KEY_BYTES:])
    assert tier.table.take_shortened("one") == [(NS, "p", 1)]
    assert tier.table.take_shortened("two") == [(NS, "q", 1)]
    tier.store("p", "xy", owner="two")
    tier.table.drop(NS, "q")
    assert tier.table.take_shortened("one") == [(NS, "p", 2)]
    assert tier.table.take_shortened("two") == [(NS, "q", 0)]


def test_for_an_engine_that_is_gone_nothing_piles_up() -> None:
    tier = Tier(4)
    for program in "pq":
        tier.store(program, program * 2, value_s=1.0, owner="one")
    tier.store("r", "x", value_s=50.0, owner="two")
    tier.table.owner_gone("one")
    tier.store("r", "xyzw", value_s=50.0, owner="two")
    assert not tier.table._shortened


def test_a_spoilt_chunk_ends_every_chain_that_has_it() -> None:
    """Else programs that share it would keep it alive for each other, and find it wrong for ever."""
    tier = Tier(8)
    tier.store("p", "sysA")
    tier.store("q", "sysB")
    tier.table.spoilt(NS, keys_of("sy")[KEY_BYTES:])
    assert (tier.hit("sysA"), tier.hit("sysB")) == (1, 1)
    _, slots = tier.reserve("p", "sysA")
    assert slots is not None
    assert slots[0][0] == -1
    assert min(slots[0][1:]) >= 0, "nobody has compared what came behind it"
    tier.commit(tier.next_id)
    assert (tier.hit("sysA"), tier.hit("sysB")) == (4, 3)
    tier.table.spoilt("other", keys_of("s"))
    assert tier.hit("sysA") == 4
    lookup_id, _, _ = tier.lookup("s")
    tier.table.spoilt(NS, keys_of("s"))
    # Being read: its memory is not another chunk's yet.
    assert tier.table.counts()["programs"] == 0
    tier.table.trim("e", lookup_id, 0, 0)
    tier.table.spoilt(NS, keys_of("s"))
    assert tier.hit("sysA") == 0


def test_shared_prefixes_live_until_their_last_program() -> None:
    tier = Tier(8)
    tier.store("p", "sysA")
    _, slots = tier.reserve("q", "sysB")
    assert slots is not None
    assert slots[0][:3] == [-1, -1, -1]
    tier.commit(tier.next_id)
    tier.table.drop(NS, "p")
    assert (tier.hit("sysA"), tier.hit("sysB")) == (3, 4)
    tier.table.drop(NS, "q")
    assert tier.hit("sysB") == 0
    assert tier.l1.n_free == 8


def test_a_programs_prefix_is_not_evicted_for_its_tail() -> None:
    tier = Tier(4)
    tier.store("p", "abc", value_s=0.1, lease_s=0.0)
    assert tier.store("p", "abcdef", value_s=1e9) is None
    assert tier.hit("abc") == 3


def test_a_prefix_shared_with_another_program_is_not_evicted_for_the_tail() -> None:
    tier = Tier(4)
    tier.store("p", "abcd", value_s=0.1, lease_s=0.0)
    assert tier.store("q", "abxy", value_s=1e9) == 4
    assert tier.hit("abxy") == 4


def test_what_a_chain_would_use_again_is_not_evicted_for_it() -> None:
    """Its prefix is there, though no program references it any more."""
    tier = Tier(4)
    tier.store("p", "ab", value_s=1e9)
    tier.store("p", "cd", value_s=1e9)
    assert tier.store("q", "abx") is None
    assert tier.hit("ab") == 2


def test_staging_anew_from_the_start_keeps_the_tail() -> None:
    """An engine that has forgotten what it staged goes through the same chain once more."""
    tier = Tier(4)
    tier.store("p", "abcd", value_s=100.0)
    reserve_id, slots = tier.reserve("p", "abcd", 0, 2, value_s=100.0)
    assert slots == [[-1, -1]]
    assert tier.commit(reserve_id) == 4
    assert tier.store("q", "x", value_s=0.1) is None
    assert tier.hit("abcd") == 4


def test_a_new_chain_of_a_program_replaces_its_old_one() -> None:
    tier = Tier(8)
    tier.store("p", "abcd")
    assert tier.store("p", "abxyz") == 5
    assert tier.table.counts()["programs"] == 1
    tier.table.drop(NS, "p")
    assert tier.hit("abxyz") == 0


def test_a_hole_ends_the_resident_prefix() -> None:
    """Two engines stage the same sequence: the later one gets no slots for what is under way."""
    tier = Tier(8)
    first, slots = tier.reserve("p", "abcd", 0, 2, owner="one")
    second, others = tier.reserve("p", "abcd", owner="two")
    assert slots is not None
    assert others is not None
    assert others[0][:2] == [-1, -1]
    assert all(slot >= 0 for slot in others[0][2:])
    assert tier.commit(second, owner="two") == 0, "chunks 0 and 1 are not written yet"
    assert tier.commit(first, owner="one") == 4
    again, slots = tier.reserve("p", "abcd", owner="two")
    assert slots == [[-1, -1, -1, -1]]
    assert tier.commit(again, owner="two") == 4


def test_a_hole_of_a_failed_writer_is_filled_by_the_next() -> None:
    tier = Tier(8)
    first, _ = tier.reserve("p", "abcd", 0, 2, owner="one")
    second, _ = tier.reserve("p", "abcd", owner="two")
    tier.commit(first, ok=False, owner="one")
    assert tier.commit(second, owner="two") == 0
    again, slots = tier.reserve("p", "abcd", owner="two")
    assert slots is not None
    assert all(slot >= 0 for slot in slots[0][:2])
    assert tier.commit(again, owner="two") == 4


def test_chunks_beyond_a_hole_are_counted_only_where_they_are() -> None:
    tier = Tier(8)
    first, _ = tier.reserve("p", "abcd", 0, 2, owner="one")
    second, _ = tier.reserve("p", "abcd", owner="two")
    tier.commit(second, owner="two")
    assert tier.table.counts()["chunks"] == 2
    tier.commit(first, ok=False, owner="one")
    assert tier.table.counts()["chunks"] == len(tier.l1.chunks) == 2


@pytest.mark.parametrize("dies", ["one", "two"])
def test_an_engine_that_is_gone_holds_nothing(dies: str) -> None:
    tier = Tier(8)
    tier.store("p", "ab")
    ids = {}
    for owner, path in (("one", "x"), ("two", "y")):
        ids[owner] = tier.reserve(owner, path, owner=owner)[0], tier.lookup("ab", owner=owner)[0]
    tier.table.owner_gone(dies)
    stays = "two" if dies == "one" else "one"
    assert tier.commit(ids[dies][0], owner=dies) is None
    assert tier.commit(ids[stays][0], owner=stays) == 1
    assert set(tier.l1.locks.values()) == {1}
    tier.table.owner_gone(stays)
    assert not tier.l1.locks
    assert tier.table.counts()["locked_chunks"] == 0
    assert tier.hit("ab") == 2, "chains stay for others"


def test_nothing_is_left_after_all_programs_are_dropped() -> None:
    tier = Tier(12)
    for program, path in (("p", "abc"), ("q", "abd"), ("r", "xyz")):
        tier.store(program, path)
    for program in ("q", "r", "p", "p"):
        tier.table.drop(NS, program)
    assert (tier.table.counts()["programs"], tier.table.counts()["chunks"]) == (0, 0)
    assert tier.l1.n_free == 12


def test_what_is_read_outlives_its_program() -> None:
    tier = Tier(4)
    tier.store("p", "ab")
    lookup_id, _, _ = tier.lookup("ab")
    tier.table.drop(NS, "p")
    assert tier.hit("ab") == 2
    tier.table.trim("e", lookup_id, 0, 0)
    assert tier.store("q", "wxyz", value_s=1e-9) == 4, "nobody's chunks make room"


paths = st.text("ab", min_size=1, max_size=5)
owners = st.sampled_from(["one", "two"])
programs = st.sampled_from(["p", "q", "r"])


class ResidencyMachine(RuleBasedStateMachine):
    """Any interleaving of two engines on a small L1; `FakeL1` refuses what must not happen."""

    @initialize(n_slots=st.integers(2, 12), ranks=st.integers(1, 2))
    def start(self, n_slots: int, ranks: int) -> None:
        self.tier = Tier(n_slots, ranks)
        self.reservations: dict[tuple[str, int], str] = {}
        self.locks: dict[tuple[str, int], list[bytes]] = {}

    @rule(
        program=programs,
        path=paths,
        owner=owners,
        cut=st.tuples(st.integers(0, 5), st.integers(0, 5)),
        value_s=st.sampled_from([0.0, 1.0, 10.0]),
        lease_s=st.sampled_from([0.0, 5.0]),
    )
    def reserve(
        self,
        program: str,
        path: str,
        owner: str,
        cut: tuple[int, int],
        value_s: float,
        lease_s: float,
    ) -> None:
        start, end = sorted(min(at, len(path)) for at in cut)
        how = {"value_s": value_s, "lease_s": lease_s}
        op_id, slots = self.tier.reserve(program, path, start, end, owner=owner, **how)  # type: ignore[arg-type]
        if slots is None:
            return
        assert [len(rank) for rank in slots] == [end - start] * self.tier.ranks
        given = [slot for rank in slots for slot in rank if slot >= 0]
        assert len(set(given)) == len(given)
        assert {slot // SLOT_BYTES for slot in given}.isdisjoint(self.tier.l1.chunks.values())
        self.reservations[owner, op_id] = path

    @precondition(lambda self: self.reservations)
    @rule(data=st.data(), ok=st.booleans())
    def commit(self, data: st.DataObject, ok: bool) -> None:
        owner, op_id = ref = data.draw(st.sampled_from(sorted(self.reservations)))
        path = self.reservations.pop(ref)
        told = self.tier.commit(op_id, ok=ok, owner=owner)
        assert told == (self.resident(path) if ok else 0)

    @rule(path=paths, program=programs, owner=owners)
    def lookup(self, path: str, program: str, owner: str) -> None:
        op_id, hit, slots = self.tier.lookup(path, program, owner)
        assert hit == self.resident(path), "a reservation was visible, or a chunk was missed"
        assert [len(rank) for rank in slots] == [hit] * self.tier.ranks
        if hit:
            self.locks[owner, op_id] = split_keys(keys_of(path))[:hit]

    @precondition(lambda self: self.locks)
    @rule(data=st.data(), keep=st.tuples(st.integers(0, 5), st.integers(0, 5)))
    def trim(self, data: st.DataObject, keep: tuple[int, int]) -> None:
        ref = data.draw(st.sampled_from(sorted(self.locks)))
        lo, hi = sorted(keep)
        # What was kept before counts from the chain's start, so only the first trim is modelled.
        self.tier.table.trim(*ref, lo, hi)
        self.locks[ref] = self.locks[ref][lo:hi]
        if not self.locks[ref]:
            del self.locks[ref]
            return
        self.tier.table.trim(*ref, 0, 0)
        del self.locks[ref]

    @rule(program=programs)
    def drop(self, program: str) -> None:
        self.tier.table.drop(NS, program)

    @rule(owner=owners)
    def owner_gone(self, owner: str) -> None:
        self.tier.table.owner_gone(owner)
        self.locks = {ref: keys for ref, keys in self.locks.items() if ref[0] != owner}
        kept = {ref: what for ref, what in self.reservations.items() if ref[0] != owner}
        self.reservations = kept

    @rule(program=programs, owner=owners, activity=st.sampled_from(get_args(Activity)))
    def mark(self, program: str, owner: str, activity: Activity) -> None:
        self.tier.table.mark(owner, NS, program, activity, self.tier.now_s)

    @rule(seconds=st.sampled_from([1.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.tier.now_s += seconds

    @rule(path=paths)
    def spoilt(self, path: str) -> None:
        self.tier.table.spoilt(NS, keys_of(path)[-KEY_BYTES:])

    @rule(chance=st.randoms(use_true_random=False))
    def disk(self, chance: Random) -> None:
        chunks = sorted(self.tier.l1.chunks, key=str)
        self.tier.l1.read_by_others = {c for c in chunks if chance.random() < 0.5}

    @rule()
    def disk_has_written(self) -> None:
        self.tier.l1.read_by_others.clear()

    def resident(self, path: str) -> int:
        n_chunks = 0
        for key in split_keys(keys_of(path)):
            ranks = range(self.tier.ranks)
            if (NS, key) in self.tier.table._doomed:
                # What is not what was stored, and cannot go yet, nobody may find.
                break
            if not all(ChunkId(NS, key, rank) in self.tier.l1.chunks for rank in ranks):
                break
            n_chunks += 1
        return n_chunks

    @invariant()
    def locks_are_exact(self) -> None:
        expected = Counter(key for keys in self.locks.values() for key in keys)
        for rank in range(self.tier.ranks):
            locked = {c.key: n for c, n in self.tier.l1.locks.items() if c.rank == rank}
            assert locked == dict(expected)
        assert self.tier.table.counts()["locked_chunks"] == len(expected)

    @invariant()
    def every_resident_chunk_is_known_and_no_other(self) -> None:
        table, resident = self.tier.table, {(c.namespace, c.key) for c in self.tier.l1.chunks}
        assert set(table._refs) | set(table._orphans) == resident
        assert not set(table._refs) & set(table._orphans)
        assert table.counts()["chunks"] == len(resident)

    @invariant()
    def references_are_those_of_the_programs(self) -> None:
        records = self.tier.table._programs.items()
        assert self.tier.table._refs == Counter((ns, k) for (ns, _), r in records for k in r.keys)
        assert all(record.keys or record.ranks for _, record in records)

    @invariant()
    def staged_slots_belong_to_reservations(self) -> None:
        assert self.tier.table.counts()["reservations"] == len(self.reservations)
        staged = {tag for _, tag in self.tier.l1.staged.values()}
        assert staged <= {f"{owner}:{op_id}" for owner, op_id in self.reservations}

    def teardown(self) -> None:
        self.tier.l1.read_by_others.clear()
        for owner in ("one", "two"):
            self.tier.table.owner_gone(owner)
        for program in ("p", "q", "r"):
            self.tier.table.drop(NS, program)
        counts = self.tier.table.counts()
        counts.pop("evicted_chunks")
        assert counts == {
            "programs": 0,
            "chunks": len({chunk.key for chunk in self.tier.l1.chunks}),
            "locked_chunks": 0,
            "reservations": 0,
        }
        # What nobody references is all there is: it goes for anything.
        n_chunks = self.tier.l1.n_slots // self.tier.ranks
        assert self.tier.store("z", "z" * n_chunks, value_s=0.0) == n_chunks


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
