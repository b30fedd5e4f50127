"""Programs' figures in columns, for forecasts that look at all of them at once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class ProgramRows(Generic[Key]):
    """Programs' figures in columns, so that a forecast takes some microseconds and not one for each program.

    A row: context in blocks, turns, blocks grown, in how many turns, 1.0 while it runs or waits, mean pause
    after its last turn, when that ended, blocks that others have, too.
    """

    def __init__(self) -> None:
        self._figures: Floats = np.zeros((64, 8))
        self._keys: list[Key] = []
        self._at: dict[Key, int] = {}

    @property
    def columns(self) -> Floats:
        """Figures, shape (8, programs)."""
        return self._figures[: len(self._keys)].T

    def of(self, keys: Sequence[Key]) -> Floats:
        """Figures of some programs, shape (8, programs)."""
        found: Floats = self._figures[[self._at[key] for key in keys]].T
        return found

    @property
    def keys(self) -> Sequence[Key]:
        """The programs, in the order of the columns."""
        return self._keys

    def __contains__(self, key: Key) -> bool:
        """Whether the program has a row."""
        return key in self._at

    def put(self, key: Key, figures: tuple[float, ...]) -> None:
        """Write a program's row."""
        at = self._at.get(key)
        if at is None:
            at = self._at[key] = len(self._keys)
            self._keys.append(key)
            if at == len(self._figures):
                self._figures = np.concatenate((self._figures, np.zeros_like(self._figures)))
        self._figures[at] = figures

    def drop(self, key: Key) -> None:
        """Take a program's row out; the last one takes its place. Harmless where there is none."""
        at = self._at.pop(key, None)
        if at is None:
            return
        last = self._keys.pop()
        if last != key:
            self._figures[at] = self._figures[len(self._keys)]
            self._keys[at] = last
            self._at[last] = at
