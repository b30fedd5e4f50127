"""The file that lets TTL overrides survive a restart: JSON, replaced as a whole or not at all.

What cannot be read is left out and told, and the file as it was stays: beside the new one, as a copy, if
there comes to be a new one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kvtier.control.override_book import MAX_OVERRIDES
from kvtier.control.regular_file import FileContentError, read_regular_file
from kvtier.identity.request_params import MAX_TTL_S
from kvtier.link_messages import ProgramKey, TtlOverride

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

FILE_VERSION: Final = 1
MAX_FILE_BYTES: Final = 16 << 20
_MAX_TOLD: Final = 8


class _Entry(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One override as the file has it; `program` with its tenant, else `tool` or `tenant`, or none."""

    mode: str
    ttl_s: float
    program: str | None = None
    named: bool = True
    tool: str | None = None
    tenant: str | None = None
    expires_s: float | None = None


class OverrideFile:
    """See the module's docstring."""

    def __init__(self, path: Path) -> None:
        # A link to where the file is kept stays a link.
        self.path = Path(os.path.realpath(path))
        self._keep_copy = False
        self._writable = True

    def read(self) -> list[TtlOverride]:
        """Return the overrides of the file. What cannot be used is logged, and nothing is raised."""
        try:
            text = self._read_text()
        except FileNotFoundError:
            return []
        except FileContentError as error:
            # Whoever has put it there may want it there.
            self._writable = False
            logger.warning(
                "%s cannot be used: %s; it is left alone, and TTL overrides are not saved",
                self.path,
                error,
            )
            return []
        except (OSError, UnicodeDecodeError) as error:
            self._ignored(f"cannot be read: {error}")
            return []
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._ignored(f"is not JSON: {error}")
            return []
        if not isinstance(content, dict) or not isinstance(content.get("overrides"), list):
            self._ignored("does not hold overrides")
            return []
        version = content.get("version")
        if version != FILE_VERSION:
            newer = isinstance(version, int) and version > FILE_VERSION
            whose = "a newer kvtier" if newer else "no kvtier that this one knows"
            self._ignored(f"is of {whose}: its version is {version!r}, accepted is {FILE_VERSION}")
            return []
        return self._read_entries(content["overrides"])

    def write(self, overrides: Iterable[TtlOverride]) -> bool:
        """Replace the file; False if that is not possible, which is logged. Waits for the disk."""
        if not self._writable:
            return False
        content = {
            "version": FILE_VERSION,
            "overrides": [msgspec.to_builtins(_entry_of(override)) for override in overrides],
        }
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            text = json.dumps(content, indent=1).encode() + b"\n"
            _replace(self.path, text, self._keep_what_was_ignored)
        except OSError as error:
            logger.warning("TTL overrides are not saved: %s: %s", self.path, error.strerror)
            return False
        return True

    def _read_text(self) -> str:
        content, found = read_regular_file(self.path, MAX_FILE_BYTES)
        if not found.st_mode & 0o222:
            logger.warning("%s is read-only: changes of TTL overrides are not saved", self.path)
            self._writable = False
        return content.decode()

    def _read_entries(self, entries: list[Any]) -> list[TtlOverride]:
        overrides: list[TtlOverride] = []
        problems: list[str] = []
        for number, entry in enumerate(entries):
            if len(overrides) == MAX_OVERRIDES:
                problems.append(f"{len(entries) - number} beyond the limit of {MAX_OVERRIDES}")
                break
            try:
                overrides.append(_override_of(msgspec.convert(entry, _Entry)))
            except ValueError as error:  # msgspec's errors are some
                problems.append(f"number {number + 1}: {error}")
        if problems:
            more = len(problems) - _MAX_TOLD
            told = "; ".join(problems[:_MAX_TOLD]) + (f"; {more} more" if more > 0 else "")
            self._ignored(f"has overrides that cannot be used: {told}")
        return overrides

    def _ignored(self, why: str) -> None:
        self._keep_copy = True
        logger.warning(
            "%s %s; that is ignored, and the file is kept as it is until there is something to save, "
            "then as a copy beside it",
            self.path,
            why,
        )

    def _keep_what_was_ignored(self) -> None:
        if not self._keep_copy:
            return
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        kept = self.path.with_name(f"{self.path.name}.ignored-{stamp}")
        if os.path.lexists(self.path):
            try:
                os.link(self.path, kept)
            except OSError:  # not every file system has links, nor may everybody link to every file
                self.path.rename(kept)
            logger.warning("kept what was ignored of %s as %s", self.path, kept)
        self._keep_copy = False


def _replace(path: Path, content: bytes, before: Callable[[], None]) -> None:
    """Write a file such that a crash or a full disk leaves the old one or the new one.

    `before` is called when the new one is on the disk and the old one still in its place.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        before()
        Path(temporary).replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _entry_of(override: TtlOverride) -> _Entry:
    program = override.program
    return _Entry(
        mode=override.mode,
        ttl_s=override.ttl_s,
        program=None if program is None else program.name,
        named=program is None or program.named,
        tool=override.tool,
        tenant=override.tenant if program is None else program.tenant,
        expires_s=override.expires_s,
    )


def _override_of(entry: _Entry) -> TtlOverride:
    """Raises ValueError for what no client could have set."""
    if entry.mode not in {"fixed", "cap", "floor"}:
        raise ValueError(f"mode {entry.mode!r}: accepted is fixed, cap or floor")
    if not 0 <= entry.ttl_s <= MAX_TTL_S:
        raise ValueError(f"ttl_s {entry.ttl_s!r}: accepted is 0 to {MAX_TTL_S:g}")
    if entry.expires_s is not None and not math.isfinite(entry.expires_s):
        raise ValueError(f"expires_s {entry.expires_s!r}: accepted is a Unix time")
    if entry.tool is not None and (entry.program is not None or entry.tenant is not None):
        raise ValueError("a tool with a program or tenant: accepted is one scope")
    if "" in {entry.program, entry.tool, entry.tenant}:
        raise ValueError("an empty name")
    key = None if entry.program is None else ProgramKey(entry.tenant, entry.program, entry.named)
    return TtlOverride(
        mode=entry.mode,  # type: ignore[arg-type]  # checked above
        ttl_s=entry.ttl_s,
        program=key,
        tool=entry.tool,
        tenant=entry.tenant if key is None else None,
        expires_s=entry.expires_s,
    )
