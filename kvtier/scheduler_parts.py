"""What a scheduler half is made of, and how its parts are joined.

`SchedulerHalf` says what it does with vLLM's events; here is what it has: identity, order, policy, pins, staging,
reading, prefetch, and the control server's commands. The parts know each other only as they are joined here.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvtier.admission_facts import AdmissionView
from kvtier.backend import TierBackend, TierState
from kvtier.gpu_pin import PinTable
from kvtier.orders import OrderIds
from kvtier.turns.answers import Answers
from kvtier.turns.arrivals import Arrivals
from kvtier.turns.commands import Commands
from kvtier.turns.control import Control, ControlLink
from kvtier.turns.deferrals import Deferrals
from kvtier.turns.endings import Endings
from kvtier.turns.gauges import Gauges
from kvtier.turns.happenings import Happenings
from kvtier.turns.housekeeping import Housekeeping
from kvtier.turns.live_policy import LivePolicy
from kvtier.turns.pause_commands import PauseCommands
from kvtier.turns.pauses import Load, Pauses
from kvtier.turns.pin_charges import PinCharges
from kvtier.turns.pin_terms import PinTerms
from kvtier.turns.prefetch import Prefetcher
from kvtier.turns.prefetching.plan import Wish
from kvtier.turns.reading import TierReader
from kvtier.turns.returns import Returns
from kvtier.turns.room import Room
from kvtier.turns.staging import Stager
from kvtier.turns.step_times import StepTimes
from kvtier.turns.waiting_tokens import WaitingTokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.admission import AdmissionController
    from kvtier.policy import Policy
    from kvtier.programs import ProgramTable
    from kvtier.stats import Stats
    from kvtier.tools.detection import ToolCallDetector
    from kvtier.turns.block_pool import VllmBlockPool
    from kvtier.turns.decision_log import DecisionLog
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.live_mode import LiveMode
    from kvtier.turns.recorder import TurnRecorder
    from kvtier.turns.turn import Turn


class SchedulerParts:
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
        recorder: TurnRecorder,
        mode: LiveMode,
        clock: Callable[[], float],
        decode: Callable[[Sequence[int]], str],
        lookup_wait_s: float = 0.0,
        split_chunks: int = 32,
        save_prefill: Callable[[str, Sequence[tuple[int, int, float]]], None] | None = None,
        link: ControlLink | None = None,
    ) -> None:
        self.facts = facts
        self.tier = tier
        self.programs = programs
        self.admission = admission
        self.policy = policy
        self.stats = stats
        self._log = log
        self._recorder = recorder
        self.live_mode = mode
        self._clock = clock
        self._decode = decode
        self._save_prefill = save_prefill
        self._lookup_wait_s = lookup_wait_s
        self._split_chunks = split_chunks
        self._detector = detector
        self._link = link
        self._happenings = link if isinstance(link, Happenings) else Happenings()
        self._measure_due = False
        self._turns: dict[str, Turn] = {}
        self._order_ids = OrderIds()
        self._steps = StepTimes()
        self._waiting_tokens = WaitingTokens()
        self._running_requests = 0
        self.deferrals = Deferrals(admission, self._admission_view, stats, lambda: self.room)
        self.reader = TierReader(
            tier,
            stats,
            namespace=facts.namespace(),
            block_tokens=facts.block_tokens,
            chunk_blocks=facts.chunk_blocks,
            order_ids=self._order_ids,
        )

    def bind(self, pool: VllmBlockPool) -> None:
        """Receive the block pool; pins and staging exist from here on."""
        self.pool = pool
        budget = int(self.facts.pin_budget_fraction * pool.n_blocks)
        self.pins = PinTable(pool, budget)
        self._charges = PinCharges(self.facts, self.policy.ttl.budgets, self._clock)
        self._terms = PinTerms(self.policy, self._charges)
        self.stager = Stager(
            self.tier,
            self.pins,
            self.stats,
            namespace=self.reader.namespace,
            chunk_blocks=self.facts.chunk_blocks,
            split_chunks=self._split_chunks,
            next_order_id=self._order_ids,
            chunk_bytes=self.facts.slot_bytes,
            confirmed=lambda program, chunks: self._happenings.staged(
                program, chunks * self.facts.chunk_tokens
            ),
        )
        self.endings = Endings(
            self.facts,
            self.tier,
            self.programs,
            self.pins,
            self.admission,
            self.policy,
            self.stats,
            self._log,
            self._happenings,
            self._charges,
        )
        self.arrivals = Arrivals(self.facts, self.programs, self.pins, self.policy, self.stats)
        self.pauses = Pauses(
            self.facts,
            self.tier,
            pool,
            self.pins,
            self.stager,
            self.policy,
            self.stats,
            self._log,
            self.endings.unpin,
            self._happenings,
            self._charges,
            self._clock,
        )
        self.returns = Returns(
            self.facts,
            self.reader,
            self.stager,
            self.pins,
            self.policy,
            self.stats,
            self._log,
            self.endings.note,
        )
        self.room = Room(pool, self.pins, self.stager, self.endings.note)
        self.prefetcher = Prefetcher(
            self.facts,
            self.tier,
            pool,
            self.pins,
            self.stager.copies,
            self.policy,
            self.stats,
            self._log,
            self._happenings,
            self.live_mode,
            order_ids=self._order_ids,
            is_active=lambda program: any(t.program == program for t in self._turns.values()),
            waiting_tokens=lambda: self._waiting_tokens.total,
            is_short=lambda: self.room.is_short,
            charges=self._charges,
            terms=self._terms,
            clock=self._clock,
        )
        self.endings.bind(self.stager, self.returns, self.prefetcher)
        self.stats.read_gauges = Gauges(
            self.facts,
            self.tier,
            self.programs,
            self.pins,
            self.stager,
            self.policy,
            self.live_mode,
            self.stats,
            lambda: self._waiting_tokens.total,
        ).set
        self.answers = Answers(
            self.facts,
            self.tier,
            self.stager,
            self.reader,
            self.prefetcher,
            self.returns,
            self.policy,
            self.stats,
            self._turns,
            self._happenings,
            self._log,
        )
        self.housekeeping = Housekeeping(
            self.answers,
            self.live_mode,
            self.stats,
            self.pins,
            self.stager,
            self.prefetcher,
            self.programs,
            self.endings,
            self._control() if self._link is not None else None,
        )

    def _control(self) -> Control:
        assert self._link is not None
        live_policy = LivePolicy(
            self.live_mode,
            self.policy,
            self.admission,
            self.pins,
            self.endings,
            total_blocks=self.pool.n_blocks,
            regret=lambda pin: self.pauses.regret_s_per_block(pin, self._clock()),
        )
        self.live_policy = live_policy
        paused = PauseCommands(
            self.facts,
            self.tier,
            self.pins,
            self.stager,
            self.prefetcher,
            self.policy,
            self.endings,
            self._happenings,
            self.live_mode,
            self._charges,
            self._terms,
        )
        commands = Commands(
            self.facts,
            self.programs,
            self.pins,
            self.policy,
            self.stats,
            self.endings,
            self.pauses,
            live_policy,
            self._happenings,
            paused,
            calibrate=self._measure_when_idle,
            read_load=self._load,
        )
        return Control(self._link, commands, live_policy, time.time)

    @property
    def waiting(self) -> tuple[int, int]:
        """Requests that wait for their blocks, and their tokens."""
        return len(self._waiting_tokens), self._waiting_tokens.total

    @property
    def running_requests(self) -> int:
        """Requests in the last step that have not ended: there may be no other step for long."""
        return min(self._running_requests, len(self._turns))

    def _load(self) -> Load:
        return Load(*self.waiting, self._running_requests, self.reader.backlog_tokens)

    def prefetch(
        self, program: str, now_s: float, ttl_s: float | None = None
    ) -> tuple[str, str, str]:
        """A paused program is about to come back: load its KV. See `Prefetcher.start`."""
        # An idle engine ends no pin in time, and what is over must not be lengthened.
        self.endings.note(*self.pins.expire(now_s))
        return self.prefetcher.start(program, now_s, Wish(ttl_s))

    def _measure_when_idle(self) -> None:
        self._measure_due = True

    def _admission_view(self, now_s: float) -> AdmissionView:
        region = self.tier.region if self.tier.state is TierState.READY else None
        tier_bytes = region.size_bytes if region is not None else 0
        running = self._running_requests + self.reader.n_loads
        return AdmissionView(
            now_s=now_s,
            free_blocks=self.pool.n_free,
            total_blocks=self.pool.n_blocks,
            running_requests=running,
            pinned_blocks=self.pins.pinned_blocks,
            tier_blocks=tier_bytes // (self.facts.block_bytes * self.facts.ranks),
            round_s=self.policy.round_s(*self.admission.busy),
            open_places=self.facts.batch_requests - running,
            step_blocks=(self.facts.step_tokens - running) // self.facts.block_tokens,
        )
