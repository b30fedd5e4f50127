"""Addresses that kvtier's control server listens on: `HOST:PORT`."""

from __future__ import annotations

import ipaddress
import re
from typing import Final, NamedTuple

ADDRESS_PATTERN: Final = r"^(\[[0-9a-fA-F:.]+\]|[^\[\]:/\s]+):[0-9]{1,5}$"
_MAX_PORT: Final = 65_535


class ListenAddress(NamedTuple):
    """Where to listen; an IPv6 address has no brackets here. Port 0: any that is free."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> ListenAddress:
        """Read `HOST:PORT` or `[HOST]:PORT`.

        Raises:
            ValueError: It is something else.
        """
        if not re.match(ADDRESS_PATTERN, text):
            raise ValueError(f"{text!r} is no HOST:PORT")
        host, _, port = text.rpartition(":")
        if int(port) > _MAX_PORT:
            raise ValueError(f"port {port} is above {_MAX_PORT}")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this host can reach it. Other names than localhost may not."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
