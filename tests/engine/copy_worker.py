"""The workers' part of a step: copy orders and their results, on symbolic KV."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from vllm.v1.outputs import KVConnectorOutput

from kvtier.metadata import KVTierWorkerMetadata
from kvtier.orders import OrderResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.symbolic_kv import SymbolicKV

Fate = tuple[int, bool]
"""How a copy order goes: steps until it ends (0: in its own step), and whether it succeeds."""


class CopyWorker:
    """Plays the workers' part: executes copy orders on symbolic KV, late and in any order.

    A store reads its blocks when it ends, the latest time at which a real copy may.

    Args:
        kv: What is copied; None to report only.
        fate: See `Drive`.
    """

    def __init__(self, kv: SymbolicKV | None, fate: Callable[[Any], Fate]) -> None:
        self._kv = kv
        self._fate = fate
        self._running: list[tuple[int, bool, Any]] = []
        self._step_id = 0
        self.done: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        """Whether copies have not ended."""
        return bool(self._running)

    def submit(self, metadata: Any) -> None:
        """Start a step's orders."""
        orders = getattr(metadata, "orders", None)
        if orders is None:
            return
        self._step_id = orders.step_id
        for order in (*orders.loads, *orders.stores):
            # An order of no region is one that must fail, see `orders.failing_load`.
            delay, ok = self._fate(order) if order.generation else (0, False)
            self._running.append((delay, ok, order))
            if order.generation:
                self._begin(order)

    def collect(self) -> KVConnectorOutput:
        """End the orders that are due, and report as `KVTierConnector` does in a worker."""
        due = [(ok, order) for delay, ok, order in self._running if delay <= 0]
        self._running = [(delay - 1, ok, o) for delay, ok, o in self._running if delay > 0]
        output = KVConnectorOutput()
        results = []
        loaded: set[str] = set()
        for due_ok, order in due:
            ok = due_ok and self._copy(order)
            self.done[f"{order.direction}_{'ok' if ok else 'failed'}"] += 1
            n_bytes = 1000 * len(order.block_ids)
            results.append(OrderResult(order.order_id, order.direction, ok, n_bytes, 1e-4, 1000))
            if order.direction == "load" and order.request_id:
                loaded.add(order.request_id)
                if not ok:
                    output.invalid_block_ids.update(order.block_ids[order.skip_blocks :])
        output.finished_recving = loaded or None
        output.kv_connector_worker_meta = KVTierWorkerMetadata(results, step_id=self._step_id)
        return output

    def _begin(self, order: Any) -> None:
        """A copy begins."""

    def _copy(self, order: Any) -> bool:
        """A copy ends; False where it fails after all."""
        if self._kv is not None:
            self._kv.copy(order)
        return True
