"""How likely a program comes back after its n-th turn, against programs in general.

Agents have step limits, and short tasks end early: programs that end without a word mostly do so after certain
numbers of turns. How long they stay away tells that only when it has become long; how many turns they have had tells it at
the pause's beginning, once some programs have gone that way.

Only pauses after a tool call are looked at, and only those that nobody has announced: a final answer has a distribution of gaps of its own.

For each number of turns, pauses are counted that ended with a return and that never will. One that lasts may be
either: with ``p`` the chance of a return and ``S`` the survival of gaps that end, being away for ``w`` so far has the probability
``1 - p + p S(w)``. ``p`` is the value of largest likelihood::

    log p * (returned + prior * common) + log(1 - p) * (gone + prior * (1 - common)) + sum_i log(1 - p + p S(w_i))

``common`` is the same over all numbers of turns.

Pure: time is a parameter.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvtier.ttl.gaps import Floats, SurvivalCurve

MAX_TURNS: Final = 512
"""Programs with more turns are alike."""
PRIOR_PAUSES: Final = 2.0
"""Pauses of programs in general that count with those after as many turns."""
COMMON_PRIOR: Final = 0.95
"""The chance of a return before any was seen."""
MAX_LASTING: Final = 64
"""Pauses after as many turns that are watched; the oldest of more counts by how likely it ends."""
NEVER_S: Final = 3600.0
"""Who stays away for so long is taken not to return: the part of the gaps' curve that is left there."""
DECAY: Final = 0.98
"""Weight of the past after each pause that ended after as many turns."""
STALE_S: Final = 5.0
"""A chance is estimated anew at most so often."""
_HALVINGS: Final = 12

_Pause = tuple[str, str]
"""Program and request."""


@dataclass(slots=True)
class _Seen:
    """Pauses after so many turns: those that ended, decayed, and when those began that last, oldest first."""

    returned: float = 0.0
    gone: float = 0.0
    lasting: OrderedDict[_Pause, float] = field(default_factory=OrderedDict)
    chance: float = 1.0
    estimated_s: float = float("-inf")

    def begin(self, pause: _Pause, now_s: float, curve: SurvivalCurve) -> None:
        """A pause begins; where there are too many, the oldest one counts by how likely it ends."""
        if len(self.lasting) >= MAX_LASTING:
            _, began_s = self.lasting.popitem(last=False)
            still = self.chance * float(_survivals([began_s], now_s, curve)[0])
            self._settle(still / (1.0 - self.chance + still) if still else 0.0)
        self.lasting[pause] = now_s

    def end(self, pause: _Pause, *, returned: bool | None) -> None:
        """A pause is over; None where nobody knows how."""
        if self.lasting.pop(pause, None) is not None and returned is not None:
            self._settle(float(returned))

    def chance_at(self, now_s: float, curve: SurvivalCurve, common: float) -> float:
        """The chance of largest likelihood; not estimated anew within `STALE_S`."""
        if now_s - self.estimated_s >= STALE_S:
            self.estimated_s = now_s
            self.chance = self._estimate(
                _survivals(list(self.lasting.values()), now_s, curve), common
            )
        return self.chance

    def _settle(self, returned: float) -> None:
        self.returned = DECAY * self.returned + returned
        self.gone = DECAY * self.gone + (1.0 - returned)

    def _estimate(self, survivals: Floats, common: float) -> float:
        returned = self.returned + PRIOR_PAUSES * common
        gone = self.gone + PRIOR_PAUSES * (1.0 - common)
        # Each term's slope falls with p: there is one place where their sum is 0.
        slopes = survivals - 1.0
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            p = (low + high) / 2.0
            slope = returned / p - gone / (1.0 - p) + float((slopes / (1.0 + p * slopes)).sum())
            low, high = (p, high) if slope > 0.0 else (low, p)
        return (low + high) / 2.0


class ReturnChance:
    """See the module's docstring. Events cost O(1); an answer O(`MAX_LASTING`) every `STALE_S` for each number of turns."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._all = _Seen()
        self._turns: dict[str, dict[str, int]] = {}

    def __len__(self) -> int:
        """Return the number of pauses whose end is of interest."""
        return sum(map(len, self._turns.values()))

    def paused(
        self, program: str, request_id: str, turns: int, now_s: float, curve: SurvivalCurve
    ) -> None:
        """A program's turn has called a tool: its `turns`-th one, its sub-agents' included. `curve`: of all gaps."""
        self.forget(program, (request_id,))
        turns = min(turns, MAX_TURNS)
        for seen in (self._seen.setdefault(turns, _Seen()), self._all):
            seen.begin((program, request_id), now_s, curve)
        self._turns.setdefault(program, {})[request_id] = turns

    def returned(self, program: str, request_id: str) -> None:
        """The program has come back from this pause; one that is not known is ignored."""
        self._end(program, request_id, returned=True)

    def gone(self, program: str, request_id: str) -> None:
        """The program is given up in this pause; one that is not known is ignored."""
        self._end(program, request_id, returned=False)

    def forget(self, program: str, request_ids: Iterable[str]) -> None:
        """How these pauses end, nobody will know or is to learn from."""
        for request_id in request_ids:
            self._end(program, request_id, returned=None)

    def forget_program(self, program: str) -> None:
        """The program is over."""
        self.forget(program, tuple(self._turns.get(program, ())))

    def share(self, turns: int, now_s: float, curve: SurvivalCurve) -> float:
        """The chance of a return after so many turns over that of programs in general, at most 1.

        Args:
            turns: Those that the program has had, its sub-agents' included.
            now_s: The time.
            curve: Survival of gaps after all tools. How often programs in general never return is in what TTLs go by
                already: hence the ratio.
        """
        seen = self._seen.get(min(turns, MAX_TURNS))
        if seen is None:
            return 1.0
        common = self._all.chance_at(now_s, curve, COMMON_PRIOR)
        return min(1.0, seen.chance_at(now_s, curve, common) / common)

    def _end(self, program: str, request_id: str, *, returned: bool | None) -> None:
        pauses = self._turns.get(program, {})
        turns = pauses.pop(request_id, None)
        if turns is None:
            return
        if not pauses:
            del self._turns[program]
        for seen in (self._seen[turns], self._all):
            seen.end((program, request_id), returned=returned)


def _survivals(began_s: list[float], now_s: float, curve: SurvivalCurve) -> Floats:
    """For pauses that last: how likely those that end at all would last for as long."""
    survivals = curve.at(np.maximum(now_s - np.array([*began_s, now_s - NEVER_S]), 0.0))
    never = survivals[-1]
    if never >= 1.0:
        return np.ones(len(began_s))
    of_those_that_end: Floats = np.maximum(survivals[:-1] - never, 0.0) / (1.0 - never)
    return of_those_that_end
