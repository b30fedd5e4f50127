"""What the documentation lists is what there is."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from kvtier.identity.request_params import RequestHints
from kvtier.stats import METRICS

DOCS = Path(__file__).parents[2] / "docs"


def rows(name: str) -> set[str]:
    """First column of the tables of a page, without the backticks."""
    lines = (DOCS / name).read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(" `") for line in lines if line.startswith("| `")}


def test_every_hint_and_every_metric_is_documented_and_no_other() -> None:
    hints = {field.name for field in fields(RequestHints)}
    metrics = {n + ("_total" if m.kind == "counter" else "") for n, m in METRICS.items()}
    assert rows("clients.md") == hints | metrics


@pytest.mark.parametrize("name", sorted(METRICS))
def test_the_text_of_a_metric_is_its_help(name: str) -> None:
    assert METRICS[name].help in (DOCS / "clients.md").read_text(encoding="utf-8")
