"""Grafana's dashboard of kvtier, as `deploy/grafana/dashboard.json`; `reference_pages.py` writes the file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

PAGE = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "dashboard.json"

_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_GRID_WIDTH: Final = 24
_CHOSEN: Final = 'model_name=~"$model", instance=~"$instance"'
"""Label filter of every query: what the reader has chosen at the top."""
_SHARE_COLOURS: Final = (("red", None), ("yellow", 0.3), ("green", 0.6))


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL query; `legend` may name labels in double braces."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `unit` is Grafana's; `steps` are (colour, from this value on) of a `stat`."""

    title: str
    says: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    steps: tuple[tuple[str, float | None], ...] = (("text", None),)
    texts: tuple[tuple[str, str], ...] = ()


def _rate(name: str, by: str, labels: str = "", window: str = "$__rate_interval") -> str:
    chosen = f"{labels}, {_CHOSEN}" if labels else _CHOSEN
    return f"sum by ({by}) (rate(vllm:{name}{{{chosen}}}[{window}]))"


def _sum(name: str) -> str:
    return f"sum(vllm:{name}{{{_CHOSEN}}})"


def _quantiles(
    name: str, *quantiles: float, labels: str = "", by: str = "", of: str = ""
) -> tuple[Query, ...]:
    buckets = _rate(f"{name}_bucket", f"le, {by}" if by else "le", labels)
    prefix = f"{of} " if of else ""
    return tuple(
        Query(
            f"histogram_quantile({q}, {buckets})",
            f"{prefix}p{100 * q:g}" + (f" {{{{{by}}}}}" if by else ""),
        )
        for q in quantiles
    )


_PROMPT: Final = _rate("kvtier_prompt_tokens_total", "source")
_ALL_PROMPT: Final = _rate("kvtier_prompt_tokens_total", "model_name")
_KEPT_PROMPT: Final = _rate("kvtier_prompt_tokens_total", "model_name", 'source!="recomputed"')
_SPARED: Final = f"{_KEPT_PROMPT} / {_ALL_PROMPT}"

