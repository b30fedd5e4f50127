"""Reads tool names out of the text of tool calls, and makes bounded labels of them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_LABEL_CHARS: Final = 64
MAX_NAMES: Final = 8
UNKNOWN_TOOL: Final = "unknown"
_MAX_JOINED: Final = 4

_NOT_IN_LABEL: Final = re.compile(r"[^A-Za-z0-9_.:\-]+")
# A call that was cut off, or whose arguments are no JSON, still has its name in front.
_NAME_IN_FRONT: Final = re.compile(r"\s*\[?\s*\{\s*\"name\"\s*:\s*\"([^\"\\]+)\"")
_SEPARATOR: Final = re.compile(r"[\s;,]*")
_DECODER: Final = json.JSONDecoder()

_FENCE_OPEN: Final = "```bash"
_FENCE_CLOSE: Final = "```"
_ENOUGH_FENCES: Final = 2
# What may stand before the command itself: comments, "cd x &&", assignments, wrappers.
_COMMENT: Final = re.compile(r"#[^\n]*(?:\n|$)")
_CD: Final = re.compile(r"cd\s+(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s;&|]+)\s*(?:&&|;|\n)")
_ASSIGNMENT: Final = re.compile(
    r"(?:export\s+)?[A-Za-z_]\w*=(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s;&|]*)\s*(?:&&|;|\s)"
)
_WRAPPER: Final = re.compile(r"(?:sudo|env|time|nohup|timeout\s+(?:-\S+\s+)*\d\S*)\s+")
_WORD: Final = re.compile(r"[^\s;|&<>(){}`\"']+")


def tool_label(name: str) -> str:
    """Return a tool name as a label: at most 64 of ``A-Za-z0-9_.:-``, without ``functions.``."""
    short = name[: 4 * MAX_LABEL_CHARS].strip().removeprefix("functions.")
    label = _NOT_IN_LABEL.sub("_", short).strip("_")[:MAX_LABEL_CHARS]
    return label or UNKNOWN_TOOL


def multi_name(names: Iterable[str]) -> str | None:
    """Return one label for the tools of a turn, whatever their order; None for no tool.

    Two calls of one tool are that tool; different ones become ``multi:a+b``, of more than four
    the first four by name and ``+more``.
    """
    labels = sorted({tool_label(name) for name in names})
    if not labels:
        return None
    if len(labels) == 1:
        return labels[0]
    more = "+more" if len(labels) > _MAX_JOINED else ""
    joined = "+".join(labels[:_MAX_JOINED])
    return f"multi:{joined}"[: MAX_LABEL_CHARS - len(more)] + more


def json_names(text: str) -> list[str]:
    """Return the names in a JSON object, a list of them, or objects in a row; text may go on."""
    names: list[str] = []
    at = _skip_separators(text, 0)
    while len(names) < MAX_NAMES and text[at : at + 1] in ("{", "["):
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            # Cut off, or no JSON: what follows cannot be told apart from arguments.
            if not names:
                front = _NAME_IN_FRONT.match(text)
                names.extend(front.groups() if front is not None else ())
            break
        calls = value if isinstance(value, list) else [value]
        names.extend(name for name in map(_name_of_call, calls) if name is not None)
        at = _skip_separators(text, at)
    return names[:MAX_NAMES]


def _skip_separators(text: str, at: int) -> int:
    match = _SEPARATOR.match(text, at)
    return match.end() if match is not None else at


def _name_of_call(call: object) -> str | None:
    if not isinstance(call, dict):
        return None
    name = call.get("name", call.get("function"))
    if isinstance(name, dict):
        name = name.get("name")
    return name if isinstance(name, str) and name else None


def regex_names(pattern: re.Pattern[str], text: str) -> list[str]:
    """Return the first group that took part in each of the first eight matches."""
    names: list[str] = []
    for match in pattern.finditer(text):
        name = next((group for group in match.groups() if group), None)
        if name is not None:
            names.append(name)
        if len(names) == MAX_NAMES:
            break
    return names


def fence_commands(text: str) -> tuple[list[str], bool]:
    """Return the bodies of up to two ```` ```bash ```` blocks, and whether the last is closed."""
    bodies: list[str] = []
    at = text.find(_FENCE_OPEN)
    while at >= 0 and len(bodies) < _ENOUGH_FENCES:
        begin = at + len(_FENCE_OPEN)
        end = text.find(_FENCE_CLOSE, begin)
        if end < 0:
            return [*bodies, text[begin:]], False
        bodies.append(text[begin:end])
        at = text.find(_FENCE_OPEN, end + len(_FENCE_CLOSE))
    return bodies, True


def command_name(command: str) -> str | None:
    """Return the program that a shell command runs: its first word, behind what merely prepares.

    Skips comments, ``cd x &&``, assignments and wrappers such as ``sudo``; a path is reduced to
    its last part. None if nothing is left.
    """
    command = command.strip()
    at = 0
    while True:
        while at < len(command) and command[at].isspace():
            at += 1
        skipped = next(
            (
                match
                for pattern in (_COMMENT, _CD, _ASSIGNMENT, _WRAPPER)
                if (match := pattern.match(command, at)) is not None
            ),
            None,
        )
        if skipped is None:
            break
        at = skipped.end()
    word = _WORD.search(command, at)
    if word is None:
        return None
    return word.group().rstrip("/").rpartition("/")[2] or None
