"""kvtier's part of the LMCache server: residency leases and eviction by value on LMCache's L1.

Loaded by `lmcache server --server-module '{"module_path": "kvtier.server_module", "config": {"endpoint":
"ipc:///path/to/socket"}}'`. LMCache owns the shared memory, its allocation, the objects and whatever L2
adapters are configured (an admitted object is written through to them by LMCache). This module answers
the engines (`kvtier.wire`) from one thread, so `ResidencyTable` needs no locks.

Run the server with `--eviction-policy noop`: then nothing but this module evicts, and a lease means
something. With another policy leases are best effort, which engines are told in `HelloReply`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import zmq
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.error import L1Error
from lmcache.v1.multiprocess.ext_server_module import ExtServerModuleComponents

from kvtier import wire
from kvtier.server import processes
from kvtier.server.residency import ResidencyTable

if TYPE_CHECKING:
    from lmcache.v1.multiprocess.engine_context import MPCacheServerContext
    from lmcache.v1.multiprocess.ext_server_module import ExtServerModuleBuildContext

    from kvtier.server.l1_store import ChunkId

logger = logging.getLogger(__name__)

OWNER_CHECK_INTERVAL_S = 1.0
TELL_WITHIN_S = 5.0
"""An engine that was heard so long ago reads what it is sent. One at work asks for counts every two seconds."""
RELEASE_GRACE_S = 15.0
"""What an engine held is kept this long after it died or reconnected: its workers may still be copying.
Workers give up an order after `staging.ORDER_DEADLINE_S`, which is less."""


class LMCacheL1:
    """`L1Store` on LMCache's `L1Manager`. Slots are raw bytes: kvtier owns the layout inside them."""

    def __init__(self, storage_manager: Any) -> None:
        self._l1 = storage_manager._l1_manager  # noqa: SLF001 - LMCache 0.5.6 has no public way to its L1

    @staticmethod
    def _key(chunk: ChunkId) -> ObjectKey:
        return ObjectKey(chunk_hash=chunk.key, model_name=chunk.namespace, kv_rank=chunk.rank)

    def allocate(
        self, chunks: list[ChunkId], slot_bytes: int, tag: str
    ) -> dict[ChunkId, int] | None:
        """See `L1Store.allocate`."""
        layout = MemoryLayoutDesc(shapes=[torch.Size([slot_bytes])], dtypes=[torch.uint8])
        keys = {chunk: self._key(chunk) for chunk in chunks}
        result = self._l1.reserve_write(list(keys.values()), [False] * len(keys), layout, tag)
        offsets: dict[ChunkId, int] = {}
        for chunk, key in keys.items():
            error, memory = result[key]
            if error == L1Error.OUT_OF_MEMORY:
                self.discard(list(offsets), tag)
                return None
            if error == L1Error.SUCCESS:
                offsets[chunk] = memory.shm_offset
        return offsets

    def admit(self, chunks: list[ChunkId], tag: str) -> list[ChunkId]:
        """See `L1Store.admit`."""
        result = self._l1.finish_write([self._key(chunk) for chunk in chunks], tag)
        return [chunk for chunk in chunks if result[self._key(chunk)] == L1Error.SUCCESS]

    def discard(self, chunks: list[ChunkId], tag: str) -> None:
        """See `L1Store.discard`."""
        if chunks:
            self._l1.finish_write_and_delete([self._key(chunk) for chunk in chunks], tag)

    def lock(self, chunks: list[ChunkId]) -> list[int | None]:
        """See `L1Store.lock`."""
        result = self._l1.reserve_read([self._key(chunk) for chunk in chunks])
        offsets: list[int | None] = []
        for chunk in chunks:
            error, memory = result[self._key(chunk)]
            offsets.append(memory.shm_offset if error == L1Error.SUCCESS else None)
        return offsets

    def unlock(self, chunks: list[ChunkId]) -> None:
        """See `L1Store.unlock`."""
        if chunks:
            self._l1.finish_read([self._key(chunk) for chunk in chunks])

    def resident(self, chunk: ChunkId) -> bool:
        """See `L1Store.resident`. Staged objects are not resident."""
        return self._key(chunk) in self._l1._objects  # noqa: SLF001 - no side-effect-free public query

    def delete(self, chunks: list[ChunkId]) -> list[ChunkId]:
        """See `L1Store.delete`."""
        result = self._l1.delete([self._key(chunk) for chunk in chunks])
        return [chunk for chunk in chunks if result[self._key(chunk)] == L1Error.KEY_IS_LOCKED]


