"""Records of a recorded workload: JSON objects that know where they stand, so that a bad one can be named."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

T = TypeVar("T")

_GZIP_MAGIC = b"\x1f\x8b"
_SHOWN_CHARS = 60


class BadRecord(ValueError):  # noqa: N818 - it names the record, and callers report it as such
    """A record that cannot be replayed; its text says where it is, what is wrong and what is expected."""


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object and its place.

    Attributes:
        values: The object.
        file: The file that it is from, as told to a user.
        line: Its line there; 0 where the object spans lines.
        inside: Its place in the object of that line or file, such as ``requests[17]``; empty for the whole.
    """

    values: dict[str, Any]
    file: str
    line: int = 0
    inside: str = ""

    def bad(self, key: str, expected: str) -> BadRecord:
        """The error that says what a field should be."""
        where = f"{self.file}:{self.line}" if self.line else self.file
        field = f"{self.inside}.{key}" if self.inside else key
        got = f"got {self.values[key]!r}"[:_SHOWN_CHARS] if key in self.values else "is missing"
        return BadRecord(f"{where}: {field}: {got}, expected {expected}")

    def whole(self, key: str, at_least: int = 0) -> int:
        """A whole number."""
        value = self.values.get(key)
        if type(value) is not int or value < at_least:
            raise self.bad(key, f"a whole number of at least {at_least}")
        return value

    def number(self, key: str) -> float:
        """A finite number; some recorders write it as text."""
        value = self.values.get(key)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.bad(key, "a finite number")
        return number

    def number_if_any(self, key: str) -> float | None:
        """A finite number, None where the field is missing or null."""
        return None if self.values.get(key) is None else self.number(key)

    def text(self, key: str) -> str:
        """A string."""
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.bad(key, "a string")
        return value

    def ids(self, key: str) -> list[int]:
        """A list of whole numbers."""
        value = self.values.get(key)
        if not isinstance(value, list) or not set(map(type, value)) <= {int}:
            raise self.bad(key, "a list of whole numbers")
        return value

    def records(self, key: str) -> list[Record]:
        """A list of objects."""
        value = self.values.get(key)
        if not isinstance(value, list) or not set(map(type, value)) <= {dict}:
            raise self.bad(key, "a list of objects")
        prefix = f"{self.inside}." if self.inside else ""
        return [
            Record(values, self.file, self.line, f"{prefix}{key}[{i}]")
            for i, values in enumerate(value)
        ]


def read_text(path: Path) -> str:
    """The text of a file, which may be compressed with gzip.

    Raises:
        BadRecord: It is no such text.
    """
    data = path.read_bytes()
    try:
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadRecord(f"{path}: {error}, expected UTF-8 text, plain or as gzip") from error


def json_lines(text: str, file: str, bad: Callable[[BadRecord], None]) -> Iterator[Record]:
    """The objects of a text with one a line; lines that are none go to `bad`."""
    # Not splitlines(): JSON strings may hold other line separators as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad(BadRecord(f"{file}:{number}: {error}, expected a JSON object"))
            continue
        if isinstance(values, dict):
            yield Record(values, file, number)
        else:
            bad(BadRecord(f"{file}:{number}: got {line[:_SHOWN_CHARS]}, expected a JSON object"))


def parsed(
    records: Iterable[Record],
    parse: Callable[[Record], T],
    bad: Callable[[BadRecord], None],
) -> Iterator[T]:
    """What `parse` makes of each record; records that it refuses go to `bad`."""
    for record in records:
        try:
            result = parse(record)
        except BadRecord as error:
            bad(error)
        else:
            yield result