ROWS: Final[tuple[tuple[str, tuple[Panel, ...]], ...]] = (
    (
        "Now",
        (
            Panel(
                "CPU tier",
                "Whether the CPU tier answers. Away: kvtier only pins.",
                (Query(f"min(vllm:kvtier_tier_ready{{{_CHOSEN}}})"),),
                kind="stat",
                width=4,
                steps=(("red", None), ("green", 1)),
                texts=(("0", "away"), ("1", "ready")),
            ),
            Panel(
                "Mode",
                "Whether kvtier acts: the least of all engines.",
                (Query(f"min(vllm:kvtier_mode{{{_CHOSEN}}})"),),
                kind="stat",
                width=4,
                steps=(("red", None), ("yellow", 1), ("green", 2)),
                texts=(("0", "off"), ("1", "shadow"), ("2", "on")),
            ),
            Panel(
                "Prompt tokens not computed again",
                "Share of prompt tokens whose KV was found or loaded. New tokens have to be computed in any case.",
                (Query(_SPARED, "{{model_name}}"),),
                unit="percentunit",
                kind="stat",
                width=4,
                steps=_SHARE_COLOURS,
            ),
            Panel(
                "Programs",
                "Agents that the engines know.",
                (Query(_sum("kvtier_programs")),),
                kind="stat",
                width=4,
            ),
            Panel(
                "Pinned",
                "GPU memory that waits for agents.",
                (Query(_sum("kvtier_pinned_bytes")),),
                unit="bytes",
                kind="stat",
                width=4,
            ),
            Panel(
                "Failures in an hour",
                "Each of them ended in a recomputation, none in a failed request.",
                (
                    Query(
                        f"sum(increase(vllm:kvtier_failures_total{{{_CHOSEN}}}[1h])) or vector(0)"
                    ),
                ),
                kind="stat",
                width=4,
                steps=(("green", None), ("yellow", 1), ("red", 100)),
            ),
        ),
    ),
    (
        "Where prompt tokens come from",
        (
            Panel(
                "Prompt tokens by source",
                "gpu_pin: kept by kvtier. gpu_cache: vLLM's own prefix cache. cpu: loaded. recomputed: computed, new "
                "tokens included.",
                (Query(_PROMPT, "{{source}}"),),
                unit="short",
                width=12,
                stacked=True,
            ),
            Panel(
                "Share not computed again",
                "The rest is new tokens and KV that was lost.",
                (Query(_SPARED, "{{model_name}}"),),
                unit="percentunit",
                width=6,
            ),
            Panel(
                "Time to first token",
                "vLLM's own measure, of all requests.",
                _quantiles("time_to_first_token_seconds", 0.5, 0.99),
                unit="s",
                width=6,
            ),
        ),
    ),
    (
        "Decisions",
        (
            Panel(
                "Pauses: where the KV waits",
                "What is done at the end of a turn.",
                (Query(_rate("kvtier_decisions_total", "action", 'event="pause"'), "{{action}}"),),
                unit="ops",
                stacked=True,
            ),
            Panel(
                "Pauses: why",
                "docs/metrics.md explains each reason.",
                (Query(_rate("kvtier_decisions_total", "reason", 'event="pause"'), "{{reason}}"),),
                unit="ops",
                stacked=True,
            ),
            Panel(
                "Scheduler's time of a decision",
                "What kvtier takes of the scheduler's thread.",
                _quantiles("kvtier_decision_seconds", 0.5, 0.99, by="event"),
                unit="s",
            ),
            Panel(
                "Returns: where the KV comes from",
                "Only returns of which the CPU tier holds more than the GPU.",
                (Query(_rate("kvtier_decisions_total", "action", 'event="return"'), "{{action}}"),),
                unit="ops",
                stacked=True,
            ),
            Panel(
                "Returns: why",
                "link_busy for long: too many loads for the link.",
                (Query(_rate("kvtier_decisions_total", "reason", 'event="return"'), "{{reason}}"),),
                unit="ops",
                stacked=True,
            ),
            Panel(
                "Commands",
                "Of operators and clients, by what became of them.",
                (
                    Query(
                        _rate("kvtier_commands_total", "command, outcome"),
                        "{{command}}: {{outcome}}",
                    ),
                ),
                unit="ops",
            ),
        ),
    ),
    (
        "Tiers and pins",
        (
            Panel(
                "GPU blocks kept",
                "By pins, and by copies that read them at the moment.",
                (
                    Query(_sum("kvtier_pinned_blocks"), "pins"),
                    Query(_sum("kvtier_held_blocks"), "copies"),
                ),
            ),
            Panel(
                "KV memory in use",
                "vLLM's own measure. Pinned blocks count as used, and yield to requests.",
                (Query(f"vllm:kv_cache_usage_perc{{{_CHOSEN}}}", "{{instance}} {{engine}}"),),
                unit="percentunit",
            ),
            Panel(
                "How pins end",
                "handoff: the agent came back and found its KV. pressure: a request needed the memory.",
                (Query(_rate("kvtier_pin_releases_total", "cause"), "{{cause}}"),),
                unit="ops",
                stacked=True,
            ),
            Panel(
                "CPU tier answers",
                "1 while it does.",
                (Query(f"vllm:kvtier_tier_ready{{{_CHOSEN}}}", "{{instance}} {{engine}}"),),
            ),
            Panel(
                "Tokens staged and prefetched",
                "What the CPU tier has confirmed to hold, and what came back before its program did.",
                (
                    Query(_rate("kvtier_staged_tokens_total", "model_name"), "staged"),
                    Query(_rate("kvtier_prefetched_tokens_total", "model_name"), "prefetched"),
                ),
            ),
            Panel(
                "Prefetches",
                "Asked for, by what became of the question; and how they ended.",
                (
                    Query(
                        _rate("kvtier_prefetches_total", "outcome, reason"),
                        "{{outcome}}: {{reason}}",
                    ),
                    Query(_rate("kvtier_prefetch_ends_total", "reason"), "ended: {{reason}}"),
                ),
                unit="ops",
            ),
        ),
    ),
    (
        "Link",
        (
            Panel(
                "Bytes copied",
                "To the CPU tier at pauses, back at returns.",
                (
                    Query(_rate("kvtier_staged_bytes_total", "model_name"), "to CPU"),
                    Query(_rate("kvtier_loaded_bytes_total", "model_name"), "to GPU"),
                ),
                unit="Bps",
            ),
            Panel(
                "Time of a copy",
                "A returning turn waits for its load.",
                _quantiles("kvtier_copy_seconds", 0.5, 0.99, by="direction"),
                unit="s",
            ),
            Panel(
                "Programs being staged",
                "Steady growth: link or tier do not keep up.",
                (Query(_sum("kvtier_staging_jobs"), "programs"),),
            ),
        ),
    ),
    (
        "TTL and gap predictions",
        (
            Panel(
                "TTL of pins",
                "As chosen at the pause.",
                _quantiles("kvtier_ttl_seconds", 0.1, 0.5, 0.9),
                unit="s",
                width=6,
            ),
            Panel(
                "Gaps",
                "From the end of a turn to the program's return.",
                _quantiles("kvtier_gap_seconds", 0.1, 0.5, 0.9),
                unit="s",
                width=6,
            ),
            Panel(
                "Actual over predicted gap",
                "Half of them should be below 1.",
                _quantiles("kvtier_gap_prediction_ratio", 0.1, 0.5, 0.9),
                width=6,
            ),
            Panel(
                "Actual over predicted time of a load",
                "Near 1. Above 2 for long: have the link measured anew (Calibrate).",
                _quantiles("kvtier_reload_prediction_ratio", 0.5, 0.9),
                width=6,
            ),
        ),
    ),
    (
        "Failures",
        (
            Panel(
                "Failures by kind",
                "docs/metrics.md says what each kind asks of you.",
                (Query(_rate("kvtier_failures_total", "kind"), "{{kind}}"),),
                unit="ops",
                width=16,
                stacked=True,
            ),
            Panel(
                "kvtier has given up in",
                "Engines in which a bug of kvtier's has turned it off until they restart.",
                (
                    Query(
                        f'vllm:kvtier_failures_total{{kind="internal", {_CHOSEN}}}',
                        "{{instance}} {{engine}}",
                    ),
                ),
            ),
        ),
    ),
    (
        "Queue",
        (
            Panel(
                "Predicted delay of a request that comes now",
                "Beyond what you accept: overload.",
                (
                    Query(
                        f"vllm:kvtier_queue_delay_seconds{{{_CHOSEN}}}", "{{instance}} {{engine}}"
                    ),
                ),
                unit="s",
                width=6,
            ),
            Panel(
                "Requests",
                "vLLM's own counts.",
                (
                    Query(_sum("num_requests_running"), "running"),
                    Query(_sum("num_requests_waiting"), "waiting"),
                ),
                width=6,
            ),
            Panel(
                "Passed over",
                "Waiting requests passed over in a step, so many a second.",
                (Query(_rate("kvtier_deferrals_total", "reason"), "{{reason}}"),),
                unit="ops",
                width=6,
                stacked=True,
            ),
            Panel(
                "Preemptions",
                "vLLM's own count.",
                (Query(_rate("num_preemptions_total", "model_name"), "{{model_name}}"),),
                unit="ops",
                width=6,
            ),
        ),
    ),
)


