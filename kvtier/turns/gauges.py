"""The scheduler half's state, as gauges for `/metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.backend import TierBackend, TierState

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.gpu_pin import PinTable
    from kvtier.policy import Policy
    from kvtier.programs import ProgramTable
    from kvtier.stats import Stats
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.live_mode import LiveMode
    from kvtier.turns.staging import Stager


class Gauges:
    """Reads the parts of a scheduler half when somebody wants the figures.

    `waiting_tokens` returns the tokens of requests that wait for their blocks.
    """

    def __init__(
        self,
        facts: EngineFacts,
        tier: TierBackend,
        programs: ProgramTable,
        pins: PinTable,
        stager: Stager,
        policy: Policy,
        mode: LiveMode,
        stats: Stats,
        waiting_tokens: Callable[[], int],
    ) -> None:
        self._facts = facts
        self._tier = tier
        self._programs = programs
        self._pins = pins
        self._stager = stager
        self._policy = policy
        self._mode = mode
        self._stats = stats
        self._waiting_tokens = waiting_tokens

    def set(self) -> None:
        """Set all gauges."""
        gauge = self._stats.gauge
        gauge("programs", len(self._programs))
        gauge("pinned_blocks", self._pins.pinned_blocks)
        gauge(
            "pinned_bytes", self._pins.pinned_blocks * self._facts.block_bytes * self._facts.ranks
        )
        gauge("held_blocks", self._pins.held_blocks)
        gauge("staging_jobs", self._stager.n_jobs)
        gauge("queue_delay_seconds", self._policy.queue_delay_s(self._waiting_tokens()))
        gauge("tier_ready", float(self._tier.state is TierState.READY))
        gauge("mode", float(self._mode.mode.level))
