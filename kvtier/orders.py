"""What the scheduler half asks of the worker half in one step, and what it hears back.

Plain picklable dataclasses: they cross a process boundary inside vLLM's connector metadata.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtier.backend import Region

Direction = Literal["store", "load"]
TRAILER_BYTES = 64
"""Behind a chunk in its slot, where chunks are checked: see `copies.checksums`. A line of the cache."""


@dataclass(frozen=True, slots=True)
class Order:
    """Copy KV between GPU blocks and slots of the shared region.

    Attributes:
        order_id: Unique in this engine.
        direction: "store" copies blocks to slots, "load" slots to blocks.
        request_id: For a load, the request that waits for it; empty where none does, and vLLM is told
            nothing of it: a prefetch.
        block_ids: GPU blocks, `chunk_blocks` for each chunk, in token order.
        slots: For each rank, one byte offset a chunk; -1 means "not this chunk" (it is there already).
        chunk_blocks: Blocks a chunk.
        skip_blocks: Leading blocks that a load must not write: they hold valid KV that others may read.
        generation: The region's generation that the offsets belong to.
        deadline_s: Monotonic time after which the order must not touch memory any more.
        keys: Key of each chunk, one after the other.
    """

    order_id: int
    direction: Direction
    request_id: str
    block_ids: tuple[int, ...]
    slots: list[list[int]]
    chunk_blocks: int
    skip_blocks: int
    generation: str
    deadline_s: float
    keys: bytes = b""


def failing_load(request_id: str, block_ids: Sequence[int]) -> Order:
    """A load that every worker refuses: vLLM computes what it waits for. It belongs to no region."""
    return Order(
        order_id=0,
        direction="load",
        request_id=request_id,
        block_ids=tuple(block_ids),
        slots=[],
        chunk_blocks=1,
        skip_blocks=0,
        generation="",
        deadline_s=0.0,
    )


@dataclass(slots=True)
class StepOrders:
    """Orders of one step, and the region they point into.

    Attributes:
        step_id: Names the step in the workers' report; 0 where nobody waits for one.
        measure: Measure the link anew, which takes seconds: an operator has asked for it.
        cancels: Loads that nobody waits for any more, of this step or earlier ones. They still end in
            a result.
    """

    region: Region | None = None
    loads: list[Order] = field(default_factory=list)
    stores: list[Order] = field(default_factory=list)
    step_id: int = 0
    measure: bool = False
    cancels: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class OrderResult:
    """How an order ended on one worker.

    Attributes:
        n_bytes: Bytes copied by this worker.
        seconds: Time the copy took, without waiting in line.
        run_bytes: Mean length of the contiguous runs it was made of.
        spoilt_key: Of the first chunk that a load has brought otherwise than it was stored; empty where there
            is none.
    """

    order_id: int
    direction: Direction
    ok: bool
    n_bytes: int
    seconds: float
    run_bytes: int
    error: str = ""
    spoilt_key: bytes = b""

    @property
    def cause(self) -> Literal["copy", "integrity"]:
        """Of a failure: the copy, or what it has brought."""
        return "integrity" if self.spoilt_key else "copy"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured or remembered speeds of this machine and model.

    Attributes:
        store: Latency in seconds and (run_bytes, bytes_per_s) points, GPU blocks to slots.
        load: The same for slots to GPU blocks.
        prefill: (cached_tokens, new_tokens, seconds) samples of earlier runs.
        profile_path: Where the scheduler half saves what it learns; empty to save nothing.
        measured_s: When the link was measured, Unix time; None: not known.
    """

    store: tuple[float, tuple[tuple[int, float], ...]]
    load: tuple[float, tuple[tuple[int, float], ...]]
    prefill: tuple[tuple[int, int, float], ...]
    profile_path: str
    measured_s: float | None = None


def merge_results(results: list[OrderResult]) -> OrderResult:
    """One order's results from all ranks: they ran side by side, and one failure fails it."""
    # What is not as it was stored must not be read again, whatever else has failed.
    failures = sorted((r for r in results if not r.ok), key=lambda r: not r.spoilt_key)
    failed = failures[0] if failures else None
    return OrderResult(
        results[0].order_id,
        results[0].direction,
        failed is None,
        sum(r.n_bytes for r in results),
        max(r.seconds for r in results),
        results[0].run_bytes,
        failed.error if failed else "",
        failed.spoilt_key if failed else b"",
    )


class WorkerReport(Protocol):
    """What workers send back after a step."""

    results: list[OrderResult]
    calibration: Calibration | None
    step_id: int


class OrderIds:
    """Ids of copy orders, unique in an engine."""

    def __init__(self) -> None:
        self._last = 0

    def take(self) -> int:
        """A new id."""
        self._last += 1
        return self._last
