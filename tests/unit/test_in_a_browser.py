"""A browser shows the documentation and the reports as they are meant.

Needs Chromium (Debian's package `chromium`) on the PATH.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtier.demo.report import render_html as demo_page
from tests.unit.browser import CHROMIUM, browser
from tests.unit.replay.test_report import page_of, two
from tests.unit.test_demo_report import report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.browser import Page

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")

IS_WIDE = "document.documentElement.scrollWidth > window.innerWidth"
SHOWN = "[...document.querySelectorAll('#decisions tbody tr')].filter(row => row.offsetHeight > 0)"


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder; says nothing."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path / "profile") as page:
        yield page
        assert page.problems == []


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield folder, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_demos_page(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "demo.html"
    file.write_text(demo_page(report()), encoding="utf-8")
    page.open(file.as_uri())
    assert page.requests == [file.as_uri()]
    assert not page.run(IS_WIDE)
    # Turns are drawn with a length, and the two programs' names stand beside them.
    assert page.run(
        "[...document.querySelectorAll('rect')].every(r => r.getBoundingClientRect().width > 0)"
    )
    drawn = page.run(
        "[...document.querySelectorAll('svg text')].filter(t => t.getBBox().width > 0).map(t => t.textContent)"
    )
    assert {"ada", "<bob>"} <= set(drawn)
    # The decisions of one program can be had alone.
    n_all = page.run(f"{SHOWN}.length")
    page.run(
        "(s => { s.value = 'ada'; s.dispatchEvent(new Event('change')) })(document.querySelector('#program'))"
    )
    programs = page.run(f"{SHOWN}.map(row => row.dataset.program)")
    assert 0 < len(programs) < n_all
    assert set(programs) == {"ada"}


def test_the_page_of_a_replay(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "replay.html"
    file.write_text(page_of(two()), encoding="utf-8")
    page.open(file.as_uri())
    assert page.requests == [file.as_uri()]
    assert not page.run(IS_WIDE)
    assert page.run("document.querySelectorAll('svg').length") > 0
    assert page.run("[...document.querySelectorAll('svg')].every(s => s.clientHeight > 0)")


def test_the_documentation(page: Page, served: tuple[Path, str]) -> None:
    folder, address = served
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for file in sorted(folder.rglob("index.html")):
        page.open(f"{address}/{file.relative_to(folder).parent.as_posix()}/".replace("/./", "/"))
        assert page.run("document.querySelector('article h1').getBoundingClientRect().height") > 0
        assert not page.run(IS_WIDE), file
    assert all(one.startswith((f"{address}/", "data:", "blob:")) for one in page.requests)
    # The search works, in a worker of its own.
    page.open(f"{address}/?q=aging_s")
    page.until("document.querySelector('.md-search-result__item a')")
    assert "configuration" in page.run(
        "[...document.querySelectorAll('.md-search-result__item a')].map(a => a.href).join(' ')"
    )
