"""Checks of requests: every bad field is named, with what is accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvtier.control.api.errors import invalid_argument
from kvtier.identity.request_params import MAX_TTL_S

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

MAX_NAME_CHARS: Final = 256
"""As `kvtier.identity.program_records` bounds them: a longer one never names a program."""
MAX_TOOL_BYTES: Final = 256
MAX_REQUEST_ID_BYTES: Final = 128
MAX_PAGE_SIZE: Final = 1000
DEFAULT_PAGE_SIZE: Final = 100
MAX_DURATION_S: Final = MAX_TTL_S
_NANOS: Final = 1_000_000_000
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799
"""What a Timestamp may hold: the years 1 to 9999."""


class Violations:
    """What is wrong with a request, field by field."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    def add(self, field: str, text: str) -> None:
        """A field has a value that is not accepted."""
        self._found.append((field, text))

    def check(self) -> None:
        """Raises ApiError: INVALID_ARGUMENT, if anything was added."""
        if self._found:
            raise invalid_argument(self._found)

    # -- kinds of fields -----------------------------------------------------------------------------

    def program(self, name: str, tenant: str, prefix: str = "") -> tuple[str | None, str]:
        """A program's tenant (None: without) and name."""
        self._text(f"{prefix}name", name, MAX_NAME_CHARS, "characters")
        return self.tenant(f"{prefix}tenant", tenant), name

    def tenant(self, field: str, tenant: str) -> str | None:
        """A tenant; None where it is empty."""
        if not tenant:
            return None
        self._text(field, tenant, MAX_NAME_CHARS, "characters")
        return tenant

    def name(self, field: str, text: str) -> str:
        """A name that must not be empty."""
        self._text(field, text, MAX_NAME_CHARS, "characters")
        return text

    def tool(self, field: str, tool: str) -> str:
        """A tool's name."""
        self._text(field, tool, MAX_TOOL_BYTES, "bytes")
        return tool

    def request_id(self, field: str, request_id: str) -> str:
        """A client's id of its request; may be empty."""
        if request_id:
            self._text(field, request_id, MAX_REQUEST_ID_BYTES, "bytes")
        return request_id

    def page_size(self, field: str, size: int) -> int:
        """The size of a page."""
        return self.count(field, size, MAX_PAGE_SIZE, DEFAULT_PAGE_SIZE)

    def count(self, field: str, count: int, most: int, default: int) -> int:
        """A number from 1 on; 0 stands for the default."""
        if not 0 <= count <= most:
            self.add(field, f"is {count}; accepted is 1 to {most}, or 0 for {default}")
        return count or default

    def seconds(self, field: str, duration: Duration, *, above_zero: bool = False) -> float:
        """A duration in seconds: 0 to 7 days."""
        seconds, nanos = duration.seconds, duration.nanos
        accepted = f"{'more than 0' if above_zero else '0'} to {MAX_DURATION_S:.0f} s (7 days)"
        if abs(nanos) >= _NANOS or seconds * nanos < 0:
            self.add(field, f"is no duration: its nanos do not fit; accepted is {accepted}")
            return 0.0
        # As integers: a float would take a little too much for the limit itself.
        total_nanos = seconds * _NANOS + nanos
        if not 0 <= total_nanos <= int(MAX_DURATION_S) * _NANOS or (above_zero and not total_nanos):
            self.add(field, f"is {total_nanos / _NANOS:g} s; accepted is {accepted}")
            return 0.0
        return total_nanos / _NANOS

    def future(self, field: str, time: Timestamp, now_s: float) -> float:
        """A time to come, as Unix time."""
        if not 0 <= time.nanos < _NANOS or not _FIRST_S <= time.seconds <= _LAST_S:
            self.add(field, "is no time; accepted is a time from now on, up to the year 9999")
            return now_s
        unix_s = time.seconds + time.nanos / _NANOS
        if unix_s <= now_s:
            self.add(field, "is past; accepted is a time from now on")
        return unix_s

    def _text(self, field: str, text: str, most: int, unit: str) -> None:
        size = len(text.encode()) if unit == "bytes" else len(text)
        accepted = f"accepted is printable text of 1 to {most} {unit}"
        if not size:
            self.add(field, f"is empty; {accepted}")
        elif size > most:
            self.add(field, f"has {size} {unit}; {accepted}")
        elif not text.isprintable():
            self.add(field, f"is not printable; {accepted}")
