"""Whether an LMCache server answers."""

from __future__ import annotations

import http.client

from kvtier.server.launch import LOOPBACK


def is_healthy(http_port: int, timeout_s: float = 1.0) -> bool:
    """Whether GET /healthcheck answers 200 in time. http.client, because it ignores proxy variables."""
    connection = http.client.HTTPConnection(LOOPBACK, http_port, timeout=timeout_s)
    try:
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