def page(current: str) -> str:  # noqa: ARG001 - everything in the file is written here
    """Return the dashboard as JSON."""
    return json.dumps(dashboard(), indent=2) + "\n"


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": _GRID_WIDTH, "x": 0, "y": y},
                "panels": [],
            }
        )
        y, x = y + 1, 0
        for panel in row:
            height = 4 if panel.kind == "stat" else 8
            if x + panel.width > _GRID_WIDTH:
                x, y = 0, y + height
            position = {"h": height, "w": panel.width, "x": x, "y": y}
            panels.append(_panel(panel, len(panels) + 1, position))
            x += panel.width
        y += height
    return {
        "uid": "kvtier",
        "title": "kvtier",
        "description": "Where the KV cache of agents waits, and what that saves. Metrics: docs/metrics.md.",
        "tags": ["kvtier", "vllm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "timezone": "",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _variables() -> list[dict[str, Any]]:
    source = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {"selected": True, "text": "default", "value": "default"},
        "hide": 0,
        "refresh": 1,
        "regex": "",
    }
    return [source, _of_label("model", "model_name"), _of_label("instance", "instance")]


def _of_label(name: str, label: str) -> dict[str, Any]:
    query = f"label_values(vllm:kvtier_mode, {label})"
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "includeAll": True,
        # Engines that have served nothing yet have no series to list, and are not left out either.
        "allValue": ".*",
        "multi": True,
        "hide": 0,
        "refresh": 2,
        "sort": 1,
    }


def _panel(panel: Panel, number: int, position: dict[str, int]) -> dict[str, Any]:
    is_stat = panel.kind == "stat"
    thresholds = [{"color": colour, "value": value} for colour, value in panel.steps]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": thresholds},
        "mappings": [],
    }
    if panel.texts:
        options = {value: {"text": text} for value, text in panel.texts}
        defaults["mappings"] = [{"type": "value", "options": options}]
    if not is_stat:
        defaults["min"] = 0
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 5,
            "showPoints": "never",
            "stacking": {"group": "A", "mode": "normal" if panel.stacked else "none"},
        }
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend or "__auto",
            "instant": is_stat,
            "range": not is_stat,
        }
        for index, query in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.says,
        "datasource": _SOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _stat_options() if is_stat else _graph_options(),
        "targets": targets,
    }


def _stat_options() -> dict[str, Any]:
    return {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "textMode": "auto",
        "orientation": "auto",
        "wideLayout": True,
        "showPercentChange": False,
        "percentChangeColorMode": "standard",
    }


def _graph_options() -> dict[str, Any]:
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
