"""What lives have shown, and a run of many of them."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROGRESS_S: Final = 10.0
MOST_BROKEN: Final = 20
"""Broken lives after which a run ends: one defect breaks many."""


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
        kinds: Lives, by what of their engine was drawn; see `Plan.kinds`.
        broken: By number of the life: what was broken first.
    """

    lives: int = 0
    transitions: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    broken: dict[int, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {n: dict(v) if isinstance(v, dict) else v for n, v in values.items()}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Outcome:
        """What `plain` has written."""
        counters = {name: Counter(plain[name]) for name in ("happened", "seen", "answers", "kinds")}
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
        self.kinds.update(other.kinds)
        self.broken.update(other.broken)


class Run:
    """A run that can be stopped and continued.

    Args:
        seed: Its seed.
        state: Where it is kept; None: nowhere.
        live: Called with the seed and the number of each life.
    """

    def __init__(self, seed: int, state: Path | None, live: Callable[[int, int], Outcome]) -> None:
        self.seed = seed
        self._live = live
        self.seconds = 0.0
        self.outcome = Outcome()
        self._state = state
        if state is not None and state.exists():
            known = json.loads(state.read_text(encoding="utf-8"))
            if known["seed"] != seed:
                raise SystemExit(f"{state} is of seed {known['seed']}")
            self.seconds = known["seconds"]
            self.outcome = Outcome.of(known["outcome"])

    def until(self, transitions: int) -> None:
        """Live until so many transitions are done, those of before included."""
        then_s = told_s = time.monotonic()
        while self.outcome.transitions < transitions and len(self.outcome.broken) < MOST_BROKEN:
            self.outcome.add(self._live(self.seed, self.outcome.lives))
            now_s = time.monotonic()
            self.seconds += now_s - then_s
            then_s = now_s
            if now_s - told_s >= PROGRESS_S:
                told_s = now_s
                self._tell()
                self._save()
        self._save()

    def facts(self) -> dict[str, Any]:
        """What was seen, for people and programs."""
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "transitions_per_s": round(self.outcome.transitions / max(1e-9, self.seconds)),
            "engine_steps": self.outcome.happened["step"],
            "outcome": self.outcome.plain(),
        }

    def _save(self) -> None:
        if self._state is not None:
            new = self._state.with_suffix(".new")
            new.write_text(json.dumps(self.facts(), indent=1), encoding="utf-8")
            new.replace(self._state)

    def _tell(self) -> None:
        facts, outcome = self.facts(), self.outcome
        sys.stderr.write(
            f"{outcome.transitions:>12,} transitions  {outcome.lives:,} lives"
            f"  {facts['transitions_per_s']:,}/s  broken {len(outcome.broken)}\n"
        )
