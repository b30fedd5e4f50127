"""What the code says of each metric, for `docs/metrics.md`.

Each family has a heading and, below it, one line with what the code says of it; the rest of its section
is written by hand. `reference_pages.py` renews these lines and adds sections for families that have none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier.stats import METRICS

if TYPE_CHECKING:
    from kvtier.stats import Metric

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
PREFIX = "vllm:kvtier_"

_SECTION = re.compile(rf"^### `({PREFIX}\w+)`\n+(?:\*.*\n+)?", re.MULTILINE)


def exported_name(name: str) -> str:
    """Return a family's name as Prometheus shows it; a histogram's has `_bucket` and so on behind it."""
    return f"{PREFIX}{name}" + ("_total" if METRICS[name].kind == "counter" else "")


def facts(metric: Metric) -> str:
    """Return the line below a family's heading."""
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"*{metric.kind}{f' by {labels}' if labels else ''}*: {metric.help}\n"


def page(current: str) -> str:
    """Return the page with all lines of facts renewed and sections for new families at its end.

    Raises:
        ValueError: the page has a section of a family that does not exist.
    """
    families = {exported_name(name): metric for name, metric in METRICS.items()}
    stale = set(_SECTION.findall(current)) - set(families)
    if stale:
        raise ValueError(f"{PAGE.name} describes what is not exported: {', '.join(sorted(stale))}")

    def renewed(match: re.Match[str]) -> str:
        return f"### `{match[1]}`\n\n{facts(families[match[1]])}\n"

    text = _SECTION.sub(renewed, current)
    for name in families.keys() - set(_SECTION.findall(current)):
        text += f"\n### `{name}`\n\n{facts(families[name])}"
    return text.rstrip() + "\n"
