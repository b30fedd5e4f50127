"""How many KV blocks the programs that have begun will want at a time, at most, before they are done.

A program's context grows with every turn, so programs that fit together when they begin do not fit later,
and the youngest of them then wait in the middle of their work. So the question whether one more may begin is
asked of the future, as LightLLM's Past-Future scheduler (arXiv 2507.10150) asks it for the outputs of single
requests. Here the unit is the *episode*: the turns from a user's message to the answer that calls no tool.

The blocks wanted in ``d`` turns are expected to be::

    sum over programs i of  active_i * (context_i + growth_i * d) * S(turns_i + d) / S(turns_i)

``S(n)``: the share of episodes that last for more than ``n`` turns, a Kaplan-Meier estimate in which
episodes under way count as censored. ``growth_i``: blocks a turn, learnt from the program itself and from all,
and before that a part of its context.
``active_i``: the share of its time in which a program runs; who is away for longer counts less.

Time is a parameter; nothing here reads a clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import numpy as np

from kvtier.program_rows import Floats, ProgramRows
from kvtier.shared_blocks import Beginning, SharedBlocks
from kvtier.ttl.gaps import kaplan_meier, lognormal_curve

Key = TypeVar("Key", bound=Hashable)
_Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

PRIOR_MEDIAN_TURNS: Final = 8.0
PRIOR_P90_TURNS: Final = 40.0
"""Length of an episode before any was seen, log-normal: between function calling (BFCL, 6 turns a program) and
coding agents (SWE-Bench, 11 turns; Claude Code, 45 turns in sessions of several episodes)."""
PRIOR_WEIGHT: Final = 4.0
"""Episodes that the prior is worth."""
PRIOR_GROWTH: Final = 0.2
"""Part of a context by which it grows in a turn, before any growth was seen: between coding agents (Claude Code) and
function calling."""
PRIOR_GROWTH_TURNS: Final = 4.0
"""Turns that this is worth."""
POOLED_TURNS: Final = 2.0
"""The mean growth of all programs counts like so many turns of a program's own."""
WINDOW: Final = 256
"""Ended episodes that are remembered."""
AHEAD_TURNS: Final = np.array([1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64])
"""How far ahead is looked."""
MAX_TURNS: Final = 512
"""Longer episodes are alike."""
STALE_S: Final = 1.0
"""``S`` is estimated anew at most so often, and what many programs will want is summed up anew."""
EXACT: Final = 256
"""Up to so many programs are summed up each time."""
DECAY: Final = 0.98
_PRIOR: Final = lognormal_curve(PRIOR_MEDIAN_TURNS, PRIOR_P90_TURNS)
_ROUNDING: Final = 1e-9


@dataclass(slots=True)
class _Program:
    """A program in an episode.

    Attributes:
        context_blocks: Of the turn that runs, or ran last.
        left_blocks: Of the last turn that has ended; 0 before.
        turns: Ended turns of the episode.
        grown_blocks: By which contexts have grown from one turn's end to the next one's.
        grown_turns: In so many turns.
        running: Turns under way.
        waiting: Turns that wait to start.
        began_s: When the last turn started.
        paused_s: When the last turn ended.
        gap_s: Mean pause after such a turn.
        repeated_blocks: Of its context, those that others have, too, as of when `S` was estimated.
    """

    context_blocks: int
    left_blocks: int = 0
    turns: int = 0
    grown_blocks: int = 0
    grown_turns: int = 0
    running: int = 0
    waiting: int = 0
    began_s: float = 0.0
    paused_s: float = 0.0
    gap_s: float = 0.0
    repeated_blocks: int = 0

    def figures(self) -> tuple[float, ...]:
        """What a forecast reads, see `ProgramRows`."""
        is_active = bool(self.running or self.waiting)
        turns = min(self.turns, MAX_TURNS)
        grown = self.grown_blocks, self.grown_turns
        pause = self.gap_s, self.paused_s
        return (self.context_blocks, turns, *grown, is_active, *pause, self.repeated_blocks)


class _Mean:
    """A mean in which each sample weighs `DECAY` of the one after it; 0 without samples."""

    __slots__ = ("_sum", "weight")

    def __init__(self) -> None:
        self._sum = self.weight = 0.0

    @property
    def value(self) -> float:
        return self._sum / self.weight if self.weight else 0.0

    def add(self, sample: float) -> None:
        self._sum = DECAY * self._sum + sample
        self.weight = DECAY * self.weight + 1.0


