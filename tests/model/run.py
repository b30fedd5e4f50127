"""Lives one after the other, each from its own seed: what was seen, and what was broken."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Final

from tests.model.invariants import Invariants
from tests.model.life import Life
from tests.model.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

STORMS: Final = 4
STORM_TRANSITIONS: Final = 300
LIVES_OF_A_SEED: Final = 10_000_000


def live(seed: int, number: int, *, raises: bool = False) -> Outcome:
    """One life, from its birth to when everything is forgotten, or to the first broken invariant.

    Args:
        seed: Of the run.
        number: Of the life in the run; the two make the life's own seed.
        raises: Raise what is broken.
    """
    with born(seed * LIVES_OF_A_SEED + number) as (life, invariants):
        broken = {}
        try:
            for _ in range(STORMS):
                life.storm(STORM_TRANSITIONS)
                invariants.calm()
            invariants.over()
        except Exception as error:
            if raises:
                raise
            broken[number] = f"{type(error).__name__}: {error}"
        return Outcome(
            1,
            life.transitions,
            life.happened,
            Counter({k: int(v) for k, v in life.half.stats.totals.items()}),
            life.wire.outcomes,
            life.drive.preemptions,
            Counter(life.plan.kinds()),
            broken,
        )


@contextlib.contextmanager
def born(seed: int) -> Iterator[tuple[Life, Invariants]]:
    """A life, and who looks at it."""
    life = Life(seed)
    invariants = Invariants(life)
    try:
        yield life, invariants
    finally:
        invariants.close()
        life.engine.connector.shutdown()
