"""Making room: pins yield the moment an allocation would fail (a request's life, step 3; DESIGN D2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtier.gpu_pin import Pin, PinTable, ReleaseCause

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.block_pool import VllmBlockPool
    from kvtier.gpu_pin import Released
    from kvtier.staging import Stager


class Room:
    """Releases pins for allocations that fail; used inside `schedule()` by `wrap_allocation`."""

    def __init__(
        self,
        pool: VllmBlockPool,
        pins: PinTable,
        stager: Stager,
        note: Callable[..., None],
    ) -> None:
        self._pool = pool
        self._pins = pins
        self._stager = stager
        self._note = note
        # Free blocks when a request last failed although every pin had been released. Until releasing
        # all would give more, trying again is a waste of the scheduler's time. Pins do not give all of
        # their blocks: running copies and requests hold some, and give them back later.
        self._futile: dict[str, int] = {}

    def make(
        self,
        request: Any,
        retry: Callable[[], Any],
        *,
        own_program: str | None,
        regret_s_per_block: Callable[[Pin], float],
    ) -> Any:
        """End pins, cheapest regret first and the request's own program last, until `retry` succeeds.

        For a running request pins simply end, and staging too: it would be preempted otherwise. For
        a waiting one the pins come back if even all of them were not enough: then something else
        holds the memory, and nothing would be gained.

        Returns:
            `retry`'s result; None when there was not enough.
        """
        running = request.status.name == "RUNNING"
        if not running and self._is_futile(request.request_id):
            return None
        order = self._pins.in_release_order(regret_s_per_block)
        order.sort(key=lambda pin: pin.program == own_program)
        ended: list[Released] = []
        result = None
        for pin in order:
            released = self._pins.unpin(pin.key, ReleaseCause.PRESSURE)
            if released is not None:
                ended.append(released)
                result = retry()
                if result is not None:
                    break
        while result is None and running and self._stager.cancel_one_for_room():
            result = retry()
        if result is None and not running:
            self._futile[request.request_id] = self._pool.n_free
            for released in reversed(ended):
                self._pins.repin(released.pin)
            return None
        self._note(*ended)
        return result

    def _is_futile(self, request_id: str) -> bool:
        failed_with = self._futile.get(request_id)
        if failed_with is None:
            return False
        n_free = self._pool.n_free
        if n_free + self._pins.pinned_blocks <= failed_with:
            return True
        keys = [pin.key for pin in self._pins.pins()]
        return n_free + self._pins.reclaimable_blocks(keys) <= failed_with

    def forget(self, request_id: str) -> None:
        """The request has its blocks, or is over."""
        self._futile.pop(request_id, None)
