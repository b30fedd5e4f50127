"""The file of bearer tokens: who may call over TCP, and whose programs they then see.

One token a line, optionally followed by white space and the tenant that it is bound to. Empty lines, and
lines that begin with `#`, count for nothing. The file is read again when it has changed; while it cannot
be used, no token is accepted.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import secrets
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvtier.control.regular_file import FileContentError, read_regular_file

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

MIN_TOKEN_CHARS: Final = 16
MAX_TOKEN_CHARS: Final = 1024
MAX_TOKENS: Final = 10_000
MAX_FILE_BYTES: Final = 4 << 20
MAX_TENANT_CHARS: Final = 256
# RFC 6750, "b64token".
_TOKEN: Final = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
_SHUT_TO: Final = stat.S_IWGRP | stat.S_IRWXO


class TokenFileError(Exception):
    """The file cannot be used; the message says why, what is accepted, and holds no token."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token allows: everything, or what concerns one tenant."""

    tenant: str | None = None


class TokenFile:
    """See the module's docstring."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._key = secrets.token_bytes(32)
        self._grants: dict[bytes, Grant] = {}
        self._seen: tuple[int, ...] | None = None
        self._problem = ""

    def grant(self, token: str) -> Grant | None:
        """What this token allows; None: it is none of the file's."""
        self._follow()
        # Found by a digest under a key that nobody else knows: neither the lookup's time nor the
        # comparison's says anything of the tokens in the file.
        return self._grants.get(self._digest(token))

    def read(self) -> int:
        """Read the file now; return the number of tokens.

        Raises:
            TokenFileError: It cannot be used.
        """
        try:
            raw, found = read_regular_file(self._path, MAX_FILE_BYTES)
        except OSError as error:
            raise TokenFileError(
                f"{error.strerror}; accepted is a readable file of tokens"
            ) from error
        except FileContentError as error:
            raise TokenFileError(f"{error}; accepted is a file of tokens, one a line") from error
        _check_access(found)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise TokenFileError("it is not UTF-8 text; accepted is one token a line") from None
        self._grants = self._parse(text)
        self._seen = _identity(found)
        return len(self._grants)

    def _follow(self) -> None:
        """Read the file anew if it is another one than before."""
        try:
            seen = _identity(self._path.stat())
        except OSError:
            seen = None
        if seen is not None and seen == self._seen:
            return
        try:
            count = self.read()
        except TokenFileError as error:
            self._grants, self._seen = {}, seen
            problem = str(error)
            if problem != self._problem:
                logger.error("%s: no token is accepted: %s", self._path, problem)  # noqa: TRY400
            self._problem = problem
        else:
            self._problem = ""
            logger.info("%s: %d tokens", self._path, count)

    def _parse(self, text: str) -> dict[bytes, Grant]:
        grants: dict[bytes, Grant] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split(None, 1)
            if not words or words[0].startswith("#"):
                continue
            token, tenant = words[0], words[1].strip() if len(words) > 1 else None
            if not _TOKEN.fullmatch(token) or not MIN_TOKEN_CHARS <= len(token) <= MAX_TOKEN_CHARS:
                raise TokenFileError(
                    f"line {number} has no usable token; accepted are {MIN_TOKEN_CHARS} to "
                    f"{MAX_TOKEN_CHARS} characters of A-Z, a-z, 0-9 and -._~+/="
                )
            if tenant is not None and (len(tenant) > MAX_TENANT_CHARS or not tenant.isprintable()):
                raise TokenFileError(
                    f"line {number} has no usable tenant; accepted is printable text of at most "
                    f"{MAX_TENANT_CHARS} characters"
                )
            digest = self._digest(token)
            if digest in grants:
                raise TokenFileError(f"line {number} has a token that was there before")
            if len(grants) == MAX_TOKENS:
                raise TokenFileError(f"it has more than {MAX_TOKENS} tokens")
            grants[digest] = Grant(tenant)
        if not grants:
            raise TokenFileError("it has no token; accepted is one a line")
        return grants

    def _digest(self, token: str) -> bytes:
        return hmac.digest(self._key, token.encode("utf-8", "surrogatepass"), "sha256")


def _check_access(found: os.stat_result) -> None:
    if found.st_mode & _SHUT_TO:
        raise TokenFileError(
            f"others may read or change it (mode {stat.S_IMODE(found.st_mode):04o}); accepted is mode "
            "0600 or 0640"
        )
    if found.st_uid not in {os.geteuid(), 0}:
        raise TokenFileError(
            f"it belongs to user {found.st_uid}; accepted is {os.geteuid()}, who runs the engine, or root"
        )


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file's content or access does."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
