"""Lists of programs that stay as they were while somebody turns their pages.

The order is by last activity, which changes all the time: a page made by looking again would repeat some
programs and leave out others. So the rest of a list is kept, as keys, until it has been read or is old.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.link_messages import ProgramKey

KEPT_S: Final = 600.0
MAX_LISTS: Final = 128
MAX_KEYS: Final = 2_000_000
"""Of all lists together."""

ListedProgram = tuple[str, "ProgramKey"]
"""An engine's id and the program there."""


@dataclass(frozen=True, slots=True)
class _List:
    keys: list[ListedProgram]
    made_s: float


class Listings:
    """Lists by an id; those asked for longest ago go first.

    Args:
        clock: Monotonic time.
        max_lists: Most lists kept.
        max_keys: Most programs kept, in all lists.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        max_lists: int = MAX_LISTS,
        max_keys: int = MAX_KEYS,
    ) -> None:
        self._clock = clock
        self._max_lists = max_lists
        self._max_keys = max_keys
        self._lists: OrderedDict[bytes, _List] = OrderedDict()
        self._key_count = 0

    def keep(self, keys: list[ListedProgram]) -> bytes:
        """Keep a list; return its id."""
        list_id = secrets.token_bytes(12)
        self._lists[list_id] = _List(keys, self._clock())
        self._key_count += len(keys)
        while len(self._lists) > 1 and (
            len(self._lists) > self._max_lists or self._key_count > self._max_keys
        ):
            self._forget(next(iter(self._lists)))
        return list_id

    def get(self, list_id: bytes) -> list[ListedProgram] | None:
        """A list that is kept; None if it is not any more."""
        kept = self._lists.get(list_id)
        if kept is None:
            return None
        if self._clock() - kept.made_s > KEPT_S:
            self._forget(list_id)
            return None
        self._lists.move_to_end(list_id)
        return kept.keys

    def forget_old(self) -> None:
        """Give up what is too old."""
        now_s = self._clock()
        for list_id in [i for i, kept in self._lists.items() if now_s - kept.made_s > KEPT_S]:
            self._forget(list_id)

    def _forget(self, list_id: bytes) -> None:
        self._key_count -= len(self._lists.pop(list_id).keys)
