"""kvtier's orders and results inside vLLM's connector messages."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvtier.orders import Calibration, OrderResult, StepOrders


@dataclass
class KVTierMetadata(KVConnectorMetadata):
    """Scheduler to workers, once a step."""

    orders: StepOrders = field(default_factory=StepOrders)


@dataclass
class KVTierWorkerMetadata(KVConnectorWorkerMetadata):
    """Workers to scheduler: each worker's results of a step; vLLM aggregates over the workers.

    Sent for every step, so that the scheduler half knows how long each took.
    """

    results: list[OrderResult] = field(default_factory=list)
    calibration: Calibration | None = None
    step_id: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Join two workers' results; the scheduler half waits for all ranks of an order."""
        assert isinstance(other, KVTierWorkerMetadata)
        calibration = self.calibration or other.calibration
        step_id = max(self.step_id, other.step_id)
        return KVTierWorkerMetadata([*self.results, *other.results], calibration, step_id)
