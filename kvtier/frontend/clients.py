"""How clients name their sessions: the headers and body fields of agents that know nothing of kvtier.

All of it is text from the network. A name that `kv_transfer_params.kvtier` would refuse is replaced by a
digest, never cut: cutting could make one program of two. Nothing here raises on what a client sent.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import msgspec

from kvtier.identity.request_params import MAX_TEXT_BYTES, MAX_TTL_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

T = TypeVar("T")

Source = Literal[
    "client",
    "dynamo",
    "claude_code",
    "codex",
    "opencode",
    "session_control",
    "agent_hints",
    "user_id",
    "prompt_cache_key",
    "correlation_id",
    "none",
]
"""Who named a request's program: `client` spoke to vLLM or kvtier itself, `none` is known by its prompt."""

Fields = dict[str, msgspec.Raw]
"""A JSON object whose values are not read yet."""

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises on bytes that it cannot read."""

_SESSION: Final = b"x-session-id"
_CORRELATION: Final = b"x-correlation-id"
_FINAL: Final = b"x-dynamo-session-final"
_CLAUDE_SESSION: Final = b"x-claude-code-session-id"
_CLAUDE_AGENT: Final = b"x-claude-code-agent-id"
_CLAUDE_CLASS: Final = b"x-claude-code-request-class"
# Headers that hold a session's name alone, the first one that is there counts. Claude Code's come
# between Dynamo's and these.
_DYNAMO: Final = b"x-dynamo-session-id"
_NAMES: Final[tuple[tuple[bytes, Source], ...]] = (
    (b"thread-id", "codex"),
    (b"session-id", "codex"),
    (b"session_id", "codex"),
    (b"x-session-affinity", "opencode"),
)
_READ: Final = frozenset(
    {_SESSION, _CORRELATION, _FINAL, _CLAUDE_SESSION, _CLAUDE_AGENT, _CLAUDE_CLASS, _DYNAMO}
    | {name for name, _ in _NAMES}
)
_TRUE: Final = frozenset({"true", "1", "yes", "on"})
# Claude Code's metadata.user_id up to 2.1.103; since then a JSON object with the same in `session_id`.
_USER_ID_SESSION: Final = re.compile(r"_session_([0-9A-Za-z-]+)\Z")
_TTL: Final = re.compile(r"(\d{1,6})([smh])", re.ASCII)
_UNIT_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class HeaderSigns:
    """What the headers of a request say about its program.

    Attributes:
        session: vLLM's own `X-Session-ID` names it.
        program: The name in an agent's own header, None without one.
        source: Whose header that is.
        correlation_id: `X-Correlation-ID`, which may name a session or a single request.
        end: The session ends with this request.
        aside: A request beside the conversation (a title, a classifier) that shares its headers.
    """

    session: bool = False
    program: str | None = None
    source: Source = "none"
    correlation_id: str | None = None
    end: bool = False
    aside: bool = False


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> HeaderSigns:
    """Read an ASGI scope's headers, whose names are in lower case."""
    found = {name: value for name, value in headers if name in _READ}
    if not found:
        return HeaderSigns()
    program, source = _named(found)
    return HeaderSigns(
        session=bool(found.get(_SESSION)),
        program=program,
        source=source,
        correlation_id=_header_text(found.get(_CORRELATION)),
        end=(_header_text(found.get(_FINAL)) or "").lower() in _TRUE,
        aside=found.get(_CLAUDE_CLASS) == b"auxiliary",
    )


def _named(found: Mapping[bytes, bytes]) -> tuple[str | None, Source]:
    if (name := _header_text(found.get(_DYNAMO))) is not None:
        return bounded(name), "dynamo"
    if (session := _header_text(found.get(_CLAUDE_SESSION))) is not None:
        # Agents that a session spawns share its id; a teammate's id is unique within the session only.
        agent = _header_text(found.get(_CLAUDE_AGENT))
        return bounded(session if agent is None else f"{session}/{agent}"), "claude_code"
    for header, source in _NAMES:
        if (name := _header_text(found.get(header))) is not None:
            return bounded(name), source
    return None, "none"


def _header_text(value: bytes | None) -> str | None:
    if value is None:
        return None
    # What is not UTF-8 becomes unprintable, and so a digest, unlike any other bytes'.
    return value.decode("utf-8", "surrogateescape").strip() or None


def bounded(name: str) -> str:
    """Return a name that `kv_transfer_params.kvtier.program` accepts: this one, else its digest.

    Names of more than 256 characters get the digest that kvtier gives them elsewhere.
    """
    if (
        len(name) <= MAX_TEXT_BYTES
        and name.isprintable()
        and len(name.encode("utf-8", "surrogatepass")) <= MAX_TEXT_BYTES
    ):
        return name
    return f"blake2b:{blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=32).hexdigest()}"


class Repeats:
    """Tells names that come again, of the last `limit` different ones.

    A gateway may give every request a correlation id of its own. Taken for a program's name, it would
    part a returning agent from its KV; only a client's id of a session comes twice.
    """

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        self._seen: OrderedDict[int, None] = OrderedDict()

    def again(self, name: str) -> bool:
        """Whether this name has come before; remembers it."""
        key = hash(name)
        if key in self._seen:
            self._seen.move_to_end(key)
            return True
        self._seen[key] = None
        if len(self._seen) > self._limit:
            self._seen.popitem(last=False)
        return False


