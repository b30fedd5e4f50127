"""The workers' part of a step: copies on a virtual link instead of a GPU's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.outputs import KVConnectorOutput

from kvtier.metadata import KVTierWorkerMetadata
from kvtier.orders import Calibration, Order, OrderResult

if TYPE_CHECKING:
    from kvtier.replay.link import Direction, Link, Transfer
    from kvtier.replay.machine import Machine


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """A copy that a baseline orders.

    Attributes:
        direction: "store" or "load".
        request_id: For a load, the request that waits for it.
        n_bytes: Its size.
        tag: Comes back with the result.
    """

    direction: Direction
    request_id: str
    n_bytes: int
    tag: Any = None


class VirtualWorker:
    """Executes kvtier's copy orders, and those of baselines, on a `Link`.

    Args:
        machine: Whose link it is.
        link: The link.
        calibration: Told with the first step, as workers do when they have measured.
    """

    def __init__(self, machine: Machine, link: Link, calibration: Calibration | None) -> None:
        self._machine = machine
        self._link = link
        self._calibration = calibration
        self._step_id = 0
        self._failed: list[Order] = []

    def submit(self, metadata: Any, now_s: float) -> None:
        """Start a step's copies."""
        orders = getattr(metadata, "orders", None)
        if orders is not None:
            self._step_id = orders.step_id
            for order in (*orders.loads, *orders.stores):
                if order.generation:
                    self._link.start(order.direction, self._bytes_of(order), now_s, order)
                else:
                    self._failed.append(order)
        for copy in getattr(metadata, "copies", ()):
            self._link.start(copy.direction, copy.n_bytes, now_s, copy)

    def collect(self, now_s: float) -> tuple[KVConnectorOutput, list[CopyRequest]]:
        """What has ended: as a worker's connector reports it, and a baseline's copies."""
        output = KVConnectorOutput()
        results: list[OrderResult] = []
        loaded: set[str] = set()
        copies: list[CopyRequest] = []
        for order in self._failed:
            results.append(
                OrderResult(order.order_id, order.direction, False, 0, 0.0, 0, "refused")
            )
            if not order.request_id:
                continue
            loaded.add(order.request_id)
            output.invalid_block_ids.update(order.block_ids[order.skip_blocks :])
        self._failed = []
        for transfer in self._link.ended(now_s):
            what = transfer.what
            if isinstance(what, Order):
                results.append(_result(transfer, what, self._machine.block_bytes))
            else:
                copies.append(what)
            if transfer.direction == "load" and what.request_id:
                loaded.add(what.request_id)
        output.finished_recving = loaded or None
        output.kv_connector_worker_meta = KVTierWorkerMetadata(
            results, self._calibration, self._step_id
        )
        self._calibration = None
        return output, copies

    def _bytes_of(self, order: Order) -> int:
        chunks = sum(slot >= 0 for slot in order.slots[0])
        blocks = chunks * order.chunk_blocks - order.skip_blocks
        return max(0, blocks) * self._machine.block_bytes


def _result(transfer: Transfer, order: Order, run_bytes: int) -> OrderResult:
    return OrderResult(
        order.order_id, order.direction, True, transfer.n_bytes, transfer.seconds, run_bytes
    )
