"""Reads what a client says about its program in ``kv_transfer_params["kvtier"]``.

The value comes from the network: any JSON type, any size. Reading it never raises, costs a
constant amount of work whatever the client sent, and keeps the good fields next to the bad ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

PARAMS_KEY: Final = "kvtier"
MAX_TEXT_BYTES: Final = 256
MAX_TTL_S: Final = 7 * 86_400.0
MAX_UNKNOWN_REPORTED: Final = 8
_MAX_FIELD_CHARS: Final = 32

ErrorReason = Literal[
    "wrong_type", "empty", "too_long", "not_printable", "not_a_number", "out_of_range", "unknown"
]


@dataclass(frozen=True, slots=True)
class HintError:
    """One field that was not used.

    ``field`` is shortened to 32 characters and holds nothing else of the client's value, so it
    can be logged or returned whatever was sent. The empty field means the object as a whole.
    """

    field: str
    reason: ErrorReason


@dataclass(frozen=True, slots=True)
class RequestHints:
    """What the client said; None where it said nothing (or nothing usable).

    Attributes:
        program: The program that this turn belongs to, at most 256 bytes of UTF-8.
        tool: The tool that the program will run after this turn, if the client knows already.
        ttl_s: How long to keep the KV after this turn, in seconds; 0 means not at all.
        end: The program ends with this turn: nothing needs to be kept.
        pin: False refuses a copy in GPU memory during the pause; True is what holds without it.
        stage: False refuses a copy in CPU memory during the pause; True is what holds without it.
    """

    program: str | None = None
    tool: str | None = None
    ttl_s: float | None = None
    end: bool = False
    pin: bool | None = None
    stage: bool | None = None


NO_HINTS: Final = RequestHints()


class _FieldError(Exception):
    def __init__(self, reason: ErrorReason) -> None:
        super().__init__(reason)
        self.reason: ErrorReason = reason


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _FieldError("wrong_type")
    # A character is at least one byte: the length alone refuses a huge string unread.
    if len(value) > MAX_TEXT_BYTES:
        raise _FieldError("too_long")
    if not value:
        raise _FieldError("empty")
    # Also refuses lone surrogates, so that encoding below cannot fail.
    if not value.isprintable():
        raise _FieldError("not_printable")
    if len(value.encode()) > MAX_TEXT_BYTES:
        # Not shortened: two long program names could become one program.
        raise _FieldError("too_long")
    return str(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _FieldError("wrong_type")
    return value


def _seconds(limit_s: float) -> Callable[[object], float]:
    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _FieldError("wrong_type")
        if value != value:  # noqa: PLR0124 - the test for NaN that an int of any size survives
            raise _FieldError("not_a_number")
        # Compared before the conversion: float() of a huge int would overflow.
        if not 0 <= value <= limit_s:
            raise _FieldError("out_of_range")
        return float(value)

    return read


_ttl_s = _seconds(MAX_TTL_S)
_FIELDS: Final = ("program", "tool", "ttl_s", "end", "pin", "stage")
_KNOWN: Final = frozenset(_FIELDS)


def parse_hints(raw: object) -> tuple[RequestHints, tuple[HintError, ...]]:
    """Read the value of ``kv_transfer_params["kvtier"]``.

    Args:
        raw: Whatever the client sent; None is the same as an empty object.

    Returns:
        The usable hints, and one error per field that was left out. At most 8 unknown fields are
        named, so the number of errors is bounded. JSON ``null`` in a field means "not said".

    Never raises.
    """
    if raw is None:
        return NO_HINTS, ()
    if not isinstance(raw, dict):
        return NO_HINTS, (HintError("", "wrong_type"),)
    errors: list[HintError] = []

    def take(name: str, read: Callable[[object], T]) -> T | None:
        value = raw.get(name)
        if value is None:
            return None
        try:
            return read(value)
        except _FieldError as error:
            errors.append(HintError(name, error.reason))
            return None

    hints = RequestHints(
        program=take("program", _text),
        tool=take("tool", _text),
        ttl_s=take("ttl_s", _ttl_s),
        end=take("end", _flag) or False,
        pin=take("pin", _flag),
        stage=take("stage", _flag),
    )
    errors.extend(_unknown_fields(raw))
    return hints, tuple(errors)


def parse_transfer_params(params: object) -> tuple[RequestHints, tuple[HintError, ...]]:
    """``parse_hints`` of ``kv_transfer_params["kvtier"]``; other connectors' entries are ignored.

    Never raises; anything but a dict means that there are no hints.
    """
    if not isinstance(params, dict):
        return NO_HINTS, ()
    return parse_hints(params.get(PARAMS_KEY))


def _unknown_fields(raw: dict[object, object]) -> list[HintError]:
    if len(raw) <= len(_KNOWN) and raw.keys() <= _KNOWN:
        return []
    errors: list[HintError] = []
    # Even when every known field comes first, this many keys hold MAX_UNKNOWN_REPORTED unknown.
    for key in islice(raw, len(_KNOWN) + MAX_UNKNOWN_REPORTED):
        if isinstance(key, str) and key in _KNOWN:
            continue
        if len(errors) == MAX_UNKNOWN_REPORTED:
            break
        errors.append(HintError(_field_name(key), "unknown"))
    return errors


def _field_name(key: object) -> str:
    if not isinstance(key, str):
        return "(not a string)"
    shown = key[:_MAX_FIELD_CHARS]
    return shown if shown.isprintable() else "(not printable)"
