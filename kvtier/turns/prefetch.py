"""Prefetch: a paused program's KV comes back into GPU memory before the program does.

No request waits for it, so it takes only what nobody needs: blocks that are free beyond a headroom and
beyond what waiting requests ask for, within the pin budget (`prefetching.plan`). It goes piece by piece
(`prefetching.pieces`). What is loaded can be hit at once, as if it had been computed, and is pinned
(`prefetching.pins`).

When the program returns in the middle, nothing more is ordered, and its request waits for the pieces on
their way, for `RETURN_WAIT_S` at most: to load them itself would take no less. It loads or computes the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvtier.backend import TierBackend, TierState
from kvtier.turns.paused_turns import PausedTurns
from kvtier.turns.prefetching.accounts import PrefetchAccounts
from kvtier.turns.prefetching.lookups import PrefetchLookups
from kvtier.turns.prefetching.pieces import PrefetchPieces
from kvtier.turns.prefetching.pins import PrefetchPins
from kvtier.turns.prefetching.plan import Answer, Planner, Spare, Wish

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.backend import OperationEvent
    from kvtier.gpu_pin import PinTable
    from kvtier.orders import Order, OrderIds, OrderResult
    from kvtier.policy import Policy
    from kvtier.stats import Stats
    from kvtier.turns.block_pool import VllmBlockPool
    from kvtier.turns.decision_log import DecisionLog
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.happenings import Happenings
    from kvtier.turns.live_mode import LiveMode
    from kvtier.turns.pin_charges import PinCharges
    from kvtier.turns.pin_terms import PinTerms
    from kvtier.turns.prefetching.jobs import Piece, Prefetch
    from kvtier.turns.staged_copies import StagedCopies
    from kvtier.turns.turn import Turn

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
        charges: PinCharges,
        terms: PinTerms,
        clock: Callable[[], float],
    ) -> None:
        self._facts = facts
        self._tier = tier
        self._pool = pool
        self._copies = copies
        self._clock = clock
        self._accounts = PrefetchAccounts(facts, stats, log, happenings, clock)
        self.paused = PausedTurns()
        self._pinning = PrefetchPins(facts, pins, copies, policy, happenings, charges, terms)
        spare = Spare(facts, pool, pins, is_short, waiting_tokens)
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
            spare,
            is_active,
        )
        self._lookups = PrefetchLookups(facts, tier, copies, stats, order_ids)
        self._pieces = PrefetchPieces(facts, pool, pins, spare, order_ids)
        self._going: dict[str, Prefetch] = {}

    # -- questions ---------------------------------------------------------------------------------

    @property
    def n_going(self) -> int:
        """Prefetches that still order."""
        return len(self._going)

    @property
    def n_in_flight(self) -> int:
        """Copy orders that have not ended."""
        return len(self._pieces)

    def busy(self) -> bool:
        """Whether the engine must keep stepping for a prefetch's sake."""
        # An answer that nobody waits for any more has locked chunks all the same.
        return bool(self._going or len(self._pieces) or self._lookups.n_open)

    def delays(self, turn: Turn, now_s: float) -> bool:
        """Whether a request is to be asked again, as KV of its prompt is on its way."""
        return any(
            prefetch.returned_s is not None and now_s - prefetch.returned_s < RETURN_WAIT_S
            for prefetch in self._pieces.bringing(turn.program, turn.request.block_hashes)
        )

    # -- the beginning -----------------------------------------------------------------------------

    def start(self, program: str, now_s: float, wish: Wish) -> Answer:
        """Begin to load what the tier holds of a program's last paused turn.

        Args:
            program: Its handle, see `EngineFacts.program_handle`.
            now_s: Monotonic time.
            wish: For how long it is to be pinned then.

        Returns:
            What became of it; counted.
        """
        pieces = self._pieces.in_flight()
        answer, prefetch = self._planner.plan(program, now_s, wish, self._going, pieces)
        if prefetch is not None:
            self._lookups.ask(prefetch)
            self._going[program] = prefetch
        turn = self.paused.get(program)
        self._accounts.asked(program, turn.request_id if turn is not None else "", answer)
        return answer

    # -- steps -------------------------------------------------------------------------------------

    def advance(self, now_s: float) -> None:
        """Order the next pieces; see `take_orders`."""
        self._pieces.begin_step()
        for prefetch in list(self._going.values()):
            reason = self._reason_to_stop(prefetch, now_s)
            if not reason and prefetch.found is not None:
                reason = self._pieces.order(prefetch, prefetch.found, now_s)
            if reason:
                self._stop(prefetch, reason)

    def take_orders(self) -> list[Order]:
        """Loads for the workers."""
        return self._pieces.take_orders()

    def on_event(self, event: OperationEvent) -> bool:
        """Take an event of the tier; False when it is not a prefetch's."""
        return self._lookups.on_event(event)

    def on_result(self, result: OrderResult) -> bool:
        """All workers have ended a piece; False when the order is not a prefetch's."""
        piece = self._pieces.ended(result.order_id, ok=result.ok)
        if piece is None:
            return False
        prefetch = piece.prefetch
        if not result.ok:
            self._accounts.copy_failed(result)
            self._stop(prefetch, "copy_failed")
        self._land(prefetch)
        if result.spoilt_key:
            self._copies.spoilt(result.spoilt_key)
            self._copies.forget(prefetch.program)
        return True

    def _reason_to_stop(self, prefetch: Prefetch, now_s: float) -> str:
        if self._tier.state is not TierState.READY:
            return "no_tier"
        if not self._pinning.lives(prefetch):
            return "pin_ended"
        return "" if prefetch.found is not None else self._lookups.answer(prefetch, now_s)

    def _land(self, prefetch: Prefetch) -> None:
        """Take in the pieces that have ended, in token order."""
        while prefetch.pieces and prefetch.pieces[0].copied is not None:
            piece = prefetch.pieces.popleft()
            prefetch.is_broken |= not piece.copied
            try:
                if not prefetch.is_broken and not prefetch.is_void:
                    self._keep(piece)
            finally:
                self._pieces.give_back(piece)
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
        if piece.start != prefetch.n_ready:
            # A budget had no room for the piece before: pins keep a turn's head, without holes.
            return
        reason = self._pinning.grow(prefetch, hit, now_s)
        if reason:
            self._stop(prefetch, reason)

    # -- the end -----------------------------------------------------------------------------------

    def returned(self, program: str, now_s: float) -> None:
        """A request of the program has come: it needs nobody who loads for it."""
        for piece in self._pieces.of_program(program):
            if piece.prefetch.returned_s is None:
                piece.prefetch.returned_s = now_s
        going = self._going.get(program)
        if going is not None:
            self._stop(going, "returned")

    def forget(self, program: str) -> None:
        """The program is over."""
        self.paused.forget(program)
        self._void(self._all(program), "ended")

    def release(self, program: str) -> int | None:
        """The program's KV is given up: load nothing more of it, and pin nothing of what is on its way.

        Returns:
            Blocks that copies still write to; None where nothing was being loaded.
        """
        stopped = [prefetch for prefetch in self._all(program) if not prefetch.is_void]
        self._void(stopped, "released")
        coming = sum(len(p.block_ids) for p in self._pieces.of_program(program))
        return coming if stopped else None

    def switched_off(self) -> None:
        """Kvtier is not on any more: hold nothing but what copies still write to."""
        self._void(self._all(), "mode")

    def tier_lost(self) -> None:
        """The tier came or went: what is locked is no longer ours, but for pieces that are ordered."""
        self._lookups.tier_lost()
        for prefetch in list(self._going.values()):
            self._stop(prefetch, "no_tier")

    def before_reset(self) -> None:
        """The prefix cache is about to be reset: hold nothing, and let nothing be hit that was loaded before."""
        self._void(self._all(), "reset")
        self._pieces.suspend()

    def after_reset(self) -> None:
        """Nobody has been given blocks meanwhile: what copies still write to is ours again."""
        self._pieces.resume()

    def new_epoch(self, namespace: str) -> None:
        """The weights may have changed: what paused before is not to be read again."""
        self._void(self._all(), "reset")
        self._lookups.new_epoch(namespace)
        self.paused.clear()

    def stop_all(self) -> None:
        """Order nothing more, and give back what no worker knows of."""
        self._void(self._all(), "shutdown")
        for order in self._pieces.take_orders():
            self._drop(order.order_id)

    def drop_all(self) -> None:
        """The engine ends: give back what copies write to, too."""
        self.stop_all()
        for piece in list(self._pieces.in_flight()):
            self._drop(piece.order_id)

    # -- internals ---------------------------------------------------------------------------------

    def _all(self, program: str | None = None) -> list[Prefetch]:
        """Those that have not ended, of one program or of all."""
        prefetches = (
            *(piece.prefetch for piece in self._pieces.in_flight()),
            *self._going.values(),
        )
        # Each once, in an order that does not depend on chance.
        return [p for p in dict.fromkeys(prefetches) if program in (None, p.program)]

    def _void(self, prefetches: list[Prefetch], reason: str) -> None:
        """Let nothing be hit of what is on its way; only what copies still write to is kept."""
        for prefetch in prefetches:
            prefetch.is_void = True
            for piece in [piece for piece in prefetch.pieces if piece.copied is not None]:
                prefetch.pieces.remove(piece)
                self._pieces.give_back(piece)
            self._stop(prefetch, reason)

    def _drop(self, order_id: int) -> None:
        piece = self._pieces.ended(order_id, ok=False)
        if piece is not None:
            self._land(piece.prefetch)

    def _stop(self, prefetch: Prefetch, reason: str) -> None:
        """Order nothing more; what is on its way goes on."""
        if self._going.get(prefetch.program) is not prefetch:
            return
        del self._going[prefetch.program]
        prefetch.stopped = reason
        self._lookups.stopped(prefetch)
        self._end_if_done(prefetch)

    def _end_if_done(self, prefetch: Prefetch) -> None:
        if prefetch.is_ended or prefetch.pieces:
            return
        if not prefetch.stopped and prefetch.next_block < prefetch.end_block:
            return
        prefetch.is_ended = True
        if self._going.get(prefetch.program) is prefetch:
            del self._going[prefetch.program]
        self._lookups.unlock(prefetch)
        self._accounts.ended(prefetch)
