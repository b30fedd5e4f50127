"""The scheduler process: events in, decisions applied.

Composes identity (`programs`), order (`admission`), decisions (`policy`), pins (`gpu_pin`), staging and
reading. Knows neither vLLM nor LMCache: requests are read by attribute, the tier is a `TierBackend`, the
pool a `VllmBlockPool`, time comes from an injected clock. Replay runs this same class.

All methods are called from the scheduler's thread. Failures are caught by `connector`.
"""

from __future__ import annotations

import logging
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

from kvtier.backend import TierState
from kvtier.gpu_pin import ReleaseCause
from kvtier.orders import StepOrders
from kvtier.scheduler_parts import SchedulerParts
from kvtier.shared_blocks import beginning
from kvtier.turns.live_mode import Mode
from kvtier.turns.request_view import is_wake, reusable_blocks, was_aborted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvtier.orders import OrderResult, WorkerReport
    from kvtier.turns.engine_facts import StepFacts

logger = logging.getLogger(__name__)


class SchedulerHalf(SchedulerParts):
    """See the module's docstring."""

    # -- a request's life --------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Step 1: find the request's program, record the gap since its last turn."""
        now_s = self._clock()
        if is_wake(request):
            # No turn: the engine was idle, and there is something to do.
            self.housekeeping.run(now_s, urgent=True)
            self.report(now_s)
            return
        self.housekeeping.run(now_s)
        # A client that uses an id again: what its last bearer has left ends.
        self.endings.unpin(request.request_id, ReleaseCause.SUPERSEDED)
        self.stager.cancel(request.request_id)
        turn, start = self.arrivals.take(request, now_s, self._waiting_tokens.total)
        self.prefetcher.returned(turn.program, now_s)
        self._turns[request.request_id] = turn
        if start.matched_by != "repeat":
            # What was announced for the pauses that end now, and for who had this id before.
            over = (request.request_id, *start.continues)
            ended = (start.gap.ended_request_id,) if start.gap is not None else ()
            self.policy.ttl.announcements.turns_over(turn.program, (*over, *ended))
        self._happenings.turn_started(turn, start)
        self._waiting_tokens.add(request.request_id, request.num_tokens)
        self.admission.on_arrival(
            request.request_id,
            turn.program,
            program_arrival_s=start.arrival_s,
            priority=int(getattr(request, "priority", 0)),
            returning=start.turn_index > 0,
            context_blocks=self.facts.blocks_of(
                max(request.num_tokens, start.expected_context_tokens)
            ),
            now_s=now_s,
            beginning=beginning(request.block_hashes),
        )
        self.returns.mark(turn, "waiting")

    def program_age_s(self, request: Any) -> float | None:
        """See `Arrivals.program_age_s`."""
        return self.arrivals.program_age_s(request, self._clock())

    def match(self, request: Any, local_tokens: int) -> int | None:
        """Step 2: how many prompt tokens beyond `local_tokens` to load; None to be asked again."""
        turn, now_s = self._turns.get(request.request_id), self._clock()
        if turn is None or self.live_mode.mode is not Mode.ON:
            return 0
        need_blocks = self.facts.blocks_of(request.num_tokens - local_tokens)
        if not self.deferrals.decide(request.request_id, need_blocks, now_s):
            self.reader.release(request.request_id)
            return None
        turn.local_tokens = local_tokens
        if self.prefetcher.delays(turn, now_s):
            return None
        readable = self.returns.readable_tokens(turn)
        if readable <= local_tokens or self.tier.state is not TierState.READY:
            self.reader.release(request.request_id)
            return 0
        hit = self.returns.hit_tokens(
            turn, readable, now_s, lambda: self.answers.poll(now_s, self._lookup_wait_s)
        )
        if hit is None:
            return None
        reload_tokens = self.returns.reload_tokens(turn, hit, len(self._waiting_tokens) - 1)
        self.stats.sample("decision_seconds", self._clock() - now_s, "return")
        return max(0, reload_tokens - local_tokens)

    def on_allocated(
        self, request: Any, block_ids: Callable[[], Sequence[int]], external_tokens: int
    ) -> None:
        """Steps 3-4: the request has blocks. Its program's old pin is handed over to it.

        Args:
            request: vLLM's request.
            block_ids: Returns its blocks; called only where they matter, as listing them takes time.
            external_tokens: Prompt tokens to load.
        """
        turn = self._turns.get(request.request_id)
        if turn is None or self.reader.loading(request.request_id):
            return
        now_s = self._clock()
        pinned_tokens = self.returns.hand_over(turn, block_ids)
        if external_tokens > 0:
            self.reader.load(
                request.request_id,
                block_ids(),
                turn.local_tokens,
                external_tokens,
                now_s=now_s,
                predicted_s=turn.predicted_load_s,
            )
        else:
            self.reader.release(request.request_id)
        if not turn.started:
            turn.started = True
            self._waiting_tokens.remove(request.request_id)
            self.policy.observe_wait(turn.predicted_wait_s, now_s - turn.arrived_s)
            self.admission.on_started(request.request_id)
            self.deferrals.started()
        self.returns.mark(turn, "running")
        if not turn.counted:
            turn.counted = True
            self.returns.count_sources(turn, pinned_tokens, external_tokens)
            self._happenings.turn_running(turn, turn.local_tokens, external_tokens, now_s)
        self.room.forget(request.request_id)

    def finished(self, request: Any, block_ids: Sequence[int]) -> dict[str, Any] | None:
        """Step 7: the turn is over, its blocks are still its own. Decide where its KV waits."""
        told = self._finished(request, block_ids)
        if not self._turns:
            # Before the client has its answer: who asks the control server then is told of this turn. Its blocks
            # are free a moment later.
            self.report(self._clock(), settled=False)
        return told

    def _finished(self, request: Any, block_ids: Sequence[int]) -> dict[str, Any] | None:
        self.reader.request_gone(request.request_id)
        self._waiting_tokens.remove(request.request_id)
        self.deferrals.finished(request.request_id)
        self.room.forget(request.request_id)
        self.room.given_back()
        turn = self._turns.pop(request.request_id, None)
        if turn is None:
            return None
        self.returns.mark_paused(turn)
        now_s = self._clock()
        reusable = reusable_blocks(
            request,
            block_ids,
            self.facts.block_tokens,
            self.pool,
            all_hashed=not turn.bypass_tier,
        )
        aborted = was_aborted(request, self._decode)
        if aborted and not turn.started:
            self.endings.turn_aborted(turn, now_s)
            return None
        announced = self.policy.ttl.announcements.of(turn.program, turn.request_id)
        call = self._detector.detect(
            request.output_token_ids,
            hint=turn.hints.tool or (announced.tool if announced is not None else None),
            complete=not aborted,
        )
        self._recorder.write(turn, call.tool, now_s)
        if self.endings.turn_finished(turn, call, len(reusable), now_s, aborted=aborted):
            return None
        if self.live_mode.mode is Mode.OFF or not len(reusable):
            return None
        chain = None
        if turn.tierable and self.tier.state is TierState.READY:
            chain = self.returns.chain_of(turn, len(reusable) * self.facts.block_tokens)
            if not aborted:
                self.prefetcher.paused.turn_paused(
                    turn, call.tool, len(reusable), chain, self.facts.block_tokens
                )
        told = self.pauses.decide(
            turn,
            call,
            reusable,
            chain,
            now_s=now_s,
            aborted=aborted,
            shadow=self.live_mode.mode is Mode.SHADOW,
            load=self._load(),
        )
        self.stats.sample("decision_seconds", self._clock() - now_s, "pause")
        if self.tier.state is not TierState.READY and self.pins.of_program(turn.program):
            # Without a tier a pinned pause takes memory that nobody else should count on. With one,
            # the pin yields and comes back by a cheap reload: new programs need not wait for it.
            self.admission.on_kv_pinned(turn.program)
        return told

    # -- memory ------------------------------------------------------------------------------------

    def make_room(
        self, request: Any, retry: Callable[[], Any], need_blocks: Callable[[], int] = lambda: 0
    ) -> Any:
        """Step 3: an allocation failed; see `Room.make`."""
        now_s = self._clock()
        turn = self._turns.get(request.request_id)
        return self.room.make(
            request,
            retry,
            own_program=turn.program if turn is not None else None,
            regret_s_per_block=lambda pin: self.pauses.regret_s_per_block(pin, now_s),
            now_s=now_s,
            need_blocks=need_blocks,
        )

    def before_reset(self) -> None:
        """The prefix cache is about to be reset (sleep, pause, new weights): hold nothing."""
        self.stager.cancel_all()
        self.prefetcher.before_reset()
        self.endings.note(*self.pins.release_all(ReleaseCause.RESET))

    def after_reset(self) -> None:
        """It was reset, or could not be. See `Prefetcher.after_reset`."""
        self.prefetcher.after_reset()

    def reset_tier(self) -> None:
        """The weights may have changed: KV from before must not be read again. A new epoch.

        Its name is drawn, not counted: two engines' first updates need not bring the same weights.
        """
        # What nobody will read again is not to be kept for the turns that wait.
        for turn in self._turns.values():
            self.returns.mark_paused(turn)
        self.reader.namespace = self.stager.copies.namespace = self.facts.namespace(
            uuid.uuid4().hex
        )
        self.stager.forget_all()
        self.prefetcher.new_epoch(self.reader.namespace)
        for request_id in self._turns:
            self.reader.release(request_id)

    # -- steps -------------------------------------------------------------------------------------

    def build(self, step: StepFacts) -> StepOrders:
        """End of `schedule()`: what the workers do in this step."""
        now_s = self._clock()
        self._running_requests = step.running_requests
        step_id = self._steps.scheduled(step, now_s)
        if step.preempted:
            self.room.given_back()
            self.returns.preempted(
                self._turns[name] for name in step.preempted if name in self._turns
            )
        self.housekeeping.run(now_s)
        stores = self.stager.advance(now_s)
        self.prefetcher.advance(now_s)
        self.deferrals.step_ended(now_s, step.running_requests + self.reader.n_loads)
        idle = not (step.running_requests or self._turns or self.prefetcher.n_in_flight)
        measure = self._measure_due and idle
        self._measure_due &= not measure
        prefetches = self.prefetcher.take_orders()
        # Last: whatever fails before, the orders that requests wait for are still there.
        loads = [*self.reader.take_orders(), *prefetches]
        cancels = self.reader.take_cancels()
        return StepOrders(self.tier.region, loads, stores, step_id, measure, cancels)

    def on_worker(self, report: WorkerReport) -> None:
        """The end of a step: the workers' results, and once what they measured at start."""
        # First: a copy is reported once, and whatever fails below, its blocks must not be kept for ever.
        self.answers.note(report.results)
        if report.calibration is not None:
            self.policy.seed_from(report.calibration)
        ended = self._steps.ended(report.step_id, self._clock())
        if ended is not None:
            self.policy.observe_step(*ended)
        self.answers.take_noted()

    def take_stats(self) -> dict[str, Any]:
        """What was counted; while turns run, once a second: reading the gauges takes time."""
        self.report(self._clock())
        return self.stats.take(self._clock()) if self._turns else self.stats.take()

    def has_work(self) -> bool:
        """Whether the engine must keep stepping although no request needs it."""
        return hasattr(self, "stager") and (
            self.stager.busy()
            or self.prefetcher.busy()
            # An answer that nobody waits for any more has locked chunks all the same.
            or self.reader.n_questions > 0
            # Behind the last turn: a paused engine steps until it has no work, and keeps its turns.
            or (self._measure_due and not self._turns)
            or (self._link is not None and self._link.busy())
        )

    def report(self, now_s: float, *, settled: bool = True) -> None:
        """Tell the control server what has happened; at once where the engine goes idle now. See `EngineLink.report`."""
        if self._link is not None:
            self._link.report(now_s, idle=not self._turns, settled=settled)

    def late_results(self, results: Iterable[OrderResult]) -> bool:
        """After `shutdown`: copies have ended that wrote to blocks of ours; False when none is left."""
        self.answers.note(results)
        self._end_copies()
        return self.prefetcher.n_in_flight > 0

    def shutdown(self, *, engine_goes_on: bool = False) -> bool:
        """Give everything back, but for blocks that copies write to where the engine goes on.

        What fails is logged, and the rest is given back all the same.

        Args:
            engine_goes_on: kvtier ends without its engine.

        Returns:
            Whether there are such blocks: the workers' results go to `late_results` then.
        """
        bound = hasattr(self, "prefetcher")
        if bound:
            _try(self.stager.cancel_all)
            _try(self.prefetcher.stop_all)
            self._end_copies()
            if not engine_goes_on:
                _try(self.prefetcher.drop_all)
            _try(lambda: self.pins.release_all(ReleaseCause.SHUTDOWN))
        _try(self._save_profile)
        if self._link is not None:
            _try(self._link.close)
        _try(self.tier.close)
        _try(self._log.close)
        _try(self._recorder.close)
        return bound and self.prefetcher.n_in_flight > 0

    def _end_copies(self) -> None:
        """Copies of prefetches have ended, and that is all that still matters of what workers report."""
        for result in self.answers.rest():
            _try(partial(self.prefetcher.on_result, result))

    def _save_profile(self) -> None:
        if self._save_prefill is not None and self.policy.profile_path:
            self._save_prefill(self.policy.profile_path, list(self.policy.prefill_samples))


def _try(part: Callable[[], object]) -> None:
    """Do a part of the end, which must not keep the others from being done."""
    try:
        part()
    except Exception:
        logger.exception("kvtier could not end in order")
