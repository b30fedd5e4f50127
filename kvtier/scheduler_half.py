"""The scheduler process: events in, decisions applied.

Composes identity (`programs`), order (`admission`), decisions (`policy`), pins (`gpu_pin`), staging and
reading. Knows neither vLLM nor LMCache: requests are read by attribute, the tier is a `TierBackend`, the
pool a `VllmBlockPool`, time comes from an injected clock. Replay runs this same class.

All methods are called from the scheduler's thread. A failure inside kvtier must not reach the scheduler:
`connector` catches, counts and turns kvtier off for that request.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

from kvtier.admission import AdmissionView
from kvtier.backend import StateChanged, TierBackend, TierState
from kvtier.chunk_keys import chain_seed
from kvtier.gpu_pin import PinTable, ReleaseCause
from kvtier.live_mode import LiveMode, Mode
from kvtier.orders import Calibration, OrderResult, StepOrders
from kvtier.pauses import Pauses
from kvtier.programs import ObservedGap, ProgramGone, TurnRequest, TurnResult
from kvtier.reading import TierReader
from kvtier.request_params import parse_transfer_params
from kvtier.request_view import adapter_name, is_tierable, reusable_blocks, was_aborted
from kvtier.returns import Returns
from kvtier.room import Room
from kvtier.staging import OrderIds, Stager
from kvtier.step_times import RankResults, StepTimes
from kvtier.turn import PinnedTurn, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvtier.admission import AdmissionController
    from kvtier.block_pool import VllmBlockPool
    from kvtier.decision_log import DecisionLog
    from kvtier.engine_facts import EngineFacts, StepFacts
    from kvtier.gpu_pin import Pin, Released
    from kvtier.policy import Policy
    from kvtier.programs import ProgramTable
    from kvtier.stats import Stats
    from kvtier.tool_detection import ToolCallDetector

logger = logging.getLogger(__name__)


MAX_COMPLAINTS = 64
"""Different malformed hints that are logged; all are counted."""


class WorkerReport(Protocol):
    """What workers send back after a step."""

    results: list[OrderResult]
    calibration: Calibration | None


class SchedulerHalf:
    """See the module's docstring."""

    def __init__(
        self,
        facts: EngineFacts,
        *,
        tier: TierBackend,
        programs: ProgramTable,
        admission: AdmissionController[str],
        policy: Policy,
        detector: ToolCallDetector,
        stats: Stats,
        log: DecisionLog,
        mode: LiveMode,
        clock: Callable[[], float],
        decode: Callable[[Sequence[int]], str],
        lookup_wait_s: float = 0.0,
        split_chunks: int = 32,
        save_prefill: Callable[[str, Sequence[tuple[int, int, float]]], None] | None = None,
    ) -> None:
        self.facts = facts
        self.tier = tier
        self.programs = programs
        self.admission = admission
        self.policy = policy
        self.stats = stats
        self._log = log
        self._mode = mode
        self._clock = clock
        self._decode = decode
        self._save_prefill = save_prefill
        self._lookup_wait_s = lookup_wait_s
        self._split_chunks = split_chunks
        self._detector = detector
        self._turns: dict[str, Turn] = {}
        self._order_ids = OrderIds()
        self._steps = StepTimes()
        self._rank_results = RankResults(facts.ranks)
        self._waiting_tokens: dict[str, int] = {}
        self._epoch = 0
        self._running_requests = 0
        self._was_off = False
        self._complaints: set[tuple[str, str]] = set()
        self.reader = TierReader(
            tier,
            stats,
            namespace=facts.namespace(self._epoch),
            block_tokens=facts.block_tokens,
            chunk_blocks=facts.chunk_blocks,
            order_ids=self._order_ids,
        )

    def bind(self, pool: VllmBlockPool) -> None:
        """Receive the block pool; pins and staging exist from here on."""
        self.pool = pool
        budget = int(self.facts.pin_budget_fraction * pool.n_blocks)
        self.pins = PinTable(pool, budget)
        self.stager = Stager(
            self.tier,
            self.pins,
            self.stats,
            namespace=self.facts.namespace(self._epoch),
            chunk_blocks=self.facts.chunk_blocks,
            split_chunks=self._split_chunks,
            next_order_id=self._order_ids,
        )
        self.pauses = Pauses(
            self.facts,
            self.tier,
            pool,
            self.pins,
            self.stager,
            self.policy,
            self.stats,
            self._log,
            lambda key, cause: self._note_all(self.pins.unpin(key, cause)),
            self._regret_s_per_block,
        )
        self.returns = Returns(
            self.facts,
            self.reader,
            self.stager,
            self.pins,
            self.policy,
            self.stats,
            self._log,
            self._note_all,
        )
        self.room = Room(pool, self.pins, self.stager, self._note_all)

    # -- a request's life --------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Step 1: find the request's program, record the gap since its last turn."""
        now_s = self._clock()
        self._housekeep(now_s)
        hints, errors = parse_transfer_params(request.kv_transfer_params)
        for error in errors:
            self.stats.count("failures", 1, f"hint_{error.reason}")
            # Logged once each; a client that invents fields fills neither the log nor the memory.
            complaint = (error.field, error.reason)
            if complaint not in self._complaints and len(self._complaints) < MAX_COMPLAINTS:
                self._complaints.add(complaint)
                logger.warning("kv_transfer_params.kvtier.%s ignored: %s", *complaint)
        start = self.programs.turn_started(
            TurnRequest(
                request_id=request.request_id,
                session_id=getattr(request, "session_id", None),
                program_hint=hints.program,
                tenant=request.cache_salt,
                block_hashes=request.block_hashes,
                ends_program=hints.end,
            ),
            now_s,
        )
        program = self.facts.program_handle(start.program)
        if start.gap is not None:
            self._observe_gap(start.gap, program)
        self._turns[request.request_id] = Turn(
            request=request,
            program=program,
            hints=hints,
            seed=chain_seed(adapter=adapter_name(request), tenant=request.cache_salt),
            tierable=is_tierable(request),
            arrived_s=now_s,
            predicted_wait_s=self.policy.queue_delay_s(sum(self._waiting_tokens.values())),
        )
        self._waiting_tokens[request.request_id] = request.num_tokens
        self.admission.on_arrival(
            request.request_id,
            program,
            program_arrival_s=start.arrival_s,
            returning=start.turn_index > 0,
            context_blocks=self.facts.blocks_of(
                max(request.num_tokens, start.expected_context_tokens)
            ),
            now_s=now_s,
        )

    def match(self, request: Any, local_tokens: int) -> int | None:
        """Step 2: how many prompt tokens beyond `local_tokens` to load; None to be asked again."""
        turn = self._turns.get(request.request_id)
        if turn is None or self._mode.mode is not Mode.ON:
            return 0
        now_s = self._clock()
        need_blocks = self.facts.blocks_of(request.num_tokens - local_tokens)
        verdict = self.admission.decide(request.request_id, need_blocks, now_s)
        if not verdict.admit:
            self.stats.count("deferrals", 1, str(verdict.reason))
            return None
        turn.local_tokens = local_tokens
        readable = self.returns.readable_tokens(turn)
        if (
            not turn.tierable
            or turn.bypass_tier
            or readable <= local_tokens
            or request.skip_reading_prefix_cache
            or self.tier.state is not TierState.READY
        ):
            self.reader.release(request.request_id)
            return 0
        hit = self.returns.hit_tokens(
            turn, readable, lambda: self._poll(now_s, self._lookup_wait_s)
        )
        if hit is None:
            return None
        reload_tokens = self.returns.reload_tokens(turn, hit)
        self.stats.sample("decision_seconds", self._clock() - now_s, "return")
        return max(0, reload_tokens - local_tokens)

    def on_allocated(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """Steps 3-4: the request has blocks. Its program's old pin is handed over to it."""
        turn = self._turns.get(request.request_id)
        if turn is None:
            return
        now_s = self._clock()
        if self.reader.loading(request.request_id):
            return
        pinned_tokens = self.returns.hand_over(turn, block_ids)
        if external_tokens > 0:
            self.reader.load(
                request.request_id,
                block_ids,
                turn.local_tokens,
                external_tokens,
                now_s=now_s,
                predicted_s=turn.predicted_load_s,
            )
        else:
            self.reader.release(request.request_id)
        if not turn.started:
            turn.started = True
            self._waiting_tokens.pop(request.request_id, None)
            self.policy.observe_wait(turn.predicted_wait_s, now_s - turn.arrived_s)
            self.admission.on_started(request.request_id)
        if not turn.counted:
            turn.counted = True
            self.returns.count_sources(turn, pinned_tokens, external_tokens)
        self.room.forget(request.request_id)

    def finished(self, request: Any, block_ids: Sequence[int]) -> dict[str, Any] | None:
        """Step 7: the turn is over, its blocks are still its own. Decide where its KV waits."""
        self.reader.release(request.request_id)
        self._waiting_tokens.pop(request.request_id, None)
        self.room.forget(request.request_id)
        turn = self._turns.pop(request.request_id, None)
        if turn is None:
            return None
        now_s = self._clock()
        reusable = reusable_blocks(request, block_ids, self.facts.block_tokens, self.pool)
        aborted = was_aborted(request, self._decode)
        if aborted and not turn.started:
            gone = self.programs.turn_aborted(request.request_id, now_s)
            self.admission.on_finished(request.request_id)
            if gone is not None:
                self._program_gone(gone)
            return None
        call = self._detector.detect(
            request.output_token_ids, hint=turn.hints.tool, complete=not aborted
        )
        end = self.programs.turn_finished(
            TurnResult(
                request_id=request.request_id,
                tool=call.tool,
                is_tool_call=call.kind == "tool",
                context_tokens=request.num_tokens,
                service_tokens=request.num_tokens - turn.local_tokens,
                block_hashes=request.block_hashes,
                reusable_blocks=min(len(reusable), len(request.block_hashes)),
            ),
            now_s,
        )
        self.admission.on_finished(request.request_id)
        if end is not None:
            for key in end.superseded:
                self._note_all(self.pins.unpin(key, ReleaseCause.SUPERSEDED))
            for gap in end.gaps:
                self.policy.observe_censored(gap.tool, gap.waited_s)
            if end.ended:
                self._end_program(turn.program)
                return None
        if self._mode.mode is Mode.OFF or not reusable:
            return None
        chain = None
        if turn.tierable and self.tier.state is TierState.READY:
            chain = self.returns.chain_of(turn, len(reusable) * self.facts.block_tokens)
        told = self.pauses.decide(
            turn,
            call,
            reusable,
            chain,
            now_s=now_s,
            aborted=aborted,
            shadow=self._mode.mode is Mode.SHADOW,
            waiting=(len(self._waiting_tokens), sum(self._waiting_tokens.values())),
            running_requests=self._running_requests,
            load_backlog_tokens=self.reader.backlog_tokens,
        )
        self.stats.sample("decision_seconds", self._clock() - now_s, "pause")
        if self.tier.state is not TierState.READY and self.pins.of_program(turn.program):
            # Without a tier a pinned pause takes memory that nobody else should count on. With one,
            # the pin yields and comes back by a cheap reload: new programs need not wait for it.
            self.admission.on_kv_pinned(turn.program)
        return told

    # -- memory ------------------------------------------------------------------------------------

    def make_room(self, request: Any, retry: Callable[[], Any]) -> Any:
        """Step 3: an allocation failed; see `Room.make`."""
        now_s = self._clock()
        turn = self._turns.get(request.request_id)
        return self.room.make(
            request,
            retry,
            own_program=turn.program if turn is not None else None,
            regret_s_per_block=lambda pin: self._regret_s_per_block(pin, now_s),
        )

    def before_reset(self) -> None:
        """The prefix cache is about to be reset (sleep, pause, new weights): hold nothing."""
        self.stager.cancel_all()
        self._note_all(*self.pins.release_all(ReleaseCause.RESET))

    def reset_tier(self) -> None:
        """The weights may have changed: KV from before must not be read again. A new epoch."""
        self._epoch += 1
        namespace = self.facts.namespace(self._epoch)
        self.reader.namespace = self.stager.namespace = namespace
        self.stager.forget_all()
        for request_id in self._turns:
            self.reader.release(request_id)

    # -- steps -------------------------------------------------------------------------------------

    def build(self, step: StepFacts) -> StepOrders:
        """End of `schedule()`: what the workers do in this step."""
        now_s = self._clock()
        self._running_requests = step.running_requests
        self._steps.scheduled(step, now_s)
        self._housekeep(now_s)
        orders = StepOrders(region=self.tier.region)
        orders.loads = self.reader.take_orders()
        orders.stores = self.stager.advance(now_s)
        self.admission.begin_step(
            AdmissionView(
                now_s=now_s,
                free_blocks=self.pool.n_free,
                total_blocks=self.pool.n_blocks,
                running_requests=step.running_requests + self.reader.n_loads,
                pinned_blocks=self.pins.pinned_blocks,
            )
        )
        self._set_gauges()
        return orders

    def on_results(self, results: Iterable[OrderResult]) -> None:
        """Workers' results; an order counts when all ranks have reported it."""
        now_s = self._clock()
        ended = self._steps.ended(now_s)
        if ended is not None:
            self.policy.observe_step(*ended)
        for result in self._rank_results.complete(results):
            self._complete(result)

    def on_worker(self, meta: WorkerReport) -> None:
        """A step's report of the workers: results, and once what they measured at start."""
        if meta.calibration is not None:
            self.policy.seed_from(meta.calibration)
        self.on_results(meta.results)

    def has_work(self) -> bool:
        """Whether the engine must keep stepping although no request needs it."""
        return hasattr(self, "stager") and self.stager.busy()

    def shutdown(self) -> None:
        """Give everything back."""
        if hasattr(self, "pins"):
            self.stager.cancel_all()
            self.pins.release_all(ReleaseCause.SHUTDOWN)
        if self._save_prefill is not None and self.policy.profile_path:
            self._save_prefill(self.policy.profile_path, list(self.policy.prefill_samples))
        self.tier.close()
        self._log.close()

    # -- internals ---------------------------------------------------------------------------------

    def _housekeep(self, now_s: float) -> None:
        self._poll(now_s)
        mode = self._mode.refresh(now_s)
        if mode is Mode.OFF and not self._was_off:
            self.stager.cancel_all()
            self._note_all(*self.pins.release_all(ReleaseCause.OFF))
        self._was_off = mode is Mode.OFF
        self._note_all(*self.pins.expire(now_s))
        for gone in self.programs.forget(now_s):
            self._program_gone(gone)

    def _regret_s_per_block(self, pin: Pin, now_s: float) -> float:
        data = pin.data
        confirmed = self.stager.confirmed_chunks(pin.program) * self.facts.chunk_tokens
        staged = isinstance(data, PinnedTurn) and 0 < data.staged_tokens <= confirmed
        return self.policy.regret_s_per_block(pin, now_s, staged=staged)

    def _poll(self, now_s: float, wait_s: float = 0.0) -> None:
        for event in self.tier.poll(now_s, wait_s):
            if isinstance(event, StateChanged):
                self._tier_changed(event)
            elif not self.stager.on_event(event, now_s):
                self.reader.on_event(event)

    def _tier_changed(self, event: StateChanged) -> None:
        if event.state is TierState.READY:
            logger.info("CPU tier ready: %s", event.detail)
        else:
            logger.warning("CPU tier away, pinning only: %s", event.detail)
            self.stats.count("failures", 1, "tier_lost")
            self.reader.tier_lost()
        self.stager.forget_all()

    def _observe_gap(self, gap: ObservedGap, program: str) -> None:
        self.stats.sample("gap_seconds", gap.gap_s)
        self.policy.observe_gap(gap.tool, gap.gap_s)
        for pin in self.pins.of_program(program):
            data = pin.data
            if pin.key != gap.ended_request_id or not isinstance(data, PinnedTurn):
                continue
            if data.predicted_gap_s > 0:
                self.stats.sample("gap_prediction_ratio", gap.gap_s / data.predicted_gap_s)

    def _complete(self, result: OrderResult) -> None:
        if result.ok and result.seconds > 0 and result.n_bytes > 0:
            self.policy.observe_copy(result)
            self.stats.sample("copy_seconds", result.seconds, result.direction)
            name = "staged_bytes" if result.direction == "store" else "loaded_bytes"
            self.stats.count(name, result.n_bytes)
        if self.stager.on_result(result):
            return
        done = self.reader.on_result(result)
        if done is None:
            return
        turn = self._turns.get(done.request_id)
        if turn is not None:
            self.returns.count_loaded(turn, ok=done.ok)
        if not done.ok:
            if turn is not None:
                turn.bypass_tier = True
        elif done.predicted_s > 0:
            self.stats.sample("reload_prediction_ratio", result.seconds / done.predicted_s)

    def _end_program(self, program: str) -> None:
        self._note_all(*self.pins.unpin_program(program, ReleaseCause.ENDED))
        if self.tier.state is TierState.READY:
            self.tier.drop(self.stager.namespace, program)
        self._forget_program(program)

    def _program_gone(self, gone: ProgramGone) -> None:
        for gap in gone.gaps:
            self.policy.observe_censored(gap.tool, gap.waited_s)
        self._forget_program(self.facts.program_handle(gone.program))

    def _forget_program(self, program: str) -> None:
        self.admission.on_program_ended(program)
        self._note_all(*self.pins.unpin_program(program, ReleaseCause.ENDED))
        self.returns.forget(program)
        self.stager.forget(program)

    def _note_all(self, *released: Released | None) -> None:
        for item in released:
            if item is not None:
                self.stats.count("pin_releases", 1, item.cause)
                entry = {"cause": str(item.cause), "blocks": len(item.pin.block_ids)}
                self._log.write("release", item.pin.program, item.pin.key, entry)
                if not self.pins.of_program(item.pin.program):
                    self.admission.on_kv_released(item.pin.program)

    def _set_gauges(self) -> None:
        stats = self.stats
        stats.gauge("programs", len(self.programs))
        stats.gauge("pinned_blocks", self.pins.pinned_blocks)
        stats.gauge("pinned_bytes", self.pins.pinned_blocks * self.facts.block_bytes)
        stats.gauge("held_blocks", self.pins.held_blocks)
        stats.gauge("staging_jobs", self.stager.n_jobs)
        waiting_tokens = sum(self._waiting_tokens.values())
        stats.gauge("queue_delay_seconds", self.policy.queue_delay_s(waiting_tokens))
        stats.gauge("tier_ready", float(self.tier.state is TierState.READY))
        stats.gauge("mode", float(self._mode.mode.level))
