"""Renews what documentation and dashboard say in the code's own words (make docs).

python scripts/reference_pages.py           # write what has changed
python scripts/reference_pages.py --check   # exit code 1 where something is not current
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import api_reference
import command_reference
import grafana_dashboard
import metrics_reference

from kvtier.cli import settings_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SETTINGS_PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

PAGES: dict[Path, Callable[[str], str]] = {
    api_reference.PAGE: api_reference.page,
    command_reference.PAGE: command_reference.page,
    metrics_reference.PAGE: metrics_reference.page,
    grafana_dashboard.PAGE: grafana_dashboard.page,
    SETTINGS_PAGE: lambda current: re.sub(
        r"^\| setting \|.*?(?=^(?!\|)|\Z)",
        lambda _: settings_reference(),
        current,
        count=1,
        flags=re.MULTILINE | re.DOTALL,
    ),
}
"""Each file that is written by code, at least in part, and what renews its text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Renew or check all pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    stale = False
    for path, renew in PAGES.items():
        current = path.read_text(encoding="utf-8") if path.exists() else ""
        wanted = renew(current)
        if wanted == current:
            continue
        stale = True
        if check:
            print(f"{path} is not current: run python scripts/reference_pages.py", file=sys.stderr)
        else:
            path.write_text(wanted, encoding="utf-8")
            print(f"renewed {path}")
    return int(stale and check)


if __name__ == "__main__":
    sys.exit(main())
