"""Making room: pins yield the moment an allocation would fail (a request's life, step 3; DESIGN D2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtier.gpu_pin import Pin, PinTable, ReleaseCause

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvtier.gpu_pin import Released
    from kvtier.turns.block_pool import VllmBlockPool
    from kvtier.turns.staging import Stager


@dataclass(slots=True)
class _Futile:
    """A waiting request that did not fit although every pin had been ended.

    Attributes:
        free_blocks: How many blocks were free then: it needs more.
        most_blocks: The most that ending all pins could have given when last counted exactly.
        returns: Value of `Room._returns` at that count.
    """

    free_blocks: int
    most_blocks: int
    returns: int


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
        self._futile: dict[str, _Futile] = {}
        # Whose last allocation has failed, and the free blocks that it wanted at least.
        self._short: dict[str, int] = {}
        self._returns = 0

    @property
    def is_short(self) -> bool:
        """Whether a request waits for memory: its last allocation has failed."""
        return bool(self._short)

    def make(
        self,
        request: Any,
        retry: Callable[[], Any],
        *,
        own_program: str | None,
        regret_s_per_block: Callable[[Pin], float],
        now_s: float,
        need_blocks: Callable[[], int] = lambda: 0,
    ) -> Any:
        """End pins, cheapest regret first and the request's own program last, until `retry` succeeds.

        Pins whose blocks are all being copied come behind the others: their end frees nothing yet.

        For a running request pins simply end, and staging too: it would be preempted otherwise. For
        a waiting one the pins come back if even all of them were not enough: then something else
        holds the memory, and nothing would be gained. Where that something is staging that makes no
        progress, staging ends; where it does make progress, the request waits for it.

        Args:
            request: vLLM's request.
            retry: Repeats the allocation.
            own_program: The request's program.
            regret_s_per_block: What ending a pin is expected to cost.
            now_s: Monotonic time.
            need_blocks: Free blocks that the last try wanted at least; 0 when that is not known.

        Returns:
            `retry`'s result; None when there was not enough.
        """
        running = request.status.name == "RUNNING"
        result = None
        if not running:
            self._short[request.request_id] = need_blocks()
            ended_staging = self._end_stalled_staging(need_blocks(), now_s)
            if ended_staging and self._pool.n_free >= need_blocks():
                result = retry()
                if result is not None:
                    return result
            if self._is_futile(request.request_id, need_blocks()):
                return None
        order = self._pins.in_release_order(regret_s_per_block, now_s)
        ended: list[Released] = []
        for pin in self._own_and_held_last(order, own_program):
            released = self._pins.unpin(pin.key, ReleaseCause.PRESSURE)
            if released is None:
                continue
            ended.append(released)
            if self._pool.n_free >= need_blocks():
                result = retry()
                if result is not None:
                    break
        while result is None and running and self._stager.cancel_one_for_room():
            result = retry()
        if result is None and not running:
            free_blocks = self._pool.n_free
            for released in reversed(ended):
                self._pins.repin(released.pin)
            self._futile[request.request_id] = _Futile(free_blocks, self.most_blocks, self._returns)
            return None
        self._note(*ended)
        return result

    def _own_and_held_last(self, order: Iterable[Pin], own_program: str | None) -> Iterator[Pin]:
        held: list[Pin] = []
        own: list[Pin] = []
        for pin in order:
            if pin.program == own_program:
                own.append(pin)
            elif self._pins.is_all_held(pin):
                held.append(pin)
            else:
                yield pin
        yield from held
        yield from sorted(own, key=self._pins.is_all_held)

    def lacks(self, request_id: str, need_blocks: int) -> bool:
        """Whether a waiting request's allocation has failed, and would again whatever pins yield.

        Args:
            request_id: The request.
            need_blocks: Blocks that it needs beyond those in the prefix cache. vLLM may count more: cached
                ones that are free as well.
        """
        wanted = self._short.get(request_id)
        if wanted is None:
            return False
        return self._is_futile(request_id, max(need_blocks, wanted))

    def given_back(self) -> None:
        """A request has returned its blocks: what pins share with it may have become theirs alone."""
        self._returns += 1

    def forget(self, request_id: str) -> None:
        """The request has its blocks, or is over."""
        self._short.pop(request_id, None)
        self._futile.pop(request_id, None)

    @property
    def most_blocks(self) -> int:
        """The most blocks that there are for a request, if all pins end."""
        return self._pool.n_free + self._pins.loose_blocks

    def _is_futile(self, request_id: str, need_blocks: int) -> bool:
        """Whether ending all pins would not be enough either.

        Answers without a walk over blocks wherever it can: a waiting request is tried in every step.
        """
        most_blocks = self.most_blocks
        if most_blocks < need_blocks:
            return True
        failed = self._futile.get(request_id)
        if failed is None:
            return False
        if self._returns == failed.returns:
            return most_blocks <= max(failed.free_blocks, failed.most_blocks)
        # Who has given something back may have been the one that vLLM kept blocks for: then as many as were
        # not enough before are enough now. `most_blocks` also counts what running requests share with pins.
        least = need_blocks or failed.free_blocks + 1
        if self._pool.n_free + self._pins.reclaimable_blocks() >= least:
            # Whoever asks next, and then tries: it is not futile.
            del self._futile[request_id]
            return False
        failed.most_blocks, failed.returns = most_blocks, self._returns
        return True

    def _end_stalled_staging(self, need_blocks: int, now_s: float) -> bool:
        """Where staging holds what the request lacks, and stands still, give that back; whether any was."""
        given = False
        while self.most_blocks < need_blocks <= self._pool.n_free + self._pins.kept_blocks:
            if not self._stager.cancel_one_stalled(now_s):
                break
            given = True
        return given
