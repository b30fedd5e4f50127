"""How many of those that wait could all start at once: among them no order is needed.

vLLM may ask for waiting requests in another order than theirs. One that is asked for before an older one, and is held
back for its sake, is not asked again in this step: of many, one or two a step would start, however much room there is.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.admission_facts import AdmissionView, Key, Waiting

Order = tuple[int, float, int]


def last_of_front(
    heap: Sequence[tuple[Order, Waiting[Key]]],
    competes: Callable[[Waiting[Key]], bool],
    view: AdmissionView,
    *,
    spare_blocks: int,
    before: Waiting[Key] | None = None,
) -> Order | None:
    """The place of the last of those that fit all together, in the order of a heap; None: nobody does.

    Takes O(k log k) for a front of k requests.

    Args:
        heap: Who waits, the first in order at its top.
        competes: Whether one of them counts; those who do not are passed over.
        view: What there is room for.
        spare_blocks: Blocks of memory that are not to be counted on.
        before: Counts as the very first.
    """
    places, compute_blocks = view.open_places, view.step_blocks
    memory_blocks = view.free_blocks + view.pinned_blocks - spare_blocks
    last = None
    if min(places, compute_blocks, memory_blocks) <= 0:
        return last
    ahead = [(heap[0][0], 0)] if heap else []
    entries = [before] if before is not None else []
    while ahead or entries:
        if entries:
            entry = entries.pop()
        else:
            _, at = heapq.heappop(ahead)
            entry = heap[at][1]
            for child in range(2 * at + 1, min(2 * at + 3, len(heap))):
                heapq.heappush(ahead, (heap[child][0], child))
            if entry.gone or not competes(entry):
                continue
        places -= 1
        compute_blocks -= entry.needed_blocks
        memory_blocks -= max(entry.context_blocks, entry.needed_blocks)
        if min(places, compute_blocks, memory_blocks) < 0:
            break
        if entry is not before:
            last = entry.order
    return last
