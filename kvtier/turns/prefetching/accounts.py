"""What becomes of prefetches: counted, logged, and told to whoever follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.orders import OrderResult
    from kvtier.stats import Stats
    from kvtier.turns.decision_log import DecisionLog
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.happenings import Happenings
    from kvtier.turns.prefetching.jobs import Prefetch
    from kvtier.turns.prefetching.plan import Answer


class PrefetchAccounts:
    """See the module's docstring."""

    def __init__(
        self,
        facts: EngineFacts,
        stats: Stats,
        log: DecisionLog,
        happenings: Happenings,
        clock: Callable[[], float],
    ) -> None:
        self._facts = facts
        self._stats = stats
        self._log = log
        self._happenings = happenings
        self._clock = clock

    def asked(self, program: str, request_id: str, answer: Answer) -> None:
        """A prefetch was asked for; `request_id` is the paused turn's, empty where none is known."""
        outcome, reason, detail = answer
        self._stats.count("prefetches", 1, outcome, reason)
        if self._log.enabled:
            entry = {"action": outcome, "reason": reason, "detail": detail}
            self._log.write("prefetch", program, request_id, entry)

    def copy_failed(self, result: OrderResult) -> None:
        """A piece could not be copied, or is not what was stored."""
        self._stats.count("failures", 1, f"prefetch_{result.cause}")

    def ended(self, prefetch: Prefetch) -> None:
        """Nothing of it is under way any more."""
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
