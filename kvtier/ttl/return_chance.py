"""How likely a program is to come back after its n-th turn, against programs in general.

Agents have step limits, and short tasks end early: programs that end without a word mostly do so after certain
numbers of turns. How long they stay away tells that only when it has become long; how many turns they have had tells it at
the pause's beginning, once some programs have gone that way.

For each number of turns, pauses are counted that ended with a return and that never will. A pause that lasts is both, by
how likely: of programs that return with probability ``p``, one that has been away for ``w`` has ended with probability
``(1 - p) / (1 - p + p S(w))``, where ``S`` is the gap's survival. ``p`` follows from that by expectation
maximisation (Dempster, Laird and Rubin 1977), with `PRIOR_PAUSES` pauses of programs in general as a prior.

Pure: time is a parameter.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.ttl.gaps import SurvivalCurve

MAX_TURNS: Final = 512
"""Programs with more turns are alike."""
PRIOR_PAUSES: Final = 2.0
"""Pauses of programs in general that count with those after as many turns."""
MOST_LIKELY: Final = 0.95
"""No return is taken for more likely before it was seen: a long wait would else tell nothing."""
MAX_OPEN: Final = 16
"""Pauses after as many turns that are watched; the oldest of more has ended in all likelihood."""
DECAY: Final = 0.98
"""Weight of the past after each pause that ended after as many turns."""
_ROUNDS: Final = 5


@dataclass(frozen=True, slots=True)
class _Pause:
    turns: int
    tool: str | None
    began_s: float


@dataclass(slots=True)
class _Seen:
    """Pauses after so many turns: those that ended, decayed, and those that last, by key."""

    returned: float = 0.0
    gone: float = 0.0
    lasting: OrderedDict[str, _Pause] = field(default_factory=OrderedDict)

    def settle(self, *, returned: bool) -> None:
        self.returned = DECAY * self.returned + returned
        self.gone = DECAY * self.gone + (not returned)


class ReturnChance:
    """See the module's docstring. Every call costs O(1), or O(`MAX_OPEN`) where it says so."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._pauses: dict[str, _Pause] = {}
        self._all = _Seen()

    def __len__(self) -> int:
        """Return the number of pauses that last."""
        return len(self._pauses)

    def paused(self, key: str, turns: int, tool: str | None, now_s: float) -> None:
        """A program's turn has ended, its `turns`-th one; `key` names the pause."""
        self.forget(key)
        pause = _Pause(min(turns, MAX_TURNS), tool, now_s)
        seen = self._seen.setdefault(pause.turns, _Seen())
        if len(seen.lasting) >= MAX_OPEN:
            self.gone(next(iter(seen.lasting)))
        self._pauses[key] = seen.lasting[key] = pause

    def returned(self, key: str) -> None:
        """The program has come back from this pause; one that is not known is ignored."""
        self._settle(key, returned=True)

    def gone(self, key: str) -> None:
        """The program is given up in this pause; one that is not known is ignored."""
        self._settle(key, returned=False)

    def forget(self, key: str) -> None:
        """Nobody will know how this pause ends."""
        pause = self._pauses.pop(key, None)
        if pause is not None:
            del self._seen[pause.turns].lasting[key]

    def factor(
        self, turns: int, now_s: float, curve: Callable[[str | None], SurvivalCurve]
    ) -> float:
        """By how much a return after so many turns is less likely than after any, at most 1; O(`MAX_OPEN`).

        Args:
            turns: Those that the program has had.
            now_s: The time.
            curve: Returns the survival of gaps by tool. How often programs in general never return is in
                it, so that it must not be counted here once more.
        """
        seen = self._seen.get(min(turns, MAX_TURNS))
        settled = self._all.returned + self._all.gone
        common = min(MOST_LIKELY, (self._all.returned + PRIOR_PAUSES) / (settled + PRIOR_PAUSES))
        if seen is None or not (seen.gone or seen.lasting):
            return 1.0
        aways = [
            curve(pause.tool).survival(max(0.0, now_s - pause.began_s))
            for pause in seen.lasting.values()
        ]
        n_pauses = PRIOR_PAUSES + seen.returned + seen.gone + len(aways)
        chance = common
        for _ in range(_ROUNDS):
            ended = sum((1.0 - chance) / (1.0 - chance + chance * away) for away in aways)
            returned = PRIOR_PAUSES * common + seen.returned + len(aways) - ended
            chance = min(MOST_LIKELY, returned / n_pauses)
        return min(1.0, chance / common)

    def _settle(self, key: str, *, returned: bool) -> None:
        pause = self._pauses.get(key)
        if pause is None:
            return
        self.forget(key)
        self._seen[pause.turns].settle(returned=returned)
        self._all.settle(returned=returned)