class DemandForecast(Generic[Key]):
    """Watches programs grow, and says what they will want.

    An event costs O(1). A forecast costs O(programs in an episode), in numpy, and more once a second. Of more than
    `EXACT` programs it looks in between only at those to which something has happened: the others are as they were up to
    `STALE_S` ago.
    """

    def __init__(self) -> None:
        self._programs: dict[Key, _Program] = {}
        self._shared: SharedBlocks[Key] = SharedBlocks()
        self._rows: ProgramRows[Key] = ProgramRows()
        self._ended_turns: deque[int] = deque(maxlen=WINDOW)
        self._growth_blocks = _Mean()
        self._turn_s = _Mean()
        self._gap_s = _Mean()
        self._lasting = self._estimate()
        self._estimated_s = float("-inf")
        self._distinct_blocks = 0
        # What each of many programs will want, their sum, for which limit, and whose change it does not know of.
        self._terms: dict[Key, Floats] = {}
        self._sum: Floats | None = None
        self._sum_most_blocks = math.inf
        self._changed: dict[Key, None] = {}

    def __len__(self) -> int:
        """Return the number of programs in an episode."""
        return len(self._programs)

    @property
    def turn_s(self) -> float:
        """Mean time from a turn's start, with its blocks, to its end; 0 before one has ended."""
        return self._turn_s.value

    def turn_waits(self, program: Key, now_s: float) -> None:
        """A turn of a program arrives; one that is in no episode is not counted before it starts."""
        known = self._programs.get(program)
        if known is None:
            return
        if not known.running and not known.waiting:
            self._gap_s.add(max(0.0, now_s - known.paused_s))
        known.waiting += 1
        self._put(program, known)

    def turn_starts(
        self, program: Key, context_blocks: int, now_s: float, beginning: Beginning = ()
    ) -> None:
        """A turn has its blocks; with the first one the episode begins."""
        known = self._programs.setdefault(program, _Program(context_blocks))
        self._shared.put(program, beginning)
        known.context_blocks = max(known.context_blocks, context_blocks)
        known.waiting = max(0, known.waiting - 1)
        known.running += 1
        known.began_s = now_s
        self._put(program, known)

    def turn_ends(
        self, program: Key, context_blocks: int, now_s: float, *, goes_on: bool, gap_s: float
    ) -> None:
        """A turn is over.

        Args:
            program: Whose it was.
            context_blocks: Of its prompt and output.
            now_s: The time.
            goes_on: It has called a tool; else the episode is over with it.
            gap_s: Mean pause after such turns.
        """
        known = self._programs.get(program)
        if known is None:
            return
        known.running = max(0, known.running - 1)
        self._turn_s.add(max(0.0, now_s - known.began_s))
        if known.turns:
            grown_blocks = context_blocks - known.left_blocks
            known.grown_blocks += grown_blocks
            known.grown_turns += 1
            self._growth_blocks.add(grown_blocks)
        known.turns += 1
        known.context_blocks = known.left_blocks = context_blocks
        known.paused_s, known.gap_s = now_s, gap_s
        # A sub-agent's answer does not end the episode of those who still work.
        if not goes_on and not known.running and not known.waiting:
            self._ended_turns.append(known.turns)
            self.program_ends(program)
        else:
            self._put(program, known)

    def turn_vanishes(self, program: Key, now_s: float, *, started: bool) -> None:
        """A turn has gone and left nothing behind."""
        known = self._programs.get(program)
        if known is None:
            return
        if started:
            known.running = max(0, known.running - 1)
        else:
            known.waiting = max(0, known.waiting - 1)
        known.paused_s = now_s
        self._put(program, known)

    def program_ends(self, program: Key) -> None:
        """A program is over or forgotten; how long its episode would have been, nobody knows."""
        if self._programs.pop(program, None) is None:
            return
        self._shared.drop(program)
        self._rows.drop(program)
        self._changes(program)
        if not self._programs:
            self._forget_sum()

    def repeated_blocks(self, beginning: Beginning) -> int:
        """How many of a new program's first blocks several programs in an episode have."""
        return self._shared.found_blocks(beginning, 2)

    def peak_blocks(
        self,
        new_blocks: int,
        now_s: float,
        most_blocks: float = math.inf,
        repeated_blocks: int = 0,
    ) -> float:
        """The most blocks that are expected to be wanted at a time if one more program begins now.

        Args:
            new_blocks: Blocks of the new program's context.
            now_s: The time.
            most_blocks: No context grows beyond this.
            repeated_blocks: Of the new program, see there.
        """
        if now_s - self._estimated_s >= STALE_S:
            self._estimated_s = now_s
            self._lasting = self._estimate()
            self._sum = None
            self._see_what_repeats()
        pooled = self._growth_blocks.value
        # Its first turn runs, and nothing is known of its growth.
        figures = (new_blocks, 0, 0, 0, 1, 0, 0, repeated_blocks)
        newcomer = np.array(figures, dtype=np.float64)[:, None]
        own = self._wanted_by(newcomer, pooled, now_s, most_blocks)[0]
        wanted = self._wanted_by_all(pooled, now_s, most_blocks) + own
        blocks, repeated = wanted[: len(AHEAD_TURNS)], wanted[len(AHEAD_TURNS) :]
        # What several of those who run have is there once.
        distinct_blocks = max(self._distinct_blocks, self._shared.distinct_blocks)
        return float((blocks - np.maximum(repeated - distinct_blocks, 0.0)).max())

    def _see_what_repeats(self) -> None:
        self._distinct_blocks = self._shared.distinct_blocks
        for program, known in self._programs.items():
            repeated_blocks = self._shared.repeated_of(program)
            if repeated_blocks != known.repeated_blocks:
                known.repeated_blocks = repeated_blocks
                self._put(program, known)

    def _wanted_by_all(self, pooled: float, now_s: float, most_blocks: float) -> Floats:
        """What `_wanted_by` says, of all programs together."""
        rows = self._rows
        if len(self._programs) <= EXACT:
            self._forget_sum()
            return _sum(self._wanted_by(rows.columns, pooled, now_s, most_blocks))
        if self._sum is None or self._sum_most_blocks != most_blocks:
            wanted = self._wanted_by(rows.columns, pooled, now_s, most_blocks)
            self._terms = dict(zip(rows.keys, wanted, strict=True))
            self._sum, self._sum_most_blocks = _sum(wanted), most_blocks
        elif self._changed:
            left = [self._terms.pop(key) for key in self._changed if key in self._terms]
            here = [key for key in self._changed if key in rows]
            wanted = self._wanted_by(rows.of(here), pooled, now_s, most_blocks)
            self._terms.update(zip(here, wanted, strict=True))
            self._sum = self._sum + _sum(wanted) - np.sum(left, axis=0)
        self._changed.clear()
        return self._sum

    def _wanted_by(
        self, columns: Floats, pooled: float, now_s: float, most_blocks: float
    ) -> Floats:
        """Blocks that programs want in `AHEAD_TURNS`, and those of them that others have, by how likely they run then.

        Shape (programs, 2 x ahead).
        """
        turn_s, gap_s = self._turn_s.value, self._gap_s.value
        contexts, turns, grown, grown_turns, is_active, gaps, paused, repeated = columns
        seen = self._growth_blocks.weight
        pooled = (seen * pooled + PRIOR_GROWTH_TURNS * PRIOR_GROWTH * contexts) / (
            seen + PRIOR_GROWTH_TURNS
        )
        growths = (grown + POOLED_TURNS * pooled) / (grown_turns + POOLED_TURNS)
        # Gaps have heavy tails: who has been away for long is expected to be away for as long again.
        away_s = np.where(is_active, gap_s, np.maximum(gaps, now_s - paused))
        wanted = self._wanted(contexts, growths, repeated, turns.astype(np.int64), most_blocks)
        likely: Floats = _share(turn_s, away_s)[:, None] * wanted
        return likely

    def _wanted(
        self,
        contexts: Floats,
        growths: Floats,
        repeated: Floats,
        turns: _Counts,
        most_blocks: float,
    ) -> Floats:
        """As `_wanted_by`, by how likely they last so long."""
        so_far = turns[:, None]
        lasting = self._lasting[np.minimum(so_far + AHEAD_TURNS, MAX_TURNS)]
        lasting = lasting / self._lasting[so_far]
        grown = np.maximum(growths, 0.0)[:, None] * AHEAD_TURNS
        wanted = np.minimum(contexts[:, None] + grown, most_blocks) * lasting
        return np.concatenate((wanted, repeated[:, None] * lasting), axis=1)

    def _put(self, program: Key, known: _Program) -> None:
        self._rows.put(program, known.figures())
        self._changes(program)

    def _changes(self, program: Key) -> None:
        if self._sum is None:
            return
        self._changed[program] = None
        if len(self._changed) > 2 * len(self._programs):
            # Nobody asks any more.
            self._forget_sum()

    def _forget_sum(self) -> None:
        self._sum = None
        self._terms.clear()
        self._changed.clear()

    def _estimate(self) -> Floats:
        """``S`` of 0 to `MAX_TURNS` turns."""
        under_way = [p.turns for p in self._programs.values() if p.turns]
        curve = kaplan_meier(
            [*self._ended_turns, *under_way],
            [True] * len(self._ended_turns) + [False] * len(under_way),
            prior=_PRIOR,
            prior_weight=PRIOR_WEIGHT,
        )
        turns = np.arange(MAX_TURNS + 1, dtype=np.float64)
        floored: Floats = np.maximum(curve.at(turns), _ROUNDING)
        return floored


def _sum(rows: Floats) -> Floats:
    total: Floats = rows.sum(axis=0)
    return total


def _share(turn_s: float, gaps_s: Floats) -> Floats:
    """The part of its time in which a program with such turns and gaps runs."""
    return turn_s / (turn_s + gaps_s) if turn_s > 0.0 else np.ones_like(gaps_s)
