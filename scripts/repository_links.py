"""A hook of mkdocs: links from pages to files of the repository that are no pages.

In the repository such a link leads to the file; on the site, which has no copy of it, the file's path takes the
link's place. A path that does not exist stops the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Replace the links of one page.

    Raises:
        PluginError: a link leads nowhere.
    """
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def replaced(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if not target.exists() or not target.is_relative_to(ROOT):
            raise PluginError(f"{page.file.src_uri}: {match[2]} is no file of the repository")
        shown = f"`{target.relative_to(ROOT)}`"
        same = match[1].strip("`") in {match[2], shown.strip("`"), target.name}
        return shown if same else f"{match[1]} ({shown})"

    return _LINK.sub(replaced, markdown)
