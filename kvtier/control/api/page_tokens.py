"""Page tokens: opaque, signed, and good for the list that they were made for only."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Any, Final

import msgspec

MAX_TOKEN_CHARS: Final = 8192
_MAC_BYTES: Final = 16


class BadPageTokenError(Exception):
    """The token is none of this server's, or belongs to another list."""


class PageTokens:
    """Makes tokens and reads them. They end with the server."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def make(self, filters: object, position: Any) -> str:
        """Return a token for the rest of the list that `filters` describe, from `position` on."""
        payload = msgspec.msgpack.encode([_digest(filters), position])
        return base64.urlsafe_b64encode(self._mac(payload) + payload).decode().rstrip("=")

    def read(self, token: str, filters: object) -> Any:
        """Return the position.

        Raises:
            BadPageTokenError: See there.
        """
        if len(token) > MAX_TOKEN_CHARS:
            raise BadPageTokenError("is no token of this list")
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise BadPageTokenError("is no token of this list") from None
        mac, payload = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(payload)):
            raise BadPageTokenError(
                "is no token of this list, or was made before the server started"
            )
        digest, position = msgspec.msgpack.decode(payload, type=tuple[bytes, Any])
        if digest != _digest(filters):
            raise BadPageTokenError("was made for other filters; accepted is one of the same list")
        return position

    def _mac(self, payload: bytes) -> bytes:
        return hmac.digest(self._key, payload, "sha256")[:_MAC_BYTES]


def _digest(filters: object) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(filters)).digest()[:_MAC_BYTES]
