"""What comes back to the scheduler half: the tier's answers, and the workers' results."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from kvtier.backend import Evicted, StateChanged, TierBackend, TierState
from kvtier.turns.step_times import RankResults

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from kvtier.orders import OrderResult
    from kvtier.policy import Policy
    from kvtier.stats import Stats
    from kvtier.turns.decision_log import DecisionLog
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.happenings import Happenings
    from kvtier.turns.prefetch import Prefetcher
    from kvtier.turns.reading import TierReader
    from kvtier.turns.returns import Returns
    from kvtier.turns.staging import Stager
    from kvtier.turns.turn import Turn

logger = logging.getLogger(__name__)


class Answers:
    """Hands each answer to the one who asked: staging, prefetching or reading."""

    def __init__(
        self,
        facts: EngineFacts,
        tier: TierBackend,
        stager: Stager,
        reader: TierReader,
        prefetcher: Prefetcher,
        returns: Returns,
        policy: Policy,
        stats: Stats,
        turns: Mapping[str, Turn],
        happenings: Happenings,
        log: DecisionLog,
    ) -> None:
        self._log = log
        self._tier = tier
        self._stager = stager
        self._reader = reader
        self._prefetcher = prefetcher
        self._returns = returns
        self._policy = policy
        self._stats = stats
        self._turns = turns
        self._happenings = happenings
        self._rank_results = RankResults(facts.ranks)
        self._merged: deque[OrderResult] = deque()

    def poll(self, now_s: float, wait_s: float = 0.0) -> None:
        """Take what the tier has answered; with `wait_s`, wait a moment for it."""
        for event in self._tier.poll(now_s, wait_s):
            if isinstance(event, StateChanged):
                self._tier_changed(event)
            elif isinstance(event, Evicted):
                self._stager.copies.evicted(event)
            elif not (self._stager.on_event(event, now_s) or self._prefetcher.on_event(event)):
                self._reader.on_event(event)

    def note(self, results: Iterable[OrderResult]) -> None:
        """Remember workers' results; an order counts when all ranks have reported it."""
        self._merged.extend(self._rank_results.complete(results))

    def take_noted(self) -> None:
        """Hand on what was remembered; what fails, and what comes behind it, stays for `rest`."""
        while self._merged:
            self._complete(self._merged[0])
            self._merged.popleft()

    def rest(self) -> Iterator[OrderResult]:
        """What was remembered and not handed on, each once."""
        while self._merged:
            yield self._merged.popleft()

    def _tier_changed(self, event: StateChanged) -> None:
        if event.state is TierState.READY:
            logger.info("CPU tier ready: %s", event.detail)
        else:
            logger.warning("CPU tier away, pinning only: %s", event.detail)
            self._stats.count("failures", 1, "tier_lost")
            self._reader.tier_lost()
        self._prefetcher.tier_lost()
        self._stager.forget_all()
        self._stats.due()

    def _complete(self, result: OrderResult) -> None:
        if result.ok and result.seconds > 0 and result.n_bytes > 0:
            self._policy.observe_copy(result)
            self._stats.sample("copy_seconds", result.seconds, result.direction)
            name = "staged_bytes" if result.direction == "store" else "loaded_bytes"
            self._stats.count(name, result.n_bytes)
        if self._stager.on_result(result) or self._prefetcher.on_result(result):
            return
        done = self._reader.on_result(result)
        if done is None:
            return
        turn = self._turns.get(done.request_id)
        if turn is not None:
            self._returns.count_loaded(turn, ok=done.ok)
            self._happenings.loaded(
                turn.program, turn.request_id, done.n_tokens, result.seconds, ok=done.ok
            )
            if self._log.enabled:
                entry = {
                    "ok": done.ok,
                    "tokens": done.n_tokens,
                    "predicted_s": done.predicted_s,
                    "seconds": result.seconds,
                }
                self._log.write("loaded", turn.program, turn.request_id, entry)
        if not done.ok:
            if turn is not None:
                turn.bypass_tier = True
            if done.spoilt_key:
                self._stager.copies.spoilt(done.spoilt_key)
                if turn is not None:
                    self._stager.forget(turn.program)
        elif done.predicted_s > 0:
            self._stats.sample("reload_prediction_ratio", result.seconds / done.predicted_s)
