"""What kvtier counts.

The scheduler half counts into `Stats`; `kvtier.metrics` carries `Stats.take()` to vLLM's `/metrics`.
`METRICS` is the one list of names. Labels are closed sets (reasons, causes, kinds): never session ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_FINE_SECONDS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
_RATIO = (0.1, 0.2, 0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family, exported as `vllm:kvtier_<name>`."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    "decisions": Metric(
        "counter", "Decisions by event, action and reason.", ("event", "action", "reason")
    ),
    "pin_releases": Metric("counter", "Pins ended, by cause.", ("cause",)),
    "prompt_tokens": Metric(
        "counter",
        "Prompt tokens by where their KV came from: gpu_pin, gpu_cache, cpu, recomputed.",
        ("source",),
    ),
    "staged_bytes": Metric("counter", "Bytes copied from GPU blocks to the CPU tier."),
    "loaded_bytes": Metric("counter", "Bytes copied from the CPU tier to GPU blocks."),
    "staged_tokens": Metric("counter", "Tokens whose KV the CPU tier has confirmed to hold."),
    "failures": Metric("counter", "What went wrong; every one ended in recompute.", ("kind",)),
    "prefetches": Metric(
        "counter",
        "Prefetches asked for, by what became of the question and why.",
        ("outcome", "reason"),
    ),
    "prefetch_ends": Metric("counter", "Prefetches that ended, by why.", ("reason",)),
    "prefetched_tokens": Metric("counter", "Tokens whose KV was loaded before their program came."),
    "commands": Metric(
        "counter",
        "Commands of operators and clients, by what became of them.",
        ("command", "outcome"),
    ),
    "deferrals": Metric(
        "counter", "Waiting requests passed over in a step, by reason.", ("reason",)
    ),
    "programs": Metric("gauge", "Programs known to this engine."),
    "pinned_blocks": Metric("gauge", "GPU blocks kept by pins."),
    "pinned_bytes": Metric("gauge", "GPU bytes kept by pins, of all ranks."),
    "held_blocks": Metric("gauge", "GPU blocks kept by running copies."),
    "staging_jobs": Metric("gauge", "Programs being staged now."),
    "tier_ready": Metric("gauge", "1 while the CPU tier answers, else 0."),
    "mode": Metric("gauge", "0 off, 1 shadow, 2 on."),
    "queue_delay_seconds": Metric("gauge", "Predicted delay of a request that arrives now."),
    "copy_seconds": Metric("histogram", "Duration of one copy order.", ("direction",), _SECONDS),
    "ttl_seconds": Metric("histogram", "TTL chosen for pins.", (), _SECONDS),
    "gap_seconds": Metric(
        "histogram", "Time from a turn's end to the program's return.", (), _SECONDS
    ),
    "gap_prediction_ratio": Metric(
        "histogram", "Actual gap over the predicted median.", (), _RATIO
    ),
    "reload_prediction_ratio": Metric(
        "histogram", "Measured over predicted reload time.", (), _RATIO
    ),
    "decision_seconds": Metric(
        "histogram", "Scheduler-thread time of one decision.", ("event",), _FINE_SECONDS
    ),
}

SEPARATOR = "|"

TAKE_INTERVAL_S = 1.0
MAX_SAMPLES = 10_000
"""Most samples of one histogram between two `take`s: an engine may run without anybody taking them."""


class Stats:
    """Counts since the last `take`, and current gauges."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._samples: dict[str, list[float]] = {}
        self.totals: dict[str, float] = {}
        self.read_gauges: Callable[[], None] | None = None
        self._is_due = False
        self._next_take_s = -math.inf

    def count(self, name: str, value: float = 1, *labels: str) -> None:
        """Add to a counter; `labels` in the order of `METRICS`."""
        self._is_due = True
        self.count_quietly(name, value, *labels)

    def count_quietly(self, name: str, value: float = 1, *labels: str) -> None:
        """Add to a counter; taken with the next that is counted aloud. For what comes in every step."""
        key = SEPARATOR.join((name, *labels))
        self._counters[key] = self._counters.get(key, 0) + value
        self.totals[key] = self.totals.get(key, 0) + value

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._gauges[name] = value

    def sample(self, name: str, value: float, *labels: str) -> None:
        """Add to a histogram, up to `MAX_SAMPLES`."""
        self._is_due = True
        values = self._samples.setdefault(SEPARATOR.join((name, *labels)), [])
        if len(values) < MAX_SAMPLES:
            values.append(value)

    def due(self) -> None:
        """Let the next `take` carry the gauges even if nothing was counted."""
        self._is_due = True

    def take(self, busy_at_s: float = float("inf")) -> dict[str, Any]:
        """What has come since the last call; empty when nothing has. Gauges are read here.

        Args:
            busy_at_s: The time, where more calls will follow: only one a second gives something.
        """
        if not self._is_due or busy_at_s < self._next_take_s:
            return {}
        if math.isfinite(busy_at_s):
            self._next_take_s = busy_at_s + TAKE_INTERVAL_S
        self._is_due = False
        if self.read_gauges is not None:
            self.read_gauges()
        data = {"counters": self._counters, "gauges": dict(self._gauges), "samples": self._samples}
        self._counters, self._samples = {}, {}
        return data
