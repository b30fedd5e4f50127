"""The reference of the command line, by typer's own generator, for `docs/command-line.md`.

What stands above the page's mark is written by hand and stays. `reference_pages.py` writes the page.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from kvtier.cli import app

if TYPE_CHECKING:
    from click import Command

PAGE = Path(__file__).resolve().parents[1] / "docs" / "command-line.md"
MARK = "<!-- From here on written by scripts/reference_pages.py from the commands' help. -->\n"
HANDED_OVER: Final = {
    "demo": "kvtier.demo.command:demo",
    "replay": "kvtier.replay.command:replay",
    "calibrate": "kvtier.measuring.command:calibrate",
    "bench link": "kvtier.linkbench.command:link",
}
"""Commands that `kvtier.cli` hands over to a function of their own, whose options it does not know."""


def commands() -> dict[str, Command]:
    """Return every command by its name behind `kvtier`; groups and their members are one each."""
    found: dict[str, Command] = {}

    def walk(group: Command, words: tuple[str, ...]) -> None:
        for name, command in getattr(group, "commands", {}).items():
            path = (*words, name)
            own = HANDED_OVER.get(" ".join(path))
            found[" ".join(path)] = _own_command(own) if own else command
            walk(command, path)

    walk(get_command(app), ())
    return found


CONNECTION: Final = (
    "target",
    "token-file",
    "tls",
    "tls-ca",
    "tls-cert",
    "tls-key",
    "timeout",
    "json",
)
"""Options of every command that asks the control server: said once, by hand."""
_CONNECTION_LINE: Final = (
    "* those [of every command that asks the control server](#reach-the-control-server)\n"
)


def page(current: str) -> str:
    """Return the page with its generated part anew."""
    parts = []
    for name, command in commands().items():
        # A group's own part lists its members, which follow anyway.
        if not hasattr(command, "commands"):
            context = typer.Context(command, info_name=f"kvtier {name}")
            parts.append(
                get_docs_for_click(obj=command, ctx=context, indent=2, name=f"kvtier {name}")
            )
    text = "\n\n".join(
        _fenced(part)
        for part in re.split(r"\n{2,}", "\n".join(map(_short, parts)).strip())
        if not part.startswith("Exit codes:")
    )
    # What follows a prompt is taken for a command that can be run; a usage line cannot.
    text = text.replace("```console\n$ ", "```text\n")
    return current.partition(MARK)[0] + MARK + "\n" + text + "\n"


def _short(part: str) -> str:
    """Return a command's part without the options that many have."""
    if "* `--target " not in part:
        return part
    lines = []
    for line in part.splitlines(keepends=True):
        option = re.match(r"\* `--([\w-]+)", line)
        if option is None or option[1] not in CONNECTION:
            lines.append(line)
        elif option[1] == CONNECTION[0]:
            lines.append(_CONNECTION_LINE)
    return "".join(lines)


def _fenced(paragraph: str) -> str:
    """Return a paragraph of help that was laid out by hand as it stands, others as they are."""
    laid_out = re.search(r"^ {2,}\S|^\w+: {2,}", paragraph, re.MULTILINE)
    # Click's mark of such a paragraph, a backspace, is part of the text.
    return f"```text\n{paragraph.replace(chr(8), '').strip()}\n```" if laid_out else paragraph


def _own_command(where: str) -> Command:
    module, _, function = where.partition(":")
    own = typer.Typer(add_completion=False, rich_markup_mode=None)
    own.command()(getattr(import_module(module), function))
    return get_command(own)
