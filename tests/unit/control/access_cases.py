"""Tokens of two tenants and of the operator, and calls that show them."""

from __future__ import annotations

from typing import Any

from kvtier.v1 import observability_pb2, program_pb2
from tests.unit.control.control_host import (
    Client,
    Host,
)

OPEN, ACME, OTHER = "open-token-0123456789", "acme-token-0123456789", "other-token-012345678"
GET = program_pb2.GetProgramRequest(name="agent", tenant="acme")
STATUS = observability_pb2.GetStatusRequest()


def with_token(token: str) -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer {token}")]}


def over_tcp(host: Host) -> Client:
    return Client(host.channel(host.listening.tcp_target))
