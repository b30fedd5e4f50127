"""Fills the body of a generation request in: `session_id`, and `kv_transfer_params.kvtier`.

Values that are not changed are copied as the bytes they came in. Nothing that a client said is
overwritten, and a body that is no JSON object stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from kvtier.frontend.clients import (
    UNREADABLE,
    BodySigns,
    Fields,
    Source,
    bounded,
    read_body,
    read_object,
    read_text,
)
from kvtier.identity.request_params import PARAMS_KEY

if TYPE_CHECKING:
    from kvtier.frontend.clients import HeaderSigns, Repeats

TRANSFER_PARAMS: Final = "kv_transfer_params"
_decoder: Final = msgspec.json.Decoder(Fields)
_NULL: Final = b"null"


@dataclass(frozen=True, slots=True)
class Route:
    """What a route's body may hold.

    Attributes:
        session_id: vLLM reads a field `session_id`. Elsewhere a program's name becomes
            `kv_transfer_params.kvtier.program`.
        cache_marks: Anthropic's `cache_control`.
    """

    session_id: bool = False
    cache_marks: bool = False


@dataclass(frozen=True, slots=True)
class Filled:
    """A body, and who named its program. `body` is None where nothing was to be filled in."""

    body: bytes | None
    source: Source


def fill_in(body: bytes, headers: HeaderSigns, repeats: Repeats, route: Route) -> Filled | None:
    """Return the body with what headers and other fields say about its program.

    Args:
        body: The whole body.
        headers: What the request's headers say.
        repeats: Correlation ids that have come before.
        route: What the body may hold.

    Returns:
        None where the body cannot be read. Never raises.
    """
    try:
        # Fields outside of the values read here are not decoded; that they are UTF-8 must show too.
        if not body.isascii():
            body.decode()
        fields = _decoder.decode(body)
    except UNREADABLE:
        return None
    params = _object_or_none(fields, TRANSFER_PARAMS)
    hints = None if params is None else _object_or_none(params, PARAMS_KEY)
    if params is None or hints is None:
        # vLLM or kvtier will say what is wrong with it.
        return Filled(None, "none")
    signs = read_body(fields, has_cache_marks=route.cache_marks)
    program, source = _program(fields, hints, headers, signs, repeats)
    added: dict[str, object] = {}
    if program is not None and not route.session_id:
        added["program"] = program
    if signs.ttl_s is not None and not _said(hints, "ttl_s"):
        added["ttl_s"] = signs.ttl_s
    if (headers.end or signs.end) and not _said(hints, "end"):
        added["end"] = True
    if program is not None and route.session_id:
        fields["session_id"] = _raw(program)
    elif not added:
        return Filled(None, source)
    if added:
        params[PARAMS_KEY] = _raw({**hints, **added})
        fields[TRANSFER_PARAMS] = _raw(params)
    return Filled(msgspec.json.encode(fields), source)


def _program(
    fields: Fields, hints: Fields, headers: HeaderSigns, signs: BodySigns, repeats: Repeats
) -> tuple[str | None, Source]:
    """Return the name to fill in, None where there is none or the client gave one itself."""
    xargs = read_object(fields.get("vllm_xargs")) or {}
    said = (
        headers.session
        or _said(hints, "program")
        # An empty text is no name to vLLM.
        or (_said(fields, "session_id") and bytes(fields["session_id"]) != b'""')
        or read_text(xargs.get("session_id")) is not None
    )
    if said:
        return None, "client"
    if headers.aside:
        return None, "none"
    if headers.program is not None:
        return headers.program, headers.source
    if signs.program is not None:
        return signs.program, signs.source
    if headers.correlation_id is not None and repeats.again(headers.correlation_id):
        return bounded(headers.correlation_id), "correlation_id"
    return None, "none"


def _object_or_none(fields: Fields, name: str) -> Fields | None:
    """Return an object that may be filled in: empty where it is missing, None for another type."""
    return read_object(fields[name]) if _said(fields, name) else {}


def _said(fields: Fields, name: str) -> bool:
    """Whether a field is there; null says nothing."""
    return name in fields and bytes(fields[name]) != _NULL


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
