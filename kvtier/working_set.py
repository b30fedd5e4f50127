"""How many KV blocks the programs at work are expected to take."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvtier.shared_blocks import Beginning, SharedBlocks

Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class _Busy:
    blocks: int
    running: int = 0
    waiting: int = 0
    pause_counts_until_s: float = 0.0
    kv_resident: bool = False
    ended: bool = False

    @property
    def is_active(self) -> bool:
        return bool(self.running or self.waiting)


class WorkingSet(Generic[Key]):
    """Sums over busy programs of the blocks that their contexts are expected to take; what they share counts once.

    A program is *busy* while a turn of it runs or waits, for ``long_pause_s`` seconds after that, and for as long
    as its KV is resident. It is *active* while a turn runs or waits. A call costs O(1) but for what
    `kvtier.shared_blocks` does, ``expire`` amortised.
    """

    def __init__(self, long_pause_s: float) -> None:
        self._long_pause_s = long_pause_s
        self._programs: dict[Key, _Busy] = {}
        # All pauses count for the same time, so they run out in the order in which they began.
        self._pauses: deque[tuple[float, Key]] = deque()
        self._blocks = 0
        self._active_blocks = 0
        self._shared: SharedBlocks[Key] = SharedBlocks()
        self._active_shared: SharedBlocks[Key] = SharedBlocks()

    def __len__(self) -> int:
        """Return the number of busy programs."""
        return len(self._programs)

    @property
    def blocks(self) -> int:
        """Blocks of the busy programs."""
        return self._blocks - self._shared.excess_blocks

    @property
    def separate_blocks(self) -> int:
        """Blocks of the busy programs, if they had nothing in common."""
        return self._blocks

    @property
    def active_blocks(self) -> int:
        """Blocks of the active ones."""
        return self._active_blocks - self._active_shared.excess_blocks

    def fits(
        self,
        program: Key,
        blocks: int,
        active_room: int,
        busy_room: int,
        beginning: Beginning = (),
    ) -> bool:
        """Whether there is room for ``program`` taking ``blocks``.

        Args:
            program: Who would start.
            blocks: What it would take.
            active_room: Blocks for all active programs.
            busy_room: Blocks for all busy programs.
            beginning: What its prompt begins with, see `kvtier.shared_blocks`.
        """
        known = self._programs.get(program)
        own = known.blocks if known is not None else 0
        own_active = own if known is not None and known.is_active else 0
        # Its own blocks are among those that are found.
        found = max(own, self._shared.found_blocks(beginning))
        found_active = max(own_active, self._active_shared.found_blocks(beginning))
        return (
            self.active_blocks + max(0, blocks - found_active) <= active_room
            and self.blocks + max(0, blocks - found) <= busy_room
        )

    def wait(self, program: Key, expected_blocks: int, beginning: Beginning = ()) -> None:
        """Count a turn of a program that has run before and waits to start."""
        busy = self._grown(program, expected_blocks, beginning)
        busy.waiting += 1

    def give_up(self, program: Key, now_s: float) -> None:
        """Take back a ``wait``: the turn will not start."""
        busy = self._programs[program]
        busy.waiting -= 1
        self._rests(program, busy, now_s)

    def start(
        self,
        program: Key,
        expected_blocks: int,
        beginning: Beginning = (),
        *,
        waited: bool = False,
    ) -> None:
        """Count a turn that starts, after a ``wait`` or without; the program's context only grows."""
        busy = self._grown(program, expected_blocks, beginning)
        busy.waiting -= waited
        busy.running += 1
        # What a pin held is the turn's own now.
        busy.kv_resident = False

    def pause(self, program: Key, now_s: float) -> None:
        """Count a turn that ended; KeyError if the program is not busy."""
        busy = self._programs[program]
        busy.running -= 1
        self._rests(program, busy, now_s)

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
        if not busy.is_active and now_s >= busy.pause_counts_until_s:
            self._remove(program)

    def end(self, program: Key) -> None:
        """Remove a program that is over: now, or with its last turn."""
        busy = self._programs.get(program)
        if busy is None:
            return
        busy.ended = True
        if not busy.is_active:
            self._remove(program)

    def expire(self, now_s: float) -> None:
        """Remove programs whose pause has become long and whose KV is not resident."""
        while self._pauses and self._pauses[0][0] <= now_s:
            until_s, program = self._pauses.popleft()
            busy = self._programs.get(program)
            if busy is None or busy.is_active or busy.kv_resident:
                continue
            # An older pause of a program that has run and paused again since does not count.
            if busy.pause_counts_until_s == until_s:
                self._remove(program)

    def _grown(self, program: Key, expected_blocks: int, beginning: Beginning) -> _Busy:
        """The program's record, active, with at least so many blocks; the caller counts its turn."""
        busy = self._programs.setdefault(program, _Busy(blocks=0))
        if not busy.is_active:
            self._active_blocks += busy.blocks
        grown = max(0, expected_blocks - busy.blocks)
        busy.blocks += grown
        self._blocks += grown
        self._active_blocks += grown
        self._shared.put(program, beginning)
        self._active_shared.put(program, beginning)
        busy.ended = False
        return busy

    def _rests(self, program: Key, busy: _Busy, now_s: float) -> None:
        """A turn is gone: with the last one, the program's pause begins."""
        if busy.is_active:
            return
        self._active_blocks -= busy.blocks
        self._active_shared.drop(program)
        busy.pause_counts_until_s = now_s + self._long_pause_s
        if busy.ended:
            self._remove(program)
        else:
            self._pauses.append((busy.pause_counts_until_s, program))

    def _remove(self, program: Key) -> None:
        self._blocks -= self._programs.pop(program).blocks
        self._shared.drop(program)
