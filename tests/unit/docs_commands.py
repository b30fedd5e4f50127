"""The shell commands of the documentation."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
)
_BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its page, the line as a shell gets it, and its words."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """The words without assignments before the command and without a comment."""
        words = shlex.split(self.line, comments=True)
        while words and _ASSIGNMENT.match(words[0]):
            words.pop(0)
        return words

    @property
    def environment(self) -> dict[str, str]:
        """The assignments before the command."""
        found = {}
        for word in shlex.split(self.line, comments=True):
            if not _ASSIGNMENT.match(word):
                break
            name, _, value = word.partition("=")
            found[name] = value
        return found

    @property
    def program(self) -> str:
        """Name of the program."""
        return Path(self.words[0]).name


def commands() -> Iterator[Command]:
    """All commands: behind a prompt in `console` blocks, every line in `sh` and `bash` blocks."""
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
            text = block.replace("\\\n", " ")
            if language == "console":
                lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
            elif language in {"sh", "bash", "shell"}:
                lines = [line for line in text.splitlines() if line.strip()]
                lines = [line for line in lines if not line.startswith("#")]
            else:
                continue
            yield from (Command(name, " ".join(line.split())) for line in lines)
