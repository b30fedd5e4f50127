"""Dashboard and alerts in a real Prometheus that scrapes kvtier's metric families.

Needs `promtool` and `prometheus` (Debian's package `prometheus` has both) on the PATH.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from kvtier.stats import METRICS
from tests.unit.deploy_queries import DEPLOY, RULES, VLLM_SERIES, queries

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMETHEUS = DEPLOY / "prometheus"
TIMEOUT_S = 60
LABEL_VALUES = {
    "event": ("pause", "return"),
    "cause": ("handoff", "pressure"),
    "source": ("gpu_pin", "gpu_cache", "cpu", "recomputed"),
    "kind": ("internal", "load_copy"),
    "direction": ("store", "load"),
}

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on the PATH")
prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus on the PATH"
)


def run_promtool(*arguments: str) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    run_promtool("check", "config", "prometheus.yml")
    run_promtool("check", "rules", "alerts.yml")


@promtool
def test_each_alert_fires_where_it_must_and_only_there() -> None:
    run_promtool("test", "rules", "alerts_test.yml")


class Engine:
    """A collector with a sample in every family, whose counters grow with every scrape."""

    def __init__(self) -> None:
        self.scrapes = 0

    def collect(self) -> Iterator[Any]:
        self.scrapes += 1
        for name, metric in METRICS.items():
            yield self._family(metric.kind, f"vllm:kvtier_{name}", metric.help, metric.labels)
        for series, name in VLLM_SERIES.items():
            suffix = series.removeprefix(name)
            kind = {"_total": "counter", "_bucket": "histogram"}.get(suffix, "gauge")
            yield self._family(kind, name, "vLLM's own.", ())

    def _family(self, kind: str, name: str, text: str, labels: tuple[str, ...]) -> Any:
        kinds: dict[str, Any] = {
            "counter": CounterMetricFamily,
            "gauge": GaugeMetricFamily,
            "histogram": HistogramMetricFamily,
        }
        family = kinds[kind](name, text, labels=["model_name", "engine", *labels])
        rows: list[tuple[str, ...]] = [("m", "0")]
        for label in labels:
            rows = [(*row, value) for row in rows for value in LABEL_VALUES.get(label, ("x",))]
        for row in rows:
            if kind == "histogram":
                buckets = [("0.1", 2 * self.scrapes), ("+Inf", 3 * self.scrapes)]
                family.add_metric(row, buckets, sum_value=float(self.scrapes))
            else:
                family.add_metric(row, 5 * self.scrapes)
        return family


class Server:
    """A Prometheus that scrapes an `Engine`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **parameters: str) -> Any:
        with urlopen(f"{self._url}{path}?{urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)

    def query(self, expr: str) -> list[Any]:
        answer = self.get("/api/v1/query", query=expr)
        assert answer["status"] == "success"
        result: list[Any] = answer["data"]["result"]
        return result


def wait_for(what: Any) -> Any:
    """Ask until there is an answer."""
    end_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end_s:
        try:
            if found := what():
                return found
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError(what)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("prometheus")
    # Prometheus does not tell which port it was given where it asks for any.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    http = _serve_as_vllm_does()
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / "alerts.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{http.server_port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with (folder / "log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            found = Server(f"http://127.0.0.1:{port}")
            # Two scrapes: a rate needs them.
            wait_for(lambda: found.query("rate(vllm:kvtier_decisions_total[1m]) > 0"))
            wait_for(lambda: found.get("/api/v1/rules")["data"]["groups"])
            yield found
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)
            http.shutdown()
            http.server_close()


def _serve_as_vllm_does() -> ThreadingHTTPServer:
    """Serve an `Engine` in the text format, whatever the scraper would rather have.

    prometheus_client's own server would negotiate OpenMetrics, in which its version 0.24 writes `vllm_` for `vllm:`.
    """
    registry = CollectorRegistry()
    registry.register(Engine())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.end_headers()
            self.wfile.write(generate_latest(registry))

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, daemon=True).start()
    return http


@prometheus
@pytest.mark.parametrize("where", queries())
def test_prometheus_understands_every_query_and_each_panel_gets_data(
    server: Server, where: str
) -> None:
    expr = queries()[where].replace("$__rate_interval", "1m")
    result = server.query(expr.replace("$model", ".*").replace("$instance", ".*"))
    if where.startswith("panel"):
        assert result


@prometheus
def test_prometheus_evaluates_every_alert(server: Server) -> None:
    def evaluated() -> list[Any] | None:
        rules = [r for g in server.get("/api/v1/rules")["data"]["groups"] for r in g["rules"]]
        return None if any(rule["health"] == "unknown" for rule in rules) else rules

    rules = wait_for(evaluated)
    assert {rule["name"]: rule["health"] for rule in rules} == {r["alert"]: "ok" for r in RULES}
    assert "firing" in {rule["state"] for rule in rules if rule["name"] == "KVTierInternalError"}
