"""Prefetch: a paused program's KV comes back into GPU memory before the program does.

No request waits for it, so it takes only what nobody needs: blocks that are free beyond a headroom and
beyond what waiting requests ask for, within the pin budget. It goes piece by piece, with no more ordered
ahead than the link moves in a step, so that a request that comes in the middle waits for little. What is
loaded can be hit at once, as if it had been computed, and is pinned (`prefetch_pins`).

A block that a copy may still write to is given back only when the copy has ended, whatever else ends: its
next owner's KV would be overwritten.

When the program returns in the middle, nothing more is ordered, and its request waits for the pieces on
their way, for `RETURN_WAIT_S` at most: to load them itself would take no less. It loads or computes the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvtier.backend import TierBackend, TierState
from kvtier.orders import Order
from kvtier.turns.live_mode import LiveMode, Mode
from kvtier.turns.paused_turns import PausedTurns
from kvtier.turns.prefetch_jobs import Piece, Prefetch
from kvtier.turns.prefetch_pins import PrefetchPins
from kvtier.turns.prefetch_plan import Answer, Planner, Spare
from kvtier.turns.reading import TierReader
from kvtier.turns.returns import LOOKUP_DEADLINE_S
from kvtier.turns.staging import IN_FLIGHT_BYTES, ORDER_DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.backend import OperationEvent
    from kvtier.chunk_keys import ChunkChain
    from kvtier.gpu_pin import PinTable
    from kvtier.orders import OrderIds, OrderResult
    from kvtier.policy import Policy
    from kvtier.stats import Stats
    from kvtier.turns.block_pool import VllmBlockPool
    from kvtier.turns.decision_log import DecisionLog
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.happenings import Happenings
    from kvtier.turns.staged_copies import StagedCopies
    from kvtier.turns.turn import Turn

PIECE_BYTES: Final = 64 << 20
MAX_WINDOW_BYTES: Final = 4 << 30
"""Most that is ordered ahead on one worker's link. It begins with staging's limit, and doubles whenever the
link has run dry between two steps."""

RETURN_WAIT_S: Final = 1.0


class Prefetcher:
    """All prefetches of an engine. Used from connector hooks only.

    Args:
        is_active: Whether a turn of the program is under way.
        waiting_tokens: Of the requests that wait for their first blocks.
        is_short: Whether an allocation has failed that has not succeeded since.
    """

    def __init__(
        self,
        facts: EngineFacts,
        tier: TierBackend,
        pool: VllmBlockPool,
        pins: PinTable,
        copies: StagedCopies,
        policy: Policy,
        stats: Stats,
        log: DecisionLog,
        happenings: Happenings,
        mode: LiveMode,
        *,
        order_ids: OrderIds,
        is_active: Callable[[str], bool],
        waiting_tokens: Callable[[], int],
        is_short: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._facts = facts
        self._tier = tier
        self._pool = pool
        self._pins = pins
        self._copies = copies
        self._stats = stats
        self._log = log
        self._happenings = happenings
        self._mode = mode
        self._order_ids = order_ids
        self._clock = clock
        self.paused = PausedTurns()
        self._pinning = PrefetchPins(facts, pins, copies, policy, happenings)
        self._spare = Spare(facts, pool, pins, is_short, waiting_tokens)
        self._planner = Planner(
            facts,
            tier,
            pool,
            pins,
            copies,
            policy,
            mode,
            self.paused,
            self._pinning,
            self._spare,
            is_active,
        )
        # Of its own: what it asks and loads is no request's.
        self._lookups = TierReader(
            tier,
            stats,
            namespace=copies.namespace,
            block_tokens=facts.block_tokens,
            chunk_blocks=facts.chunk_blocks,
            order_ids=order_ids,
        )
        self._piece_chunks = max(1, PIECE_BYTES // facts.slot_bytes)
        self._window_bytes = IN_FLIGHT_BYTES
        self._is_held_up = False
        self._going: dict[str, Prefetch] = {}
        # Pieces that no worker has reported, by order; `_ready` are those that no worker knows yet.
        self._in_flight: dict[int, Piece] = {}
        self._ready: list[Order] = []
        self._suspended: list[Piece] = []

    # -- questions ---------------------------------------------------------------------------------

    @property
    def n_going(self) -> int:
        """Prefetches that still order."""
        return len(self._going)

    @property
    def n_in_flight(self) -> int:
        """Copy orders that have not ended."""
        return len(self._in_flight)

    def busy(self) -> bool:
        """Whether the engine must keep stepping for a prefetch's sake."""
        # An answer that nobody waits for any more has locked chunks all the same.
        return bool(self._going or self._in_flight or self._lookups.n_questions)

    def delays(self, turn: Turn, now_s: float) -> bool:
        """Whether a request is to be asked again, as KV of its prompt is on its way."""
        for piece in self._in_flight.values():
            prefetch = piece.prefetch
            if prefetch.program != turn.program or prefetch.is_void or prefetch.is_broken:
                continue
            if prefetch.returned_s is None or now_s - prefetch.returned_s >= RETURN_WAIT_S:
                continue
            hashes = turn.request.block_hashes
            if piece.start < len(hashes) and hashes[piece.start] == piece.hashes[0]:
                return True
        return False

    def remember(self, turn: Turn, tool: str | None, n_blocks: int, chain: ChunkChain) -> None:
        """A turn has paused, whose first `n_blocks` blocks a later prompt can hit."""
        request = turn.request
        self.paused.remember(
            turn.program,
            turn.request_id,
            request.block_hashes,
            n_blocks,
            chain,
            prompt_blocks=request.num_prompt_tokens // self._facts.block_tokens,
            tool=tool,
            salt=request.cache_salt,
        )

    # -- the beginning -----------------------------------------------------------------------------

    def start(self, program: str, now_s: float, ttl_s: float | None = None) -> Answer:
        """Begin to load what the tier holds of a program's last paused turn.

        Args:
            program: Its handle, see `EngineFacts.program_handle`.
            now_s: Monotonic time.
            ttl_s: For how long it is to be pinned then; None to go by how long programs stay away.

        Returns:
            What became of it; counted.
        """
        in_flight = self._in_flight.values()
        answer, prefetch = self._planner.plan(program, now_s, ttl_s, self._going, in_flight)
        if prefetch is not None:
            chain = prefetch.turn.chain
            asked = chain.head(prefetch.end_block // self._facts.chunk_blocks)
            self._lookups.ask(program, self._copies.strands.find(program, chain), asked)
            self._going[program] = prefetch
        outcome, reason, detail = answer
        self._stats.count("prefetches", 1, outcome, reason)
        if self._log.enabled:
            turn = self.paused.get(program)
            entry = {"action": outcome, "reason": reason, "detail": detail}
            self._log.write("prefetch", program, turn.request_id if turn else "", entry)
        return answer

    # -- steps -------------------------------------------------------------------------------------

    def advance(self, now_s: float) -> None:
        """Order the next pieces; see `take_orders`."""
        if not self._going:
            self._is_held_up = False
            return
        if self._is_held_up and not self._in_flight:
            self._window_bytes = min(2 * self._window_bytes, MAX_WINDOW_BYTES)
        self._is_held_up = False
        for prefetch in list(self._going.values()):
            reason = self._reason_to_stop(prefetch, now_s)
            if reason:
                self._stop(prefetch, reason)
            elif prefetch.found is not None:
                self._order_pieces(prefetch, now_s)

    def take_orders(self) -> list[Order]:
        """Loads for the workers."""
        orders, self._ready = self._ready, []
        return orders

    def on_event(self, event: OperationEvent) -> bool:
        """Take an event of the tier; False when it is not a prefetch's."""
        return self._lookups.on_event(event)

    def on_result(self, result: OrderResult) -> bool:
        """All workers have ended a piece; False when the order is not a prefetch's."""
        piece = self._in_flight.pop(result.order_id, None)
        if piece is None:
            return False
        piece.copied = result.ok
        prefetch = piece.prefetch
        if not result.ok:
            self._stats.count("failures", 1, "prefetch_copy")
            self._stop(prefetch, "copy_failed")
        self._land(prefetch)
        return True

    def _reason_to_stop(self, prefetch: Prefetch, now_s: float) -> str:
        if self._mode.mode is not Mode.ON:
            prefetch.is_void = True
            return "mode"
        if self._tier.state is not TierState.READY:
            return "no_tier"
        if not self._pinning.lives(prefetch):
            return "pin_ended"
        if prefetch.found is not None:
            return ""
        hit_chunks = self._lookups.hit_chunks(prefetch.program)
        if hit_chunks is None:
            if now_s - prefetch.begun_s < LOOKUP_DEADLINE_S:
                return ""
            self._stats.count("failures", 1, "prefetch_lookup_late")
            return "lookup_late"
        self._found(prefetch, hit_chunks)
        return "" if prefetch.next_block < prefetch.end_block else "no_kv"

    def _found(self, prefetch: Prefetch, hit_chunks: int) -> None:
        per_chunk = self._facts.chunk_blocks
        asked = prefetch.turn.chain.head(prefetch.end_block // per_chunk)
        self._copies.correct(prefetch.program, asked, hit_chunks)
        prefetch.end_block = min(prefetch.end_block, hit_chunks * per_chunk)
        first = min(prefetch.next_block // per_chunk, hit_chunks)
        last = max(first, prefetch.end_block // per_chunk)
        prefetch.found = self._lookups.take(prefetch.program, first, last)

    def _order_pieces(self, prefetch: Prefetch, now_s: float) -> None:
        while prefetch.next_block < prefetch.end_block:
            if sum(piece.n_bytes for piece in self._in_flight.values()) >= self._window_bytes:
                self._is_held_up = True
                return
            reason = self._order_piece(prefetch, now_s)
            if reason:
                self._stop(prefetch, reason)
                return

    def _order_piece(self, prefetch: Prefetch, now_s: float) -> str:
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
        assert prefetch.found is not None
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
                slots=[rank[first:last] for rank in prefetch.found.slots],
                chunk_blocks=per_chunk,
                skip_blocks=skipped,
                generation=prefetch.found.generation,
                deadline_s=now_s + ORDER_DEADLINE_S,
            )
        )
        return ""

    def _land(self, prefetch: Prefetch) -> None:
        """Take in the pieces that have ended, in token order."""
        while prefetch.pieces and prefetch.pieces[0].copied is not None:
            piece = prefetch.pieces.popleft()
            prefetch.is_broken |= not piece.copied
            if not prefetch.is_broken and not prefetch.is_void and self._mode.mode is Mode.ON:
                self._keep(piece)
            self._pins.unhold(piece.hold)
        self._end_if_done(prefetch)

    def _keep(self, piece: Piece) -> None:
        """A piece was loaded: it can be hit, and the pin grows by it."""
        prefetch = piece.prefetch
        hit = self._pool.cache(piece.block_ids, piece.hashes, piece.start)
        prefetch.n_loaded += len(hit)
        now_s = self._clock()
        if prefetch.returned_s is not None and now_s - prefetch.returned_s >= RETURN_WAIT_S:
            # Its program has gone on without it, and nobody would end the pin.
            return
        reason = self._pinning.grow(prefetch, hit, now_s)
        if reason:
            self._stop(prefetch, reason)

    # -- the end -----------------------------------------------------------------------------------

    def returned(self, program: str, now_s: float) -> None:
        """A request of the program has come: it needs nobody who loads for it."""
        for piece in self._in_flight.values():
            prefetch = piece.prefetch
            if prefetch.program == program and prefetch.returned_s is None:
                prefetch.returned_s = now_s
        going = self._going.get(program)
        if going is not None:
            self._stop(going, "returned")

    def forget(self, program: str) -> None:
        """The program is over."""
        self.paused.forget(program)
        for piece in self._in_flight.values():
            piece.prefetch.is_void |= piece.prefetch.program == program
        prefetch = self._going.get(program)
        if prefetch is not None:
            self._stop(prefetch, "ended")

    def tier_lost(self) -> None:
        """The tier came or went: what is locked is no longer ours, but for pieces that are ordered."""
        self._lookups.tier_lost()
        for prefetch in list(self._going.values()):
            self._stop(prefetch, "no_tier")

    def before_reset(self) -> None:
        """The prefix cache is about to be reset: hold nothing, and let nothing be hit that was loaded before."""
        self._void_all("reset")
        self._suspended = list(self._in_flight.values())
        for piece in self._suspended:
            self._pins.unhold(piece.hold)

    def after_reset(self) -> None:
        """Nobody has been given blocks meanwhile: what copies still write to is ours again."""
        for piece in self._suspended:
            self._hold(piece)
        self._suspended = []

    def new_epoch(self, namespace: str) -> None:
        """The weights may have changed: what paused before is not to be read again."""
        self._void_all("reset")
        self._lookups.namespace = namespace
        self.paused.clear()

    def stop_all(self) -> None:
        """Order nothing more, and give back what no worker knows of."""
        self._void_all("shutdown")
        for order in self.take_orders():
            self._drop(order.order_id)

    def drop_all(self) -> None:
        """The engine ends: give back what copies write to, too."""
        self.stop_all()
        for order_id in list(self._in_flight):
            self._drop(order_id)

    def _coming_blocks(self) -> int:
        return sum(len(piece.block_ids) for piece in self._in_flight.values())

    # -- internals ---------------------------------------------------------------------------------

    def _hold(self, piece: Piece, *, owned: bool = False) -> None:
        self._pins.hold(piece.hold, piece.block_ids, written=True, owned=owned)

    def _void_all(self, reason: str) -> None:
        """Let nothing be hit of what is on its way; only what copies still write to is kept."""
        prefetches = {id(p.prefetch): p.prefetch for p in self._in_flight.values()}
        for prefetch in (*prefetches.values(), *self._going.values()):
            prefetch.is_void = True
        for prefetch in prefetches.values():
            landed = [piece for piece in prefetch.pieces if piece.copied is not None]
            for piece in landed:
                prefetch.pieces.remove(piece)
                self._pins.unhold(piece.hold)
        for prefetch in list(self._going.values()):
            self._stop(prefetch, reason)

    def _drop(self, order_id: int) -> None:
        piece = self._in_flight.pop(order_id)
        piece.copied = False
        self._land(piece.prefetch)

    def _stop(self, prefetch: Prefetch, reason: str) -> None:
        """Order nothing more; what is on its way goes on."""
        if self._going.get(prefetch.program) is not prefetch:
            return
        del self._going[prefetch.program]
        prefetch.stopped = reason
        self._lookups.release(prefetch.program)
        self._end_if_done(prefetch)

    def _end_if_done(self, prefetch: Prefetch) -> None:
        if prefetch.is_ended or prefetch.pieces:
            return
        if not prefetch.stopped and prefetch.next_block < prefetch.end_block:
            return
        prefetch.is_ended = True
        if self._going.get(prefetch.program) is prefetch:
            del self._going[prefetch.program]
        if prefetch.found is not None:
            self._lookups.unlock(prefetch.found)
        reason, tokens = prefetch.stopped or "loaded", prefetch.n_loaded * self._facts.block_tokens
        self._stats.count("prefetch_ends", 1, reason)
        self._stats.count("prefetched_tokens", tokens)
        seconds = self._clock() - prefetch.begun_s
        if tokens or prefetch.is_broken:
            self._happenings.loaded(
                prefetch.program, prefetch.key, tokens, seconds, ok=not prefetch.is_broken
            )
        if self._log.enabled:
            entry = {"action": "end", "reason": reason, "tokens": tokens, "seconds": seconds}
            self._log.write("prefetch", prefetch.program, prefetch.key, entry)
