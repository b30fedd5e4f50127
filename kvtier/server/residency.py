"""Who has which chunks in the CPU tier, what they are worth, and what goes when room is needed.

Pure bookkeeping over an `L1Store` (LMCache's L1 in the server, a fake in tests). One instance lives in
the LMCache server and is used from one thread.

Terms:

- **chunk**: the KV of `chunk_tokens` tokens of one rank, in one slot of the shared region.
- **chain**: a program's chunk keys in order; key i covers everything up to chunk i, so a chain is only
  useful up to its first missing chunk, and is evicted from its tail.
- **activity**: a program pauses, waits to run (and needs its copy then), or runs: an engine has its KV in GPU
  memory for a turn.
- **lease**: the time for which a program's value holds. Leased chunks go only to make room for something
  worth more per byte; chunks without a live lease go first.

Invariants: a locked chunk (being read by a lookup) is never evicted; a reservation is invisible until it
is committed; when an engine is gone its locks and reservations are gone too.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from kvtier.server.claims import Lock, Reservation
from kvtier.server.eviction_order import EvictionOrder, StoredProgram
from kvtier.server.l1_store import ChunkId, L1Store
from kvtier.wire import split_keys

if TYPE_CHECKING:
    from kvtier.backend import Activity

EVICTION_STEPS = 8


class Shortened(NamedTuple):
    """A program that has lost the tail of its chain: `n_chunks` are left."""

    namespace: str
    program: str
    n_chunks: int


class ResidencyTable:
    """Programs, chunk references, locks and reservations of one LMCache server."""

    def __init__(self, store: L1Store) -> None:
        self._store = store
        self._programs: dict[tuple[str, str], StoredProgram] = {}
        self._refs: dict[tuple[str, bytes], int] = {}
        # Ranks and slot bytes of each chunk: outlives the program that told them.
        self._sizes: dict[tuple[str, bytes], tuple[int, int]] = {}
        # Chunks that no program references any more, oldest first: evicted before anything else.
        self._orphans: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self._locks: dict[tuple[str, int], Lock] = {}
        self._locked: dict[tuple[str, bytes], int] = {}
        self._reservations: dict[tuple[str, int], Reservation] = {}
        # Orphans that are not what was stored and are being read: nobody finds them any more.
        self._doomed: set[tuple[str, bytes]] = set()
        self._order = EvictionOrder(self._programs)
        # Programs that have lost KV since `take_shortened`, by the engine that staged them last.
        self._shortened: dict[str, dict[tuple[str, str], None]] = {}
        self.evicted_chunks = 0

    # -- reading -----------------------------------------------------------------------------------

    def lookup(
        self,
        owner: str,
        lookup_id: int,
        namespace: str,
        program: str,
        keys: bytes,
        ranks: int,
        now_s: float,
    ) -> tuple[int, list[list[int]]]:
        """Lock the longest prefix that every rank holds; returns its length and each rank's slots."""
        self._free_doomed()
        chain = split_keys(keys)
        slots: list[list[int]] = [[] for _ in range(ranks)]
        hit = 0
        for key in chain:
            if (namespace, key) in self._doomed:
                break
            chunks = [ChunkId(namespace, key, rank) for rank in range(ranks)]
            offsets = self._store.lock(chunks)
            if any(offset is None for offset in offsets):
                self._store.unlock(
                    [c for c, o in zip(chunks, offsets, strict=True) if o is not None]
                )
                break
            for rank, offset in enumerate(offsets):
                assert offset is not None
                slots[rank].append(offset)
            self._count_lock((namespace, key), 1)
            hit += 1
        record = self._programs.get((namespace, program))
        if record is not None:
            record.used_s = now_s
            self._order.place((namespace, program), now_s)
        if hit:
            self._locks[owner, lookup_id] = Lock(namespace, chain[:hit], 0, ranks)
        return hit, slots

    def trim(self, owner: str, lookup_id: int, keep_from: int, keep_to: int) -> None:
        """Unlock what a lookup holds outside chunks [keep_from, keep_to); nothing left ends it."""
        lock = self._locks.get((owner, lookup_id))
        if lock is None:
            return
        end = lock.start + len(lock.keys)
        keep_from = min(max(keep_from, lock.start), end)
        keep_to = max(min(keep_to, end), keep_from)
        lo, hi = keep_from - lock.start, keep_to - lock.start
        self._unlock(lock, lock.keys[:lo] + lock.keys[hi:])
        if lo == hi:
            del self._locks[owner, lookup_id]
        else:
            lock.keys, lock.start = lock.keys[lo:hi], keep_from

    # -- writing -----------------------------------------------------------------------------------

    def reserve(
        self,
        owner: str,
        reserve_id: int,
        namespace: str,
        program: str,
        keys: bytes,
        start: int,
        end: int,
        ranks: int,
        slot_bytes: int,
        value_s: float,
        lease_s: float,
        now_s: float,
    ) -> list[list[int]] | None:
        """Slots for chunks [start, end), -1 where resident; None when no room can be made."""
        self._free_doomed()
        chain = split_keys(keys)
        missing = [
            key
            for key in chain[start:end]
            if not all(self._store.resident(ChunkId(namespace, key, r)) for r in range(ranks))
        ]
        wanted = [ChunkId(namespace, key, rank) for key in missing for rank in range(ranks)]
        tag = f"{owner}:{reserve_id}"
        density = _density(value_s, chain, slot_bytes, ranks)
        # The program's own prefix must not be evicted to make room for its tail.
        protect = (namespace, program), set(chain)
        offsets = self._store.allocate(wanted, slot_bytes, tag) if wanted else {}
        # Room may be there in part: a little at a time, so that no more goes than must.
        step_bytes = max(1, len(wanted) // EVICTION_STEPS) * slot_bytes
        while offsets is None:
            if not self._evict(step_bytes, density, protect, now_s):
                return None
            offsets = self._store.allocate(wanted, slot_bytes, tag)
        self._reservations[owner, reserve_id] = Reservation(
            namespace, program, chain, end, list(offsets), tag, ranks, slot_bytes, value_s, lease_s
        )
        return [
            [offsets.get(ChunkId(namespace, key, rank), -1) for key in chain[start:end]]
            for rank in range(ranks)
        ]

    def commit(self, owner: str, reserve_id: int, now_s: float, *, ok: bool) -> int | None:
        """End a reservation. Returns the resident prefix length, None when it is unknown."""
        res = self._reservations.pop((owner, reserve_id), None)
        if res is None:
            return None
        if not ok:
            self._store.discard(res.chunks, res.tag)
            return 0
        self._store.admit(res.chunks, res.tag)
        resident = 0
        # Beyond the reservation's end too: the chain's own tail, staged before, stays referenced.
        for key in res.keys:
            if (res.namespace, key) in self._doomed or not all(
                self._store.resident(ChunkId(res.namespace, key, r)) for r in range(res.ranks)
            ):
                break
            resident += 1
        self._set_chain(owner, res, res.keys[:resident], now_s)
        # Chunks beyond a hole cannot be read by anyone: do not keep them alive.
        for key in res.keys[resident : res.end]:
            if any(self._store.resident(ChunkId(res.namespace, key, r)) for r in range(res.ranks)):
                self._orphan_if_unreferenced((res.namespace, key), (res.ranks, res.slot_bytes))
        return resident

    def drop(self, namespace: str, program: str) -> None:
        """Forget a program; free what only it referenced and nobody reads."""
        record = self._programs.get((namespace, program))
        if record is None:
            return
        self._remove((namespace, program))
        self._shortens((namespace, program), record.owner)
        for key in reversed(record.keys):
            self._unref((namespace, key))
            if (namespace, key) in self._orphans and not self._locked.get((namespace, key)):
                self._free((namespace, key))

    def spoilt(self, namespace: str, key: bytes) -> None:
        """A chunk is not what was stored: every chain ends before it.

        It goes, and so does what came behind it, which nobody has compared: else the next staging would take it
        for good and go on with it. What is being read goes when that ends, and until then nobody finds it.
        """
        gone = {key: None}
        for ref, record in list(self._programs.items()):
            if ref[0] != namespace or key not in record.keys:
                continue
            at = record.keys.index(key)
            for unreachable in reversed(record.keys[at:]):
                self._unref((namespace, unreachable))
                gone[unreachable] = None
            del record.keys[at:]
            self._shortens(ref, record.owner)
            if not record.keys:
                self._remove(ref)
        for chunk in ((namespace, one) for one in gone):
            if chunk in self._orphans:
                self._doomed.add(chunk)
                if not self._locked.get(chunk):
                    self._free(chunk)

    def mark(
        self, owner: str, namespace: str, program: str, activity: Activity, now_s: float
    ) -> None:
        """Note what a program does in an engine; programs without chunks are ignored."""
        record = self._programs.get((namespace, program))
        # That it pauses in one engine says nothing of another, to which its client has turned.
        if record is not None and (activity != "paused" or record.active_on == owner):
            record.activity, record.active_on, record.used_s = activity, owner, now_s
            self._order.place((namespace, program), now_s)

    def owner_gone(self, owner: str) -> None:
        """An engine died: release its locks, discard its reservations. Its chains stay for others."""
        self._shortened.pop(owner, None)
        for name, record in self._programs.items():
            if record.owner == owner:
                record.owner = ""
            if record.active_on == owner:
                record.activity = "paused"
                self._order.place(name, record.used_s)
        for ref in [ref for ref in self._locks if ref[0] == owner]:
            lock = self._locks.pop(ref)
            self._unlock(lock, lock.keys)
        for ref in [ref for ref in self._reservations if ref[0] == owner]:
            res = self._reservations.pop(ref)
            self._store.discard(res.chunks, res.tag)

    def take_shortened(self, owner: str) -> list[Shortened]:
        """Programs that an engine has staged last and that have lost KV since it was last told."""
        refs = self._shortened.pop(owner, {})
        return [Shortened(*ref, self._n_chunks(ref)) for ref in refs]

    def _shortens(self, ref: tuple[str, str], owner: str) -> None:
        if owner:
            self._shortened.setdefault(owner, {})[ref] = None

    def _n_chunks(self, ref: tuple[str, str]) -> int:
        record = self._programs.get(ref)
        return len(record.keys) if record is not None else 0

    def counts(self) -> dict[str, int]:
        """Programs, chunks (per rank), chunks locked, open reservations."""
        return {
            "programs": len(self._programs),
            "chunks": len(self._refs) + len(self._orphans),
            "locked_chunks": len(self._locked),
            "reservations": len(self._reservations),
            "evicted_chunks": self.evicted_chunks,
        }

    # -- internals ---------------------------------------------------------------------------------

    def _unlock(self, lock: Lock, keys: list[bytes]) -> None:
        for key in keys:
            self._count_lock((lock.namespace, key), -1)
        self._store.unlock(
            [ChunkId(lock.namespace, key, r) for key in keys for r in range(lock.ranks)]
        )
        if self._doomed:
            for chunk in ((lock.namespace, key) for key in keys):
                if chunk in self._doomed and not self._locked.get(chunk):
                    self._free(chunk)

    def _count_lock(self, chunk: tuple[str, bytes], step: int) -> None:
        count = self._locked.get(chunk, 0) + step
        if count > 0:
            self._locked[chunk] = count
        else:
            self._locked.pop(chunk, None)

    def _set_chain(self, owner: str, res: Reservation, keys: list[bytes], now_s: float) -> None:
        record = self._programs.setdefault((res.namespace, res.program), StoredProgram())
        old = record.keys
        common = 0
        while common < min(len(old), len(keys)) and old[common] == keys[common]:
            common += 1
        for key in keys[common:]:
            chunk = (res.namespace, key)
            self._refs[chunk] = self._refs.get(chunk, 0) + 1
            self._sizes[chunk] = res.ranks, res.slot_bytes
            self._orphans.pop(chunk, None)
        for key in reversed(old[common:]):
            self._unref((res.namespace, key))
        record.keys = keys
        # Of the whole chain: what is left of one after an eviction, or not there yet, is worth no more a byte.
        record.density = _density(res.value_s, res.keys, res.slot_bytes, res.ranks)
        record.lease_until_s = now_s + res.lease_s
        record.used_s, record.slot_bytes, record.ranks = now_s, res.slot_bytes, res.ranks
        if record.owner != owner:
            # Who had staged it counts on chunks that may be nobody's now.
            self._shortens((res.namespace, res.program), record.owner)
        record.owner = owner
        self._order.place((res.namespace, res.program), now_s)

    def _remove(self, ref: tuple[str, str]) -> None:
        del self._programs[ref]
        self._order.remove(ref)

    def _unref(self, chunk: tuple[str, bytes]) -> None:
        count = self._refs.get(chunk, 0) - 1
        if count > 0:
            self._refs[chunk] = count
        else:
            self._refs.pop(chunk, None)
            self._orphans[chunk] = None

    def _orphan_if_unreferenced(self, chunk: tuple[str, bytes], size: tuple[int, int]) -> None:
        if chunk not in self._refs:
            self._sizes[chunk] = size
            self._orphans[chunk] = None

    def _free_doomed(self) -> None:
        """Try anew what the store could not let go of: until it has gone, nothing can be stored in its place."""
        for chunk in [chunk for chunk in self._doomed if not self._locked.get(chunk)]:
            self._free(chunk)

    def _free(self, chunk: tuple[str, bytes]) -> int:
        """Free a chunk that nobody references; returns its bytes, all ranks.

        0 where the store cannot let go of it yet: it is known until it can.
        """
        return self._forget(chunk) if self._delete(chunk) else 0

    def _delete(self, chunk: tuple[str, bytes]) -> bool:
        """Give a chunk's memory back; False where the store cannot let go of it yet."""
        ranks, _ = self._sizes[chunk]
        return not self._store.delete([ChunkId(*chunk, rank) for rank in range(ranks)])

    def _forget(self, chunk: tuple[str, bytes]) -> int:
        """A chunk that nobody references has gone; returns its bytes, all ranks."""
        ranks, slot_bytes = self._sizes.pop(chunk)
        del self._orphans[chunk]
        self._doomed.discard(chunk)
        return ranks * slot_bytes

    def _evict(
        self,
        need_bytes: int,
        density: float,
        protect: tuple[tuple[str, str], set[bytes]],
        now_s: float,
    ) -> bool:
        """Free at least something towards `need_bytes`, cheapest first; False when nothing may go."""
        own, own_keys = protect
        freed = self._evict_orphans(need_bytes, own[0], own_keys)
        if freed >= need_bytes:
            return True
        for ref in self._order.victims(density, now_s):
            if ref != own:
                freed += self._evict_tail(ref, need_bytes - freed, own[0], own_keys)
                if freed >= need_bytes:
                    break
        return freed > 0

    def _evict_orphans(self, need_bytes: int, own_ns: str, own_keys: set[bytes]) -> int:
        """Free chunks without a program, the oldest first."""
        freed, stuck = 0, set[tuple[str, bytes]]()
        while chosen := self._orphans_for(need_bytes - freed, own_ns, own_keys, stuck):
            for chunk in chosen:
                n_bytes = self._free(chunk)
                freed += n_bytes
                self.evicted_chunks += n_bytes > 0
                if not n_bytes:
                    stuck.add(chunk)
                    # The next one who looks need not pass it first.
                    self._orphans.move_to_end(chunk)
        return freed

    def _orphans_for(
        self, need_bytes: int, own_ns: str, own_keys: set[bytes], stuck: set[tuple[str, bytes]]
    ) -> list[tuple[str, bytes]]:
        """The oldest chunks without a program that may go, as many as are wanted."""
        chosen: list[tuple[str, bytes]] = []
        for chunk in self._orphans:
            if need_bytes <= 0:
                break
            is_own = chunk[0] == own_ns and chunk[1] in own_keys
            if not self._locked.get(chunk) and not is_own and chunk not in stuck:
                chosen.append(chunk)
                ranks, slot_bytes = self._sizes[chunk]
                need_bytes -= ranks * slot_bytes
        return chosen

    def _evict_tail(
        self, ref: tuple[str, str], need_bytes: int, own_ns: str, own_keys: set[bytes]
    ) -> int:
        record = self._programs[ref]
        freed = 0
        while record.keys and freed < need_bytes:
            chunk = (ref[0], record.keys[-1])
            if self._locked.get(chunk):
                break
            is_own = ref[0] == own_ns and chunk[1] in own_keys
            goes = self._refs[chunk] == 1 and not is_own
            if goes and not self._delete(chunk):
                # Its memory cannot be had yet: the chain is not made shorter for nothing.
                break
            record.keys.pop()
            self._shortens(ref, record.owner)
            self._unref(chunk)
            if goes:
                freed += self._forget(chunk)
                self.evicted_chunks += 1
        if not record.keys:
            self._remove(ref)
        return freed


def _density(value_s: float, chain: list[bytes], slot_bytes: int, ranks: int) -> float:
    return value_s / max(1, len(chain) * slot_bytes * ranks)
