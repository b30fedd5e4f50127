"""What the documentation lists is what there is, and the site can be built from it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvtier.config import Settings
from kvtier.frontend.clients import Source
from kvtier.gpu_pin import ReleaseCause
from kvtier.identity.request_params import RequestHints
from kvtier.middleware import NAMED
from kvtier.policy import RETURN_REASONS
from kvtier.stats import METRICS
from kvtier.ttl.holding import HoldReason
from tests.unit.control.control_host import Host

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
METRICS_PAGE = (DOCS / "metrics.md").read_text(encoding="utf-8")
KINDS = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


def rows(text: str) -> set[str]:
    """First column of the tables of a page, without the backticks."""
    lines = text.splitlines()
    return {line.split("|")[1].strip(" `") for line in lines if line.startswith("| `")}


def section(heading: str) -> str:
    """A section of the page on metrics, without its heading."""
    return METRICS_PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_every_hint_is_documented() -> None:
    page = (DOCS / "clients.md").read_text(encoding="utf-8")
    assert {field.name for field in fields(RequestHints)} <= rows(page)


def test_what_code_writes_into_pages_is_current() -> None:
    """`python scripts/reference_pages.py` (make docs) writes it."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "reference_pages.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def families() -> Iterator[tuple[str, str]]:
    """Name of each family as Prometheus gets it, and what is written of it by hand."""
    for part in METRICS_PAGE.split("\n### ")[1:]:
        heading, _, rest = part.partition("\n")
        told = rest.partition("\n## ")[0].strip()
        yield heading.strip("`"), told.partition("\n\n")[2].strip()


def test_every_metric_has_a_section_by_the_name_that_prometheus_gets() -> None:
    registry = CollectorRegistry()
    for name, metric in METRICS.items():
        KINDS[metric.kind](f"vllm:kvtier_{name}", metric.help, registry=registry)
    types = re.findall(
        r"^# TYPE (\S+) (?!gauge$|.*_created)", generate_latest(registry).decode(), re.MULTILINE
    )
    gauges = [f"vllm:kvtier_{name}" for name, m in METRICS.items() if m.kind == "gauge"]
    named = [name for name, _ in families()]
    assert sorted(named) == sorted({*types, *gauges})


@pytest.mark.parametrize(("name", "told"), list(families()))
def test_every_metric_says_what_it_answers_and_when_to_worry(name: str, told: str) -> None:
    assert re.search(r"\bWorry when\b|No reason to worry", told) or name == (
        "vllm:kvtier_failures_total"
    )


def test_reasons_causes_and_sources_are_those_of_the_code() -> None:
    reasons = {str(reason) for reason in HoldReason} | RETURN_REASONS
    assert rows(section("Reasons")) >= reasons
    pins = section("Pins")
    assert {cause for cause in ReleaseCause if f"`{cause}`" not in pins} == set()


def test_the_control_servers_own_metrics_are_documented(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        found = set()
        for family in host.server.metrics.registry.collect():
            found.add(family.name + ("_total" if family.type == "counter" else ""))
    assert rows(section("The control server's own")) == found


def test_the_middlewares_counter_and_its_sources_are_documented() -> None:
    (family,) = NAMED.collect()
    assert rows(section("The middleware's own")) == {f"{family.name}_total", *get_args(Source)}


def test_settings_that_pages_name_exist() -> None:
    known = set(Settings.model_fields)
    for page in ("operating.md", "security.md", "tuning.md", "how-it-works.md", "metrics.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        named = set(re.findall(r"`(control_[a-z_]+|[a-z_]+_(?:gb|s|fraction|budget)|tier)`", text))
        assert named <= known | {"tenant_budget", "pin_budget"}, page


def test_the_tests_that_show_features_exist() -> None:
    page = (DOCS / "features.md").read_text(encoding="utf-8")
    tests = ROOT / "tests"
    shown = set(re.findall(r"`((?:unit/)?test_\w+\.py)`(?: `(Test\w+)`)?", page))
    assert len(shown) > 10
    for file, group in shown:
        path = tests / file if file.startswith("unit/") else tests / "engine" / file
        assert path.is_file(), file
        assert f"class {group}:" in path.read_text(encoding="utf-8") or not group


def test_the_site_builds_without_a_warning_and_asks_nobody_else_for_anything(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("index.html"))
    assert len(pages) == len(list(DOCS.glob("*.md")))
    fetched = r'<(?:script|img|link rel="(?:stylesheet|icon|preload|preconnect)")[^>]*"(https?:)?//'
    for page in pages:
        assert not re.search(fetched, page.read_text(encoding="utf-8")), page
