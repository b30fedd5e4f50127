"""kvtier's counts in vLLM's own `/metrics`.

vLLM carries `Stats.take()` from the engine process to the API server as a `KVTierStats`, where
`KVTierPromMetrics` feeds Prometheus with the families of `kvtier.stats.METRICS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvtier.stats import METRICS, SEPARATOR

if TYPE_CHECKING:
    from collections.abc import Iterable


class KVTierStats(KVConnectorStats):
    """`Stats.take()` on its way through vLLM."""

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add `other`'s counts and samples; its gauges are newer."""
        for key, value in other.data.get("counters", {}).items():
            counters = self.data.setdefault("counters", {})
            counters[key] = counters.get(key, 0) + value
        self.data.setdefault("gauges", {}).update(other.data.get("gauges", {}))
        for key, values in other.data.get("samples", {}).items():
            self.data.setdefault("samples", {}).setdefault(key, []).extend(values)
        return self

    def reduce(self) -> dict[str, int | float]:
        """The counters, for vLLM's periodic log line."""
        return {key.replace(SEPARATOR, "."): v for key, v in self.data.get("counters", {}).items()}

    def is_empty(self) -> bool:
        """Whether there is nothing to tell: vLLM drops what is empty."""
        return not any(self.data.values())


class KVTierPromMetrics(KVConnectorPromMetrics):
    """Registers `METRICS` with vLLM's Prometheus registry and records what arrives."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        types = {
            "counter": metric_types[Counter],
            "gauge": metric_types[Gauge],
            "histogram": metric_types[Histogram],
        }
        self._families: dict[str, Any] = {}
        for name, metric in METRICS.items():
            kwargs: dict[str, Any] = (
                {"buckets": metric.buckets} if metric.kind == "histogram" else {}
            )
            if metric.kind == "gauge":
                kwargs["multiprocess_mode"] = "mostrecent"
            self._families[name] = types[metric.kind](
                name=f"vllm:kvtier_{name}",
                documentation=metric.help,
                labelnames=[*labelnames, *metric.labels],
                **kwargs,
            )

    def _child(self, key: str, engine_idx: int) -> Any:
        name, *labels = key.split(SEPARATOR)
        return self._families[name].labels(*self.per_engine_labelvalues[engine_idx], *labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Record one `Stats.take()`."""
        for key, value in transfer_stats_data.get("counters", {}).items():
            self._child(key, engine_idx).inc(value)
        for key, value in transfer_stats_data.get("gauges", {}).items():
            self._child(key, engine_idx).set(value)
        for key, values in transfer_stats_data.get("samples", {}).items():
            child = self._child(key, engine_idx)
            for value in _finite(values):
                child.observe(value)


def _finite(values: Iterable[float]) -> Iterable[float]:
    return (value for value in values if value == value and abs(value) != float("inf"))  # noqa: PLR0124
