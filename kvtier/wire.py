"""Messages between an engine's scheduler process and kvtier's module inside the LMCache server.

The transport is one ZeroMQ DEALER (engine) to ROUTER (server) pair over a Unix socket in a directory
that only the user can enter. A message is one msgpack frame: a tagged `msgspec.Struct`. Messages carry
chunk keys (16 bytes each) and slot offsets, never token lists: encoding 100k tokens costs milliseconds
on the scheduler's thread, 400 chunk keys cost microseconds.

Each request has an `id` chosen by the engine; its reply carries the same id. `Evicted` alone comes unasked. Chunk keys
travel as one `bytes` of `KEY_BYTES * n`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

API_VERSION = 4
KEY_BYTES = 16


class _Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base: arrays on the wire, tagged by class name."""


class Hello(_Message, frozen=True):
    """Register an engine. `pid` and `pid_start_s`, seconds after boot, let the server see that it has died."""

    id: int
    api: int
    owner: str
    pid: int
    pid_start_s: float


class Lookup(_Message, frozen=True):
    """Find and read-lock the longest resident prefix of `keys` that all ranks hold."""

    id: int
    namespace: str
    program: str
    keys: bytes
    ranks: int


class Trim(_Message, frozen=True):
    """Keep only chunks [keep_from, keep_to) of lookup `lookup_id` locked; an empty range ends it."""

    id: int
    lookup_id: int
    keep_from: int
    keep_to: int


class Reserve(_Message, frozen=True):
    """Ask for slots for chunks [start, end) of a program's chain `keys`.

    `value_s` is what the program's KV is worth, in seconds that it saves, the less the longer it is expected to
    lie there; `lease_s` is how long that holds. Room is made by evicting what is worth less a byte, and the
    worth falls while nobody uses it.
    """

    id: int
    namespace: str
    program: str
    keys: bytes
    start: int
    end: int
    ranks: int
    slot_bytes: int
    value_s: float
    lease_s: float


class Commit(_Message, frozen=True):
    """End reservation `reserve_id`: admit what was written (`ok`) or discard it."""

    id: int
    reserve_id: int
    ok: bool


class Drop(_Message, frozen=True):
    """Forget a program. Its chunks go when nothing else references them."""

    id: int
    namespace: str
    program: str


class Spoilt(_Message, frozen=True):
    """Chunk `key` is not what was stored: no chain goes on with it, nor with what comes behind it."""

    id: int
    namespace: str
    key: bytes


class Mark(_Message, frozen=True):
    """What the program does: `paused`, `waiting` (to run, so it needs its KV) or `running` (it has it)."""

    id: int
    namespace: str
    program: str
    activity: Literal["paused", "waiting", "running"]


class Status(_Message, frozen=True):
    """Ask for counts."""

    id: int


class Failed(_Message, frozen=True):
    """The request could not be served. `reason` is machine-readable."""

    id: int
    reason: str
    detail: str


class HelloReply(_Message, frozen=True):
    """The region to map, and which server this is (`generation` changes when it restarts).

    `used_bytes`, here and below: what chunks of all engines take now; a server of before tells none.
    """

    id: int
    api: int
    generation: str
    shm_name: str
    pool_bytes: int
    eviction_policy: str
    used_bytes: int | None = None


class LookupReply(_Message, frozen=True):
    """`hit_chunks` from the start, and for each rank the slot offsets of exactly these chunks."""

    id: int
    generation: str
    hit_chunks: int
    slots: list[list[int]]


class ReserveReply(_Message, frozen=True):
    """For each rank, one slot offset a chunk of [start, end); -1 where it is resident already."""

    id: int
    generation: str
    slots: list[list[int]]


class CommitReply(_Message, frozen=True):
    """How many chunks of the program's chain are resident, counted from its start."""

    id: int
    generation: str
    resident_chunks: int
    used_bytes: int | None = None


class StatusReply(_Message, frozen=True):
    """Counts: bytes used and total, programs, chunks, locks held by lookups, open reservations."""

    id: int
    generation: str
    used_bytes: int
    total_bytes: int
    programs: int
    chunks: int
    locked_chunks: int
    reservations: int
    evicted_chunks: int


class Ack(_Message, frozen=True):
    """Done."""

    id: int


class Evicted(_Message, frozen=True):
    """Of the chain of a program that this engine has staged, `resident_chunks` are left: room was made, say.

    `id` is 0. It comes behind the answer of what was asked before, and before that of what is asked later; an engine that
    has been silent for a while gets it behind the answer to what it asks next.
    """

    id: int
    namespace: str
    program: str
    resident_chunks: int


Request = Hello | Lookup | Trim | Reserve | Commit | Drop | Spoilt | Mark | Status
Reply = Failed | HelloReply | LookupReply | ReserveReply | CommitReply | StatusReply | Ack | Evicted

encoder = msgspec.msgpack.Encoder()
request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def split_keys(keys: bytes) -> list[bytes]:
    """Cut a key string into its chunk keys."""
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
