"""Reading back: from a lookup in the CPU tier to KV in a returning request's GPU blocks.

A request goes through ask -> answer -> load, or -> release. The answer's chunks are locked in the tier
until the load has ended or `release` is called; asking again after a preemption starts over. A load that
was ordered always ends in a result, also when its request was aborted: vLLM keeps the blocks until then.
The workers are told to give it up, so that this is soon and the link is free for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtier.backend import LookupDone, OperationEvent, OperationFailed, TierBackend, TierState
from kvtier.orders import Order
from kvtier.turns.staging import ORDER_DEADLINE_S
from kvtier.wire import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtier.chunk_keys import ChunkChain
    from kvtier.orders import OrderIds, OrderResult
    from kvtier.stats import Stats


@dataclass(slots=True)
class _Read:
    op_id: int
    keys: bytes
    generation: str = ""
    hit_chunks: int = 0
    slots: list[list[int]] | None = None

    @property
    def answered(self) -> bool:
        return self.slots is not None


@dataclass(frozen=True, slots=True)
class Found:
    """Chunks that are locked in the tier for somebody; see `LookupDone`."""

    op_id: int
    generation: str
    slots: list[list[int]]
    keys: bytes


@dataclass(frozen=True, slots=True)
class LoadDone:
    """A load ended. `n_tokens` were ordered; `predicted_s` is for checking the cost model.

    `spoilt_key`: see `OrderResult`.
    """

    request_id: str
    ok: bool
    n_tokens: int
    predicted_s: float
    spoilt_key: bytes = b""


@dataclass(frozen=True, slots=True)
class _Load:
    op_id: int
    request_id: str
    n_tokens: int
    predicted_s: float


class TierReader:
    """All lookups and loads of an engine. Used from connector hooks only."""

    def __init__(
        self,
        tier: TierBackend,
        stats: Stats,
        *,
        namespace: str,
        block_tokens: int,
        chunk_blocks: int,
        order_ids: OrderIds,
    ) -> None:
        self._tier = tier
        self._stats = stats
        self.namespace = namespace
        self._block_tokens = block_tokens
        self._chunk_blocks = chunk_blocks
        self._order_ids = order_ids
        self._reads: dict[str, _Read] = {}
        self._by_op: dict[int, str] = {}
        self._loads: dict[int, _Load] = {}
        self._ready: list[Order] = []
        self._cancelled: set[int] = set()
        self._cancels: list[int] = []

    @property
    def backlog_tokens(self) -> int:
        """Tokens of loads that have not ended."""
        return sum(load.n_tokens for load in self._loads.values())

    @property
    def n_loads(self) -> int:
        """Loads that have not ended."""
        return len(self._loads)

    @property
    def n_questions(self) -> int:
        """Lookups that the tier has not answered, whether somebody still waits for them or not."""
        return len(self._by_op)

    def loading(self, request_id: str) -> bool:
        """Whether a load for this request has not ended."""
        return any(load.request_id == request_id for load in self._loads.values())

    def asked(self, request_id: str) -> bool:
        """Whether a lookup is open for this request."""
        return request_id in self._reads

    def ask(self, request_id: str, strand: str, chain: ChunkChain) -> None:
        """Start a lookup for a request that has none; `strand` names its conversation in the tier."""
        keys = bytes(chain.keys)
        op_id = self._tier.lookup(self.namespace, strand, keys)
        self._reads[request_id] = _Read(op_id, keys)
        self._by_op[op_id] = request_id

    def hit_chunks(self, request_id: str) -> int | None:
        """Chunks that are locked for this request; None while the answer is out."""
        read = self._reads[request_id]
        return read.hit_chunks if read.answered else None

    def load(
        self,
        request_id: str,
        block_ids: Sequence[int],
        start_token: int,
        n_tokens: int,
        *,
        now_s: float,
        predicted_s: float,
    ) -> None:
        """Order the load of tokens [start_token, start_token + n_tokens) into a request's blocks.

        Args:
            request_id: A request whose lookup was answered with at least that much.
            block_ids: The request's blocks from its first token on.
            start_token: Tokens valid in GPU memory already; a multiple of the block size.
            n_tokens: Ends on a chunk boundary.
            now_s: Monotonic time.
            predicted_s: The cost model's estimate, reported back in `LoadDone`.
        """
        read = self._reads.pop(request_id)
        assert read.slots is not None
        per_chunk = self._chunk_blocks
        chunk_tokens = per_chunk * self._block_tokens
        first = start_token // chunk_tokens
        last = (start_token + n_tokens) // chunk_tokens
        self._tier.trim(read.op_id, first, last)
        order = Order(
            order_id=self._order_ids.take(),
            direction="load",
            request_id=request_id,
            block_ids=tuple(block_ids[first * per_chunk : last * per_chunk]),
            slots=[rank[first:last] for rank in read.slots],
            chunk_blocks=per_chunk,
            skip_blocks=(start_token - first * chunk_tokens) // self._block_tokens,
            generation=read.generation,
            deadline_s=now_s + ORDER_DEADLINE_S,
            keys=read.keys[first * KEY_BYTES : last * KEY_BYTES],
        )
        self._loads[order.order_id] = _Load(read.op_id, request_id, n_tokens, predicted_s)
        self._ready.append(order)

    def release(self, request_id: str) -> None:
        """The request does not read (any more): give its locks back. Harmless without a lookup."""
        read = self._reads.pop(request_id, None)
        if read is not None and read.answered and read.hit_chunks:
            self._tier.trim(read.op_id, 0, 0)

    def request_gone(self, request_id: str) -> None:
        """Nobody waits for this request any more: give its locks back and its load up."""
        self.release(request_id)
        for order_id, load in self._loads.items():
            if load.request_id == request_id and order_id not in self._cancelled:
                self._cancelled.add(order_id)
                self._cancels.append(order_id)

    def take(self, request_id: str, first: int, end: int) -> Found:
        """Hand over the locks of an answered lookup, on chunks [first, end); they end with `unlock`."""
        read = self._reads.pop(request_id)
        assert read.slots is not None
        self._tier.trim(read.op_id, first, end)
        return Found(read.op_id, read.generation, read.slots, read.keys)

    def unlock(self, found: Found) -> None:
        """Give the locks back that `take` handed over."""
        if self._tier.state is TierState.READY:
            self._tier.trim(found.op_id, 0, 0)

    def take_orders(self) -> list[Order]:
        """Loads for the workers. An order is never dropped: its request waits for the result."""
        orders, self._ready = self._ready, []
        return orders

    def take_cancels(self) -> list[int]:
        """Loads that the workers are to give up; after `take_orders`, which may still hold them."""
        cancels, self._cancels = self._cancels, []
        return cancels

    def tier_lost(self) -> None:
        """The tier went away: what was locked is no longer ours, except for loads under way."""
        for read in self._reads.values():
            if read.answered:
                read.hit_chunks, read.slots = 0, []

    def on_event(self, event: OperationEvent) -> bool:
        """Take an event of the tier; False when it is not reading's."""
        request_id = self._by_op.pop(event.op_id, None)
        if request_id is None:
            return False
        read = self._reads.get(request_id)
        if read is None or read.op_id != event.op_id:
            # The request has gone or has asked anew.
            if isinstance(event, LookupDone) and event.hit_chunks:
                self._tier.trim(event.op_id, 0, 0)
            return True
        if isinstance(event, LookupDone):
            read.generation, read.hit_chunks, read.slots = (
                event.generation,
                event.hit_chunks,
                event.slots,
            )
        else:
            read.slots = []
            reason = event.reason if isinstance(event, OperationFailed) else "malformed"
            self._stats.count("failures", 1, f"lookup_{reason}")
        return True

    def on_result(self, result: OrderResult) -> LoadDone | None:
        """A worker has ended a load; None when the order is not reading's."""
        load = self._loads.pop(result.order_id, None)
        if load is None:
            return None
        if self._tier.state is TierState.READY:
            self._tier.trim(load.op_id, 0, 0)
        if not result.ok and result.order_id not in self._cancelled:
            self._stats.count("failures", 1, f"load_{result.cause}")
        self._cancelled.discard(result.order_id)
        spoilt = result.spoilt_key
        return LoadDone(load.request_id, result.ok, load.n_tokens, load.predicted_s, spoilt)
