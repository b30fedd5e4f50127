"""The copies of prefetches: blocks are taken, written piece by piece, and held until their copy has ended.

No more is ordered ahead than the link moves in a step, so that a request that comes in the middle waits for
little. A block that a copy may still write to is given back only when the copy has ended, whatever else ends:
its next owner's KV would be overwritten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvtier.orders import Order
from kvtier.turns.prefetching.jobs import Piece
from kvtier.turns.staging import IN_FLIGHT_BYTES, ORDER_DEADLINE_S
from kvtier.wire import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from kvtier.gpu_pin import PinTable
    from kvtier.orders import OrderIds
    from kvtier.turns.block_pool import VllmBlockPool
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.prefetching.jobs import Prefetch
    from kvtier.turns.prefetching.plan import Spare
    from kvtier.turns.reading import Found

PIECE_BYTES: Final = 64 << 20
MAX_WINDOW_BYTES: Final = 4 << 30
"""Most that is ordered ahead on one worker's link. It begins with staging's limit, and doubles whenever the
link has run dry between two steps."""


class PrefetchPieces:
    """All pieces that copies write, or will write, of all prefetches."""

    def __init__(
        self,
        facts: EngineFacts,
        pool: VllmBlockPool,
        pins: PinTable,
        spare: Spare,
        order_ids: OrderIds,
    ) -> None:
        self._facts = facts
        self._pool = pool
        self._pins = pins
        self._spare = spare
        self._order_ids = order_ids
        self._piece_chunks = max(1, PIECE_BYTES // facts.slot_bytes)
        self._window_bytes = IN_FLIGHT_BYTES
        self._is_held_up = False
        # Pieces that no worker has reported, by order; `_ready` are those that no worker knows yet.
        self._in_flight: dict[int, Piece] = {}
        self._ready: list[Order] = []
        self._suspended: list[Piece] = []

    def __len__(self) -> int:
        """Return how many copies have not ended."""
        return len(self._in_flight)

    def in_flight(self) -> Collection[Piece]:
        """The pieces whose copies have not ended."""
        return self._in_flight.values()

    def of_program(self, program: str) -> Iterator[Piece]:
        """Those of a program."""
        return (piece for piece in self._in_flight.values() if piece.prefetch.program == program)

    def bringing(self, program: str, hashes: Sequence[bytes]) -> Iterator[Prefetch]:
        """The prefetches that bring a piece of a prompt with these hashes, to be hit."""
        for piece in self.of_program(program):
            prefetch = piece.prefetch
            if prefetch.is_void or prefetch.is_broken:
                continue
            if piece.start < len(hashes) and hashes[piece.start] == piece.hashes[0]:
                yield prefetch

    # -- orders ------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Before `order`: if the link has run dry since the last step, more may be ordered ahead."""
        if self._is_held_up and not self._in_flight:
            self._window_bytes = min(2 * self._window_bytes, MAX_WINDOW_BYTES)
        self._is_held_up = False

    def order(self, prefetch: Prefetch, found: Found, now_s: float) -> str:
        """Order as many pieces as may be under way; why no more can be ordered at all, or an empty string.

        Args:
            prefetch: Whose pieces.
            found: Where the tier has its chunks.
            now_s: Monotonic time.
        """
        while prefetch.next_block < prefetch.end_block:
            if sum(piece.n_bytes for piece in self._in_flight.values()) >= self._window_bytes:
                self._is_held_up = True
                return ""
            reason = self._order_piece(prefetch, found, now_s)
            if reason:
                return reason
        return ""

    def take_orders(self) -> list[Order]:
        """Loads for the workers."""
        orders, self._ready = self._ready, []
        return orders

    def _order_piece(self, prefetch: Prefetch, found: Found, now_s: float) -> str:
        """Order the next piece; or why not."""
        per_chunk, start = self._facts.chunk_blocks, prefetch.next_block
        first = start // per_chunk
        last = min(first + self._piece_chunks, prefetch.end_block // per_chunk)
        n_blocks = last * per_chunk - start
        if n_blocks > self._spare.memory_blocks():
            return "memory"
        if n_blocks > self._spare.budget_blocks(self._coming_blocks()):
            return "budget"
        blocks = self._pool.allocate(n_blocks)
        if blocks is None:
            return "memory"
        hashes = list(prefetch.turn.hashes_from(start, start + n_blocks))
        n_bytes = (last - first) * self._facts.slot_bytes
        piece = Piece(prefetch, self._order_ids.take(), start, blocks, hashes, n_bytes)
        self._hold(piece, owned=True)
        skipped = start - first * per_chunk
        prefetch.pieces.append(piece)
        prefetch.next_block = start + n_blocks
        self._in_flight[piece.order_id] = piece
        self._ready.append(
            Order(
                order_id=piece.order_id,
                direction="load",
                request_id="",
                # What is skipped is not written, so vLLM's null block will do for it.
                block_ids=(*[0] * skipped, *blocks.tolist()),
                slots=[rank[first:last] for rank in found.slots],
                chunk_blocks=per_chunk,
                skip_blocks=skipped,
                generation=found.generation,
                deadline_s=now_s + ORDER_DEADLINE_S,
                keys=found.keys[first * KEY_BYTES : last * KEY_BYTES],
            )
        )
        return ""

    def _coming_blocks(self) -> int:
        return sum(len(piece.block_ids) for piece in self._in_flight.values())

    # -- ends --------------------------------------------------------------------------------------

    def ended(self, order_id: int, *, ok: bool) -> Piece | None:
        """A copy has ended; its blocks stay held until `give_back`. None: it is no prefetch's."""
        piece = self._in_flight.pop(order_id, None)
        if piece is not None:
            piece.copied = ok
        return piece

    def give_back(self, piece: Piece) -> None:
        """Nobody writes to the blocks any more."""
        self._pins.unhold(piece.hold)

    # -- a reset of vLLM's prefix cache ------------------------------------------------------------

    def suspend(self) -> None:
        """Hold nothing, for as long as nobody can be given blocks."""
        self._suspended = list(self._in_flight.values())
        for piece in self._suspended:
            self.give_back(piece)

    def resume(self) -> None:
        """What copies still write to is ours again."""
        for piece in self._suspended:
            self._hold(piece)
        self._suspended = []

    # -- internals ---------------------------------------------------------------------------------

    def _hold(self, piece: Piece, *, owned: bool = False) -> None:
        self._pins.hold(piece.hold, piece.block_ids, written=True, owned=owned)
