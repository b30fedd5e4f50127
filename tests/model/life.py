"""A random life of an engine in an unreliable world: storms, in which anything happens, and calms that end them.

A transition is one event (an arrival, a command, a fault, ...) or one step of the engine; `watch` sees each.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from vllm.v1.core.sched.interface import PauseState

from kvtier.backend import TierState
from tests.model.operators import Operators

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.model.plan import Plan

COPY_STEPS: Final = 12
"""Within which a prefetch that was ordered begins, mostly."""


class Life(Operators):
    """See the module's docstring, and `World`.

    Args:
        seed: Of all chance.
        watch: Called after each transition.
        plan: Drawn where it is not given.

    Attributes:
        happened: How often what has happened.
        watch: See above.
        is_calm: Nothing goes wrong now.
    """

    def __init__(
        self, seed: int, watch: Callable[[], None] = lambda: None, plan: Plan | None = None
    ) -> None:
        super().__init__(seed, plan)
        self.watch = watch
        self.happened: Counter[str] = Counter()
        self.is_calm = True
        names, weights = zip(*sorted(self.plan.actions.items()), strict=True)
        self._names, self._weights = list(names), list(weights)

    def storm(self, n_transitions: int) -> None:
        """Anything happens."""
        self.begin_storm()
        for _ in range(n_transitions):
            if self.random.random() < self.plan.step_share:
                self._run_step()
            else:
                name = self.random.choices(self._names, self._weights)[0]
                self._happens(name)

    def begin_storm(self) -> None:
        """From now on things go wrong."""
        if self.random.random() < 0.8:
            # The operator has switched off what was tried, or a life would soon be without pins.
            self._settings_return()
        self._set_calm(calm=False)
        self._weather()

    def calm(self, max_steps: int) -> int:
        """Nothing new comes and nothing goes wrong, until nothing is left to do; returns the steps.

        Raises:
            AssertionError: Something is left after `max_steps`.
        """
        self._set_calm(calm=True)
        self.engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        n_steps = 0
        if self.tier is not None and self.tier.state is TierState.AWAY:
            if self.random.random() < 0.5:
                # Nobody may wait for it.
                n_steps = self._until_done(max_steps)
            self._happens("tier_returns")
        return n_steps + self._until_done(max_steps)

    def _until_done(self, max_steps: int) -> int:
        for n_steps in range(max_steps):
            if not self.drive.busy and not self.worker.busy:
                self._collect()
                return n_steps
            self._run_step()
        left = self.drive._waiting_ids()
        raise AssertionError(
            f"after {max_steps} calm steps: requests {left}, work {self.half.has_work()}"
        )

    def _lull(self) -> None:
        """Nobody comes for a while, and programs pause; their KV may leave GPU memory, and be wanted again."""
        for _ in range(self.random.choice((5, 40))):
            if not self.drive.busy:
                break
            self._run_step()
        if self.random.random() < 0.7:
            self._happens("reset")
        for _ in range(self.random.choice((1, 3))):
            self._happens("command")
        self._happens("recall")
        self._happens("wake")
        if self.random.random() < 0.5:
            self._sleep_while_copying()

    def _sleep_while_copying(self) -> None:
        """The prefix cache is reset just when KV is being prefetched, and strangers come at once."""
        for _ in range(COPY_STEPS):
            if self.half.prefetcher.n_in_flight:
                self._happens("reset")
                self._happens("flood")
                return
            self._run_step()

    def _set_calm(self, *, calm: bool) -> None:
        self.is_calm = self.worker.is_calm = calm
        if self.tier is not None:
            self.tier.is_calm = calm

    def _run_step(self) -> None:
        self.drive.step()
        self._collect()
        self._end_of("step")

    def _happens(self, name: str) -> None:
        getattr(self, f"_{name}")()
        self._end_of(name)

    def _end_of(self, name: str) -> None:
        self.transitions += 1
        self.happened[name] += 1
        self.watch()