# -- bodies ----------------------------------------------------------------------------------------


class _SessionControl(msgspec.Struct):
    session_id: str | None = None
    action: str | None = None


class _AgentHints(msgspec.Struct):
    prefix_id: str | None = None


class _Metadata(msgspec.Struct):
    user_id: str | None = None


class _UserId(msgspec.Struct):
    session_id: str | None = None


class _CacheControl(msgspec.Struct):
    ttl: str | None = None


class _Block(msgspec.Struct):
    """A tool or a content block of Anthropic's API; everything else in it is skipped unread."""

    cache_control: _CacheControl | None = None


class _Message(msgspec.Struct):
    content: msgspec.Raw = msgspec.Raw(b"null")


_fields: Final = msgspec.json.Decoder(Fields)
_text: Final = msgspec.json.Decoder(str)
_session_control: Final = msgspec.json.Decoder(_SessionControl)
_agent_hints: Final = msgspec.json.Decoder(_AgentHints)
_metadata: Final = msgspec.json.Decoder(_Metadata)
_user_id: Final = msgspec.json.Decoder(_UserId)
_cache_control: Final = msgspec.json.Decoder(_CacheControl)
_blocks: Final = msgspec.json.Decoder(list[_Block])
_list: Final = msgspec.json.Decoder(list[msgspec.Raw])
_message: Final = msgspec.json.Decoder(_Message)


def read(raw: msgspec.Raw | str | None, decoder: msgspec.json.Decoder[T]) -> T | None:
    """Return what the JSON says, None where it is missing or of another type."""
    if raw is None:
        return None
    try:
        return decoder.decode(raw)
    except UNREADABLE:
        return None


def read_object(raw: msgspec.Raw | None) -> Fields | None:
    """Return a JSON object's fields, None where it is missing or something else."""
    return read(raw, _fields)


def read_text(raw: msgspec.Raw | None) -> str | None:
    """Return a JSON text, None where it is missing, empty or something else."""
    return read(raw, _text) or None


@dataclass(frozen=True, slots=True)
class BodySigns:
    """What a body says about its program outside of `kv_transfer_params.kvtier`."""

    program: str | None = None
    source: Source = "none"
    ttl_s: float | None = None
    end: bool = False


def read_body(fields: Fields, *, has_cache_marks: bool) -> BodySigns:
    """Read a request's body.

    `ttl_s` is what Dynamo's `nvext.cache_control` says, else the last of Anthropic's `cache_control`
    marks: the one that covers the most. A mark without a `ttl` says nothing. Marks are looked for
    only where the API has them: it takes a second pass over the conversation.
    """
    nvext = read_object(fields.get("nvext")) or {}
    control = read(nvext.get("session_control"), _session_control) or _SessionControl()
    hints = read(nvext.get("agent_hints"), _agent_hints) or _AgentHints()
    names: tuple[tuple[str | None, Source], ...] = (
        (control.session_id, "session_control"),
        (hints.prefix_id, "agent_hints"),
        (_session_of_user_id(fields.get("metadata")), "user_id"),
        (read_text(fields.get("prompt_cache_key")), "prompt_cache_key"),
    )
    program, source = next(((bounded(n), s) for n, s in names if n), (None, names[0][1]))
    asked = read(nvext.get("cache_control"), _cache_control)
    if asked is None and has_cache_marks:
        asked = _last_mark(fields)
    return BodySigns(
        program=program,
        source=source if program is not None else "none",
        ttl_s=_seconds(asked.ttl) if asked is not None else None,
        end=control.action == "close",
    )


def _session_of_user_id(raw: msgspec.Raw | None) -> str | None:
    metadata = read(raw, _metadata)
    if metadata is None or metadata.user_id is None:
        return None
    if metadata.user_id.startswith("{"):
        told = read(metadata.user_id, _user_id)
        return told.session_id if told is not None else None
    match = _USER_ID_SESSION.search(metadata.user_id)
    return match[1] if match is not None else None


def _last_mark(fields: Fields) -> _CacheControl | None:
    """Return the last cache mark in the prompt's order: tools, system, messages."""
    for raw in reversed(read(fields.get("messages"), _list) or ()):
        message = read(raw, _message)
        if message is not None and (mark := _last_of(message.content)) is not None:
            return mark
    return _last_of(fields.get("system")) or _last_of(fields.get("tools"))


def _last_of(blocks: msgspec.Raw | None) -> _CacheControl | None:
    """Return the last mark in a list of blocks; a text has none."""
    marks = (block.cache_control for block in reversed(read(blocks, _blocks) or ()))
    return next((mark for mark in marks if mark is not None), None)


def _seconds(ttl: str | None) -> float | None:
    match = _TTL.fullmatch(ttl) if ttl is not None else None
    if match is None:
        return None
    ttl_s = int(match[1]) * _UNIT_S[match[2]]
    return ttl_s if ttl_s <= MAX_TTL_S else None
