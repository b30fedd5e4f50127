"""How many KV blocks the busy programs are expected to take."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class _Busy:
    blocks: int
    running: int = 0
    pause_counts_until_s: float = 0.0
    kv_resident: bool = False
    ended: bool = False


class WorkingSet(Generic[Key]):
    """Sum over busy programs of the blocks that their contexts are expected to take.

    A program is busy while a turn of it runs, for ``long_pause_s`` seconds after that, and for as
    long as its KV is resident. Every call is O(1), ``expire`` amortised.
    """

    def __init__(self, long_pause_s: float) -> None:
        self._long_pause_s = long_pause_s
        self._programs: dict[Key, _Busy] = {}
        # All pauses count for the same time, so they run out in the order in which they began.
        self._pauses: deque[tuple[float, Key]] = deque()
        self.blocks = 0

    def __len__(self) -> int:
        """Return the number of busy programs."""
        return len(self._programs)

    def fits(self, program: Key, blocks: int, room_blocks: int) -> bool:
        """Whether the busy programs fit in ``room_blocks`` with ``program`` taking ``blocks``."""
        busy = self._programs.get(program)
        others = self.blocks - (busy.blocks if busy is not None else 0)
        return others + blocks <= room_blocks

    def start(self, program: Key, expected_blocks: int) -> None:
        """Count a turn that starts; the program's context only grows."""
        busy = self._programs.setdefault(program, _Busy(blocks=0))
        grown = max(0, expected_blocks - busy.blocks)
        busy.blocks += grown
        self.blocks += grown
        busy.running += 1
        busy.ended = False
        # What a pin held is the turn's own now.
        busy.kv_resident = False

    def pause(self, program: Key, now_s: float) -> None:
        """Count a turn that ended; KeyError if the program is not busy."""
        busy = self._programs[program]
        busy.running -= 1
        if busy.running:
            return
        busy.pause_counts_until_s = now_s + self._long_pause_s
        if busy.ended:
            self._remove(program)
        else:
            self._pauses.append((busy.pause_counts_until_s, program))

    def hold(self, program: Key) -> None:
        """Note that the KV of a busy program is resident; others are not counted for it."""
        busy = self._programs.get(program)
        if busy is not None:
            busy.kv_resident = True

    def release(self, program: Key, now_s: float) -> None:
        """Note that the program's KV is resident no more."""
        busy = self._programs.get(program)
        if busy is None:
            return
        busy.kv_resident = False
        if not busy.running and now_s >= busy.pause_counts_until_s:
            self._remove(program)

    def end(self, program: Key) -> None:
        """Remove a program that is over: now, or with its last running turn."""
        busy = self._programs.get(program)
        if busy is None:
            return
        busy.ended = True
        if not busy.running:
            self._remove(program)

    def expire(self, now_s: float) -> None:
        """Remove programs whose pause has become long and whose KV is not resident."""
        while self._pauses and self._pauses[0][0] <= now_s:
            until_s, program = self._pauses.popleft()
            busy = self._programs.get(program)
            if busy is None or busy.running or busy.kv_resident:
                continue
            # An older pause of a program that has run and paused again since does not count.
            if busy.pause_counts_until_s == until_s:
                self._remove(program)

    def _remove(self, program: Key) -> None:
        self.blocks -= self._programs.pop(program).blocks