class KVTierModule:
    """Serves `kvtier.wire` requests on a ROUTER socket; releases what dead engines held."""

    def __init__(self, context: MPCacheServerContext, endpoint: str, eviction_policy: str) -> None:
        self._context = context
        self._endpoint = endpoint
        self._eviction_policy = eviction_policy
        self._storage = context.storage_manager
        self._table = ResidencyTable(LMCacheL1(self._storage))
        self._generation = uuid.uuid4().hex
        self._owners: dict[bytes, tuple[str, int, float]] = {}
        self._leaving: dict[str, float] = {}
        self._heard_s: dict[bytes, float] = {}
        self._stop = threading.Event()
        self._zmq = zmq.Context()
        self._socket = self._zmq.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        if endpoint.startswith("ipc://"):
            Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
        old_umask = os.umask(0o177)
        try:
            self._socket.bind(endpoint)
        finally:
            os.umask(old_umask)
        self._thread = threading.Thread(target=self._serve, name="kvtier-module", daemon=True)
        self._thread.start()
        logger.info("kvtier module listening on %s (generation %s)", endpoint, self._generation)

    @property
    def context(self) -> MPCacheServerContext:
        """LMCache's `EngineModule` contract."""
        return self._context

    def report_status(self) -> dict[str, Any]:
        """Counts for LMCache's `/status`."""
        return {"kvtier": {"is_healthy": self._thread.is_alive(), **self._table.counts()}}

    def close(self) -> None:
        """Stop serving. Idempotent."""
        self._stop.set()
        self._thread.join(timeout=5)
        if self._endpoint.startswith("ipc://"):
            Path(self._endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        next_check_s = 0.0
        while not self._stop.is_set():
            ready = poller.poll(timeout=200)
            now_s = time.monotonic()
            if now_s >= next_check_s:
                next_check_s = now_s + OWNER_CHECK_INTERVAL_S
                try:
                    self._release_dead_owners(now_s)
                except Exception:
                    # The thread serves all engines of the host: it must not end.
                    logger.exception("what dead engines held could not be released")
            if not ready:
                continue
            identity, *frames = self._socket.recv_multipart()
            # Another kind of socket than ours puts a frame in between: what follows is unreadable.
            reply = self._answer(identity, frames[0] if frames else b"", now_s)
            self._send(identity, reply)
            if identity in self._owners:
                self._heard_s[identity] = now_s
            try:
                self._tell_evictions(now_s)
            except Exception:
                # As above; engines find out when they look.
                logger.exception("engines could not be told of evictions")
        self._socket.close()
        self._zmq.term()

    def _send(self, identity: bytes, reply: wire.Reply) -> None:
        # A client that is gone is no error: ROUTER drops what it cannot route.
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart([identity, wire.encoder.encode(reply)], zmq.NOBLOCK)

    def _tell_evictions(self, now_s: float) -> None:
        """Tell engines what they have lost: else they would count on copies that are no more.

        Those that are silent, as they have nothing to do, are told behind the answer to what they ask next: nothing
        piles up in their socket meanwhile.
        """
        for identity, (owner, *_) in self._owners.items():
            if now_s - self._heard_s.get(identity, 0.0) > TELL_WITHIN_S:
                continue
            for shortened in self._table.take_shortened(owner):
                self._send(identity, wire.Evicted(0, *shortened))

    def _answer(self, identity: bytes, frame: bytes, now_s: float) -> wire.Reply:
        try:
            request = wire.request_decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return wire.Failed(0, "malformed", str(error))
        if isinstance(request, wire.Hello):
            return self._hello(identity, request)
        owner = self._owners.get(identity)
        if owner is None:
            return wire.Failed(request.id, "unknown_owner", "say hello first")
        try:
            return self._handle(owner[0], request, now_s)
        except Exception as error:
            # The engine recomputes; the server must go on serving the others.
            logger.exception("kvtier request %s failed", type(request).__name__)
            return wire.Failed(request.id, "server_error", f"{type(error).__name__}: {error}")

    def _hello(self, identity: bytes, hello: wire.Hello) -> wire.Reply:
        if hello.api != wire.API_VERSION:
            return wire.Failed(
                hello.id,
                "api_mismatch",
                f"engine speaks kvtier wire version {hello.api}, this server {wire.API_VERSION}",
            )
        pool = self._context.shm_pool_info
        if not pool["shm_name"]:
            return wire.Failed(hello.id, "no_shared_memory", "start lmcache server with --shm-name")
        if not processes.alive(hello.pid, hello.pid_start_s):
            return wire.Failed(
                hello.id,
                "not_on_this_host",
                f"process {hello.pid} is not visible here: engine and server must share the host's "
                "shared memory and the PID namespace",
            )
        for other, (owner, pid, started_s) in list(self._owners.items()):
            if (pid, started_s) == (hello.pid, hello.pid_start_s) and _engine(owner) == _engine(
                hello.owner
            ):
                self._forget(other)
                if owner != hello.owner:
                    self._leaving[owner] = time.monotonic()
        self._owners[identity] = (hello.owner, hello.pid, hello.pid_start_s)
        return wire.HelloReply(
            hello.id,
            wire.API_VERSION,
            self._generation,
            pool["shm_name"],
            pool["pool_size"],
            self._eviction_policy,
            self._used_bytes(),
        )

    def _handle(self, owner: str, request: wire.Request, now_s: float) -> wire.Reply:
        table = self._table
        match request:
            case wire.Lookup():
                hit, slots = table.lookup(
                    owner,
                    request.id,
                    request.namespace,
                    request.program,
                    request.keys,
                    request.ranks,
                    now_s,
                )
                return wire.LookupReply(request.id, self._generation, hit, slots)
            case wire.Trim():
                table.trim(owner, request.lookup_id, request.keep_from, request.keep_to)
            case wire.Reserve():
                reserved = table.reserve(
                    owner,
                    request.id,
                    request.namespace,
                    request.program,
                    request.keys,
                    request.start,
                    request.end,
                    request.ranks,
                    request.slot_bytes,
                    request.value_s,
                    request.lease_s,
                    now_s,
                )
                if reserved is None:
                    return wire.Failed(request.id, "l1_full", "nothing of less value to evict")
                return wire.ReserveReply(request.id, self._generation, reserved)
            case wire.Commit():
                resident = table.commit(owner, request.reserve_id, now_s, ok=request.ok)
                if resident is None:
                    return wire.Failed(request.id, "unknown_reservation", str(request.reserve_id))
                return wire.CommitReply(request.id, self._generation, resident, self._used_bytes())
            case wire.Drop():
                table.drop(request.namespace, request.program)
            case wire.Spoilt():
                logger.warning("a chunk of %s is not what was stored there", request.namespace)
                table.spoilt(request.namespace, request.key)
            case wire.Mark():
                table.mark(owner, request.namespace, request.program, request.activity, now_s)
            case wire.Status():
                return self._status(request.id)
            case _:
                return wire.Failed(request.id, "malformed", type(request).__name__)
        return wire.Ack(request.id)

    def _status(self, request_id: int) -> wire.StatusReply:
        used, total = self._storage.get_l1_usage()
        counts = self._table.counts()
        return wire.StatusReply(request_id, self._generation, used, total, **counts)

    def _used_bytes(self) -> int:
        used, _ = self._storage.get_l1_usage()
        return int(used)

    def _forget(self, identity: bytes) -> None:
        del self._owners[identity]
        self._heard_s.pop(identity, None)

    def _release_dead_owners(self, now_s: float) -> None:
        for identity, (owner, pid, started_s) in list(self._owners.items()):
            if not processes.alive(pid, started_s):
                logger.warning("engine %s (pid %d) is gone", owner, pid)
                self._forget(identity)
                self._leaving[owner] = now_s
        for owner, since_s in list(self._leaving.items()):
            if now_s - since_s >= RELEASE_GRACE_S:
                del self._leaving[owner]
                self._table.owner_gone(owner)


def _engine(owner: str) -> str:
    """The engine of a session name `engine/n`."""
    return owner.rsplit("/", 1)[0]


def build_server_modules(build: ExtServerModuleBuildContext) -> ExtServerModuleComponents:
    """LMCache's factory. Config: `endpoint` (required), a ZeroMQ address, `ipc://` for a Unix socket."""
    endpoint = build.config.get("endpoint")
    if not isinstance(endpoint, str) or "://" not in endpoint:
        message = f"kvtier.server_module needs config.endpoint, a ZeroMQ address; got {endpoint!r}"
        raise ValueError(message)
    policy = str(build.config.get("eviction_policy", "unknown"))
    return ExtServerModuleComponents(modules=[KVTierModule(build.server_context, endpoint, policy)])
