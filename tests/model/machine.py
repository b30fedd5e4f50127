"""Hypothesis chooses what happens in a life, and makes what breaks it short.

The events, the engine and the invariants are those of the random lives. Each event draws from a seed of its own:
one that is left out changes none of the others.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any, Final

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from tests.model.actions import ACTIONS
from tests.model.defects import ALL
from tests.model.run import born

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.model.invariants import Invariants
    from tests.model.life import Life

MOST_EVENTS: Final = 30
MOST_STEPS: Final = 20

_SEEDS: Final = st.integers(0, (1 << 16) - 1)
_CALM: Final = "calm"
# As often as in the random lives; the first ones are the simplest.
_EVENTS: Final = list(
    itertools.chain.from_iterable(
        [name] * max(1, round(w / 2)) for name, w in {_CALM: 2.0, **ACTIONS}.items()
    )
)


class Machine(RuleBasedStateMachine):
    """See the module's docstring."""

    transitions = 0
    """Of all machines."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self._broken = False
        self._life: Life
        self._invariants: Invariants

    @initialize(seed=_SEEDS)
    def begin(self, seed: int) -> None:
        """An engine and a world, and nobody has come yet."""
        self._life, self._invariants = self._stack.enter_context(born(seed))
        with self._noting():
            self._life.begin_storm()

    @rule(name=st.sampled_from(_EVENTS), seed=_SEEDS)
    def happens(self, name: str, seed: int) -> None:
        """One event; or all that waits is done, and then the storm goes on."""
        with self._drawing(seed):
            if name == _CALM:
                self._invariants.calm()
                self._life.begin_storm()
            else:
                self._life._happens(name)

    @rule(times=st.integers(1, MOST_STEPS), seed=_SEEDS)
    def steps(self, times: int, seed: int) -> None:
        """The engine goes on."""
        with self._drawing(seed):
            for _ in range(times):
                self._life._run_step()

    def teardown(self) -> None:
        """The end of the life, where nothing has broken before."""
        with self._stack:
            if hasattr(self, "_invariants") and not self._broken:
                self._life.random.seed(0)
                self._invariants.calm()
                self._invariants.over()

    @contextlib.contextmanager
    def _drawing(self, seed: int) -> Iterator[None]:
        self._life.random.seed(seed)
        with self._noting():
            yield

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """What is broken is raised once: a calm after it would say something else."""
        before = self._life.transitions
        try:
            yield
        except BaseException:
            self._broken = True
            raise
        finally:
            type(self).transitions += self._life.transitions - before


def explore(examples: int) -> dict[str, Any]:
    """So many lives; what was broken, and the shortest list of events that shows it."""
    Machine.transitions = 0
    broken: list[str] = []
    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=MOST_EVENTS,
                derandomize=True,
                database=None,
                deadline=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
                print_blob=False,
            ),
        )
    except Exception as error:  # noqa: BLE001 - whatever breaks is told
        broken = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
    return {"examples": examples, "transitions": Machine.transitions, "broken": broken}


def explore_with(defect: str, examples: int) -> dict[str, Any]:
    """As `explore`, of a kvtier with a planted defect."""
    with ALL[defect]():
        return explore(examples)
