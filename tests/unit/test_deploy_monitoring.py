"""Dashboard and alerts: what they ask of Prometheus exists, and what they are tested with is complete.

Where `promtool` and `prometheus` are on the PATH, they have the last word (`test_deploy_prometheus.py`).
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from kvtier.gpu_pin import ReleaseCause
from kvtier.stats import METRICS
from tests.unit.deploy_queries import (
    ALERTS_TEST,
    DASHBOARD,
    DEPLOY,
    KVTIER_SERIES,
    LABELS_OF_ALL,
    RULES,
    VLLM_SERIES,
    panels,
    queries,
)
from tests.unit.grafana_types import Dashboard

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("where", queries())
def test_every_query_asks_for_series_and_labels_that_exist(where: str) -> None:
    expr = queries()[where]
    series = set(re.findall(r"vllm:\w+", expr))
    assert series, "a query of nothing"
    assert series <= KVTIER_SERIES.keys() | VLLM_SERIES.keys()
    known = {"finished_reason"}.union(
        LABELS_OF_ALL,
        *(KVTIER_SERIES[name].labels for name in series if name in KVTIER_SERIES),
    )
    grouped = {
        label.strip()
        for labels in re.findall(r"\b(?:by|on|without|ignoring) \(([^)]*)\)", expr)
        for label in labels.split(",")
    }
    matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expr))
    assert grouped | matched <= known


def test_causes_that_queries_name_are_causes() -> None:
    named = set(re.findall(r'cause="(\w+)"', " ".join(queries().values())))
    assert named
    assert named <= set(ReleaseCause)


def test_series_of_vllms_are_in_the_installed_vllm() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    loggers = Path(spec.origin).parent / "v1" / "metrics" / "loggers.py"
    text = loggers.read_text(encoding="utf-8")
    assert {name for name in VLLM_SERIES.values() if f'"{name}"' not in text} == set()


def test_every_metric_is_on_the_dashboard() -> None:
    asked = set(re.findall(r"vllm:kvtier_\w+", " ".join(queries().values())))
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}
    assert families == {f"vllm:kvtier_{name}" for name in METRICS}


def test_the_dashboard_can_be_imported_and_provisioned() -> None:
    assert DASHBOARD["uid"] == "kvtier"
    # An `id` is the database's of one Grafana.
    assert "id" not in DASHBOARD
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert next(iter(variables)) == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    used = set(re.findall(r"\$(\w+)", " ".join(queries().values())))
    assert used - {"__rate_interval"} <= variables.keys()


def test_the_dashboard_has_what_grafanas_model_has_and_nothing_else() -> None:
    msgspec.convert(DASHBOARD, Dashboard)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda panel: panel.update(unit="s"), "unknown field `unit`"),
        (lambda panel: panel.pop("gridPos"), "missing required field `gridPos`"),
        (lambda panel: panel.update(type="graph"), "'graph'"),
        (lambda panel: panel["fieldConfig"]["defaults"].pop("unit"), "required field `unit`"),
        (lambda panel: panel["gridPos"].update(w=25), "gridPos.w"),
        (lambda panel: panel["targets"][0].pop("datasource"), "required field `datasource`"),
        (lambda panel: panel["targets"].clear(), "targets"),
    ],
)
def test_what_grafanas_model_does_not_have_is_found(
    change: Callable[[dict[str, Any]], None], says: str
) -> None:
    dashboard = copy.deepcopy(DASHBOARD)
    change(next(panel for panel in dashboard["panels"] if panel["type"] == "timeseries"))
    with pytest.raises(msgspec.ValidationError, match=says):
        msgspec.convert(dashboard, Dashboard)


def test_panels_have_ids_of_their_own_an_explanation_and_the_chosen_data_source() -> None:
    ids = Counter(panel["id"] for panel in DASHBOARD["panels"])
    assert max(ids.values()) == 1
    for panel in panels():
        assert panel["description"], panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {source["uid"] for source in sources} == {"${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_panels_do_not_overlap_nor_leave_the_grid() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_every_stat_has_its_steps_in_order() -> None:
    for panel in panels():
        values = [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]
        assert values[0] is None
        assert all(a < b for a, b in pairwise(values[1:]))


def test_every_alert_says_how_bad_it_is_what_happened_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert "instance" in rule["annotations"]["summary"], rule["alert"]
        assert rule["annotations"]["description"], rule["alert"]


def test_every_alert_is_tested_to_fire_beside_an_instance_that_does_not() -> None:
    firing = {
        test["alertname"]: test["exp_alerts"]
        for one in ALERTS_TEST["tests"]
        for test in one["alert_rule_test"]
        if test.get("exp_alerts")
    }
    assert firing.keys() == {rule["alert"] for rule in RULES}
    for name, alerts in firing.items():
        severity = next(rule["labels"]["severity"] for rule in RULES if rule["alert"] == name)
        assert [alert["exp_labels"]["severity"] for alert in alerts] == [severity]
    for one in ALERTS_TEST["tests"]:
        series = " ".join(item["series"] for item in one["input_series"])
        assert len(set(re.findall(r'instance="([\w-]+)"', series))) > 1, one["name"]


def test_alerts_that_docs_name_exist() -> None:
    named = set()
    for page in (DEPLOY.parent / "docs").glob("*.md"):
        named |= set(re.findall(r"\bKVTier[A-Z]\w+", page.read_text(encoding="utf-8")))
    classes = {"KVTierConnector", "KVTierClient", "KVTierMiddleware", "KVTierError"}
    alerts = {rule["alert"] for rule in RULES}
    assert {name for name in named if name in alerts}
    assert {
        name for name in named - alerts if re.search(r"(Lost|Error|Slow|Full)$", name)
    } <= classes
