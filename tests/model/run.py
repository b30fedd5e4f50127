"""Lives one after the other, each from its own seed: what was seen, and what was broken."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tests.model.invariants import Invariants
from tests.model.life import Life

if TYPE_CHECKING:
    from collections.abc import Iterator

STORMS: Final = 4
STORM_TRANSITIONS: Final = 300
LIVES_OF_A_SEED: Final = 10_000_000


@dataclass(slots=True)
class Outcome:
    """What one life, or many, have shown.

    Attributes:
        lives: How many.
        transitions: Events and engine steps.
        happened: Each of them, by name.
        seen: What kvtier counted: decisions, ends of pins and prefetches, failures, ...
        answers: To commands.
        preemptions: Of running requests.
        broken: By number of the life: what was broken first.
    """

    lives: int = 0
    transitions: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    broken: dict[int, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {n: dict(v) if isinstance(v, dict) else v for n, v in values.items()}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Outcome:
        """What `plain` has written."""
        counters = {name: Counter(plain[name]) for name in ("happened", "seen", "answers")}
        broken = {int(number): text for number, text in plain["broken"].items()}
        return cls(**{**plain, **counters, "broken": broken})

    def add(self, other: Outcome) -> None:
        """Take in another one."""
        self.lives += other.lives
        self.transitions += other.transitions
        self.happened.update(other.happened)
        self.seen.update(other.seen)
        self.answers.update(other.answers)
        self.preemptions += other.preemptions
        self.broken.update(other.broken)


def live(seed: int, number: int, *, raises: bool = False) -> Outcome:
    """One life, from its birth to when everything is forgotten, or to the first broken invariant.

    Args:
        seed: Of the run.
        number: Of the life in the run; the two make the life's own seed.
        raises: Raise what is broken.
    """
    with _life(seed * LIVES_OF_A_SEED + number) as (life, invariants):
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
            broken,
        )


@contextlib.contextmanager
def _life(seed: int) -> Iterator[tuple[Life, Invariants]]:
    life = Life(seed)
    invariants = Invariants(life)
    try:
        yield life, invariants
    finally:
        invariants.close()
        life.engine.connector.shutdown()
