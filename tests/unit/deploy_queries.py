"""What `deploy/` asks of Prometheus: the queries of dashboard and alerts, and the series that there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kvtier.stats import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
ALERTS_TEST = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text("utf-8"))
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
LABELS_OF_ALL = {"model_name", "engine", "instance", "job", "le"}

VLLM_SERIES = {
    "vllm:kv_cache_usage_perc": "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total": "vllm:num_preemptions",
    "vllm:num_requests_running": "vllm:num_requests_running",
    "vllm:num_requests_waiting": "vllm:num_requests_waiting",
    "vllm:request_success_total": "vllm:request_success",
    "vllm:time_to_first_token_seconds_bucket": "vllm:time_to_first_token_seconds",
}
"""Series of vLLM's own that may be asked for, and their families' names in its code."""

KVTIER_SERIES = {
    f"vllm:kvtier_{name}{suffix}": metric
    for name, metric in METRICS.items()
    for suffix in SUFFIXES[metric.kind]
}


def panels() -> Iterator[dict[str, Any]]:
    """All panels but rows."""
    return (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def queries() -> dict[str, str]:
    """Every PromQL expression by where it stands."""
    found = {
        f"panel {panel['title']!r} {target['refId']}": target["expr"]
        for panel in panels()
        for target in panel["targets"]
    }
    return found | {f"alert {rule['alert']}": rule["expr"] for rule in RULES}
