"""Calls of the `TtlService`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from kvtier.client import decoding
from kvtier.client.calls.call import Call, duration, enum_number, of_service
from kvtier.client.records import (
    AppliedOverride,
    DeletedOverride,
    TtlMode,
    TtlOverridePage,
    TtlScope,
)
from kvtier.v1 import ttl_pb2

if TYPE_CHECKING:
    from datetime import datetime

_ttl = of_service("TtlService")


def set_ttl_override(
    scope: TtlScope, ttl_s: float, mode: str, expires_at: datetime | None
) -> Call[ttl_pb2.SetTtlOverrideResponse, AppliedOverride]:
    """See `KVTierClient.set_ttl_override`."""
    override = ttl_pb2.TtlOverride(
        scope=_scope(scope),
        mode=enum_number(ttl_pb2.TtlMode, "TTL_MODE_", TtlMode, mode, "mode"),
        ttl=duration(ttl_s, "ttl_s"),
    )
    if expires_at is not None:
        if expires_at.tzinfo is None:
            raise ValueError(f"expires_at={expires_at!r}: accepted is a datetime with a time zone")
        timestamp = Timestamp()
        timestamp.FromDatetime(expires_at)
        override.expires_at.CopyFrom(timestamp)
    return _ttl(
        "SetTtlOverride",
        ttl_pb2.SetTtlOverrideRequest(override=override),
        ttl_pb2.SetTtlOverrideResponse,
        decoding.applied_override,
    )


def list_ttl_overrides(
    page_size: int, page_token: str
) -> Call[ttl_pb2.ListTtlOverridesResponse, TtlOverridePage]:
    """See `KVTierClient.list_ttl_overrides`."""
    request = ttl_pb2.ListTtlOverridesRequest(page_size=page_size, page_token=page_token)
    return _ttl(
        "ListTtlOverrides", request, ttl_pb2.ListTtlOverridesResponse, decoding.override_page
    )


def delete_ttl_override(
    scope: TtlScope,
) -> Call[ttl_pb2.DeleteTtlOverrideResponse, DeletedOverride]:
    """See `KVTierClient.delete_ttl_override`."""
    return _ttl(
        "DeleteTtlOverride",
        ttl_pb2.DeleteTtlOverrideRequest(scope=_scope(scope)),
        ttl_pb2.DeleteTtlOverrideResponse,
        decoding.deleted_override,
        idempotent=False,
    )


def _scope(scope: TtlScope) -> ttl_pb2.TtlScope:
    match scope.kind:
        case "program":
            program = ttl_pb2.ProgramScope(name=scope.name, tenant=scope.tenant)
            return ttl_pb2.TtlScope(program=program)
        case "tool":
            return ttl_pb2.TtlScope(tool=scope.name)
        case "tenant":
            return ttl_pb2.TtlScope(tenant=scope.tenant)
        case "all":
            return ttl_pb2.TtlScope(all=True)
