"""Decides from the end of the generated tokens whether a turn called a tool, and which.

This runs in the scheduler's thread at the end of every request, so the cheap question comes first:
a marker that is one token is looked for among the token ids, and nothing is decoded without a hit.
Text markers cost the decoding of the last 512 tokens. Pure: the decoder, the vocabulary and, if
wanted, the engine's own parser are passed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from kvtier.tools.formats import BASH_FENCE, FORMATS, ToolFormat, format_of_parser, infer_format
from kvtier.tools.names import (
    UNKNOWN_TOOL,
    command_name,
    fence_commands,
    json_names,
    multi_name,
    regex_names,
    tool_label,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "BASH_FENCE",
    "FORMATS",
    "ToolCall",
    "ToolCallDetector",
    "ToolFormat",
    "format_of_parser",
    "infer_format",
    "tool_label",
]

TAIL_TOKENS: Final = 512
MAX_TOKENS: Final = 16_384
MAX_DECODED_TOKENS: Final = 8_192
MAX_CALLS: Final = 8
_HEAD_TOKENS: Final = 64
_NAME_TOKENS: Final = 48
_MANY_TOKENS: Final = 2_048
# A parser may want to see what opens the list of calls, before the first call's own marker.
_WRAPPER_TOKENS: Final = 16
_WRAPPER_CHARS: Final = 64
_THINK_END: Final = "</think>"

Kind = Literal["tool", "none", "maybe"]
Source = Literal["hint", "parser", "marker", "fence"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """How a turn ended.

    Attributes:
        kind: "maybe" where the signs contradict, or where the output was cut off within the call.
        tool: Label of the tool, at most 64 characters; several become ``multi:a+b``.
        source: What told.
    """

    kind: Kind
    tool: str | None
    source: Source


@dataclass(frozen=True, slots=True)
class _Found:
    """Calls in an output: the text of each behind its marker, and the text that holds them all."""

    calls: list[str]
    all_text: Callable[[], str]


class ToolCallDetector:
    """Reads tool calls of one format out of token ids.

    Args:
        tool_format: How the model writes calls; None if unknown, then only hints and ``parser``
            can tell.
        decode: Token ids to text, special tokens kept.
        vocab: Token string to id; markers that are in it are searched as ids.
        parser: Text to the names of the tools it calls (the engine's own parser, adapted). Asked
            once a marker was seen; when it raises, ``parser_errors`` counts it and the built-in
            reading is used.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        decode: Callable[[Sequence[int]], str],
        vocab: Mapping[str, int],
        parser: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        self.tool_format = tool_format
        self.parser_errors = 0
        self._decode = decode
        self._parser = parser
        starts = tool_format.start_markers if tool_format is not None else ()
        ends = tool_format.end_markers if tool_format is not None else ()
        self._start_ids = tuple(vocab[marker] for marker in starts if marker in vocab)
        self._end_ids = tuple(vocab[marker] for marker in ends if marker in vocab)
        self._think_end_id = vocab.get(_THINK_END)

    def detect(
        self, token_ids: Sequence[int], *, hint: str | None = None, complete: bool = True
    ) -> ToolCall:
        """Decide how a turn ended.

        Args:
            token_ids: The generated tokens; the last 16,384 are looked at.
            hint: The client's word (``RequestHints.tool``); it settles the matter.
            complete: False if the output was cut off (length, abort): a call is then "maybe".
        """
        if hint is not None:
            return ToolCall("tool", tool_label(hint), "hint")
        found = self._detect(list(token_ids[-MAX_TOKENS:]))
        if not complete and found.kind == "tool":
            return ToolCall("maybe", found.tool, found.source)
        return found

    def _detect(self, ids: list[int]) -> ToolCall:
        tool_format = self.tool_format
        ids = self._answer(ids)
        if tool_format is None:
            names = self._parse(lambda: self._decode(ids[-TAIL_TOKENS:])) or []
            return ToolCall("tool" if names else "none", multi_name(names), "parser")
        if tool_format.style == "fence":
            return self._detect_fence(tool_format, ids)
        found = self._find(tool_format, ids)
        if found is None:
            return ToolCall("none", None, "marker")
        names = [name for call in found.calls for name in _names(tool_format, call)]
        if not names and tool_format.marks_every_message:
            return ToolCall("none", None, "marker")
        parsed = self._parse(found.all_text)
        if parsed:
            return ToolCall("tool", multi_name(parsed), "parser")
        # A marker without a name, or a call that the engine's parser does not accept: the client
        # may see plain text.
        sure = bool(names) and parsed is None
        return ToolCall("tool" if sure else "maybe", multi_name(names), "marker")

    def _answer(self, ids: list[int]) -> list[int]:
        """Cut off the thought: a call that the model only thinks about is none."""
        end = _last_index(ids, self._think_end_id)
        return ids[end + 1 :] if end >= 0 else ids

    def _parse(self, text: Callable[[], str]) -> list[str] | None:
        """Ask the injected parser; None without one, or if it fails."""
        if self._parser is None:
            return None
        try:
            names = [str(name) for name in self._parser(text())]
        except Exception:  # noqa: BLE001 - foreign code on a model's text: counted, then replaced
            self.parser_errors += 1
            return None
        # A parser that does not fit the model may call punctuation a name.
        return [name for name in names if tool_label(name) != UNKNOWN_TOOL]

    def _find(self, tool_format: ToolFormat, ids: list[int]) -> _Found | None:
        at = self._marker_positions(tool_format, ids)
        if at:
            stops = [*at[1:], len(ids)]
            calls = [
                self._decode_call(tool_format, ids[begin : min(stop, begin + _MANY_TOKENS)])
                for begin, stop in zip(at, stops, strict=True)
            ]
            begin = max(0, at[0] - _WRAPPER_TOKENS)
            return _Found(calls, lambda: self._decode(ids[begin : begin + MAX_DECODED_TOKENS]))
        if tool_format.leading is not None and tool_format.leading.match(
            self._decode(ids[:_HEAD_TOKENS])
        ):
            text = self._decode(ids[:_MANY_TOKENS])
            return _Found([text], lambda: text)
        # Where the marker is one token, its text is not read, except behind a stray end marker:
        # some models leave the opening out, and the engine's parsers forgive that.
        if self._start_ids and not any(token in ids for token in self._end_ids):
            return None
        return self._find_text(tool_format, ids)

    def _decode_call(self, tool_format: ToolFormat, ids: list[int]) -> str:
        """Decode what names the call: its beginning, if that is enough."""
        if not tool_format.many:
            text = self._decode(ids[:_NAME_TOKENS])
            if len(ids) <= _NAME_TOKENS or _names(tool_format, text):
                return text
        return self._decode(ids)

    def _marker_positions(self, tool_format: ToolFormat, ids: list[int]) -> list[int]:
        at: list[int] = []
        for token in self._start_ids:
            index = -1
            # "in" and index() run in C: an output without a marker costs microseconds.
            for _ in range(ids.count(token)):
                index = ids.index(token, index + 1)
                at.append(index)
        if tool_format.marks_every_message and self._start_ids:
            at.append(0)
        return sorted(set(at))[-MAX_CALLS:]

    def _find_text(self, tool_format: ToolFormat, ids: list[int]) -> _Found | None:
        text = self._widening_tail(tool_format, ids)
        at = sorted(
            {
                position
                for marker in tool_format.start_markers
                for position in _positions(text, marker)
            }
        )[-MAX_CALLS:]
        if tool_format.marks_every_message:
            at = sorted({0, *at})
        if not at:
            return None
        stops = [*at[1:], len(text)]
        calls = [text[begin:stop] for begin, stop in zip(at, stops, strict=True)]
        return _Found(calls, lambda: text[max(0, at[0] - _WRAPPER_CHARS) :])

    def _widening_tail(self, tool_format: ToolFormat, ids: list[int]) -> str:
        """Decode the tail; more of it while it closes a call that it does not open."""
        tokens = TAIL_TOKENS
        while True:
            text = self._decode(ids[-tokens:])
            opened = any(marker in text for marker in tool_format.start_markers)
            closed = any(marker in text for marker in tool_format.end_markers)
            if opened or not closed or tokens >= min(len(ids), MAX_DECODED_TOKENS):
                return text
            tokens *= 4

    def _detect_fence(self, tool_format: ToolFormat, ids: list[int]) -> ToolCall:
        bodies, closed = fence_commands(self._widening_tail(tool_format, ids))
        if not bodies:
            return ToolCall("none", None, "fence")
        if len(bodies) > 1:
            # Agents of this kind refuse two blocks and ask again: a pause, but of no tool.
            return ToolCall("maybe", None, "fence")
        name = command_name(bodies[0])
        label = tool_label(name) if name is not None else None
        return ToolCall("tool" if closed and label is not None else "maybe", label, "fence")


def _names(tool_format: ToolFormat, call: str) -> list[str]:
    if tool_format.header_end is not None:
        call = call.partition(tool_format.header_end)[0]
    if tool_format.style == "json":
        for marker in tool_format.start_markers:
            call = call.removeprefix(marker)
        if tool_format.pattern is not None:
            match = tool_format.pattern.match(call)
            if match is not None:
                return [match.group(1)]
        return json_names(call)
    return regex_names(tool_format.pattern, call) if tool_format.pattern is not None else []


def _positions(text: str, marker: str) -> list[int]:
    found: list[int] = []
    at = text.find(marker)
    while at >= 0:
        found.append(at)
        at = text.find(marker, at + len(marker))
    return found


def _last_index(ids: list[int], token: int | None) -> int:
    if token is None or token not in ids:
        return -1
    return len(ids) - 1 - ids[::-1].index(token)
