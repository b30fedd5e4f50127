"""A client that knows nothing of kvtier: services, methods and requests are found by reflection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

if TYPE_CHECKING:
    from collections.abc import Callable

NOBODY = "nobody"
UNARY_METHODS = 17
ANSWERED = {"GetStatus", "ListPrograms", "ListTtlOverrides"}
INCOMPLETE = {
    "AnnounceToolCall",
    "DeleteTtlOverride",
    "PinProgram",
    "SetTtlOverride",
    "UpdatePolicy",
}
"""What wants more in its request than somebody's name."""


def call_every_unary_method(channel: grpc.Channel) -> dict[str, grpc.StatusCode]:
    """The status of each method of kvtier's services, asked about an unknown program or engine."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = descriptor_pool.DescriptorPool(database)
    found: dict[str, grpc.StatusCode] = {}
    for service in sorted(database.get_services()):
        if not service.startswith("kvtier."):
            continue
        for method in pool.FindServiceByName(service).methods:
            if method.server_streaming:
                continue
            request = message_factory.GetMessageClass(method.input_type)()
            for name in {"name", "engine_id"} & set(method.input_type.fields_by_name):
                setattr(request, name, NOBODY)
            call = channel.unary_unary(
                f"/{service}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=message_factory.GetMessageClass(
                    method.output_type
                ).FromString,
            )
            try:
                call(request, timeout=20)
            except grpc.RpcError as error:
                found[method.name] = error.code()
            else:
                found[method.name] = grpc.StatusCode.OK
    return found


def watch_an_event(channel: grpc.Channel, happen: Callable[[], None]) -> Any:
    """The first event of kvtier's streaming method, once it has begun and something has happened."""
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    service = pool.FindServiceByName("kvtier.v1.ObservabilityService")
    (method,) = (method for method in service.methods if method.server_streaming)
    call = channel.unary_stream(
        f"/{service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    stream = call(message_factory.GetMessageClass(method.input_type)(), timeout=20)
    stream.initial_metadata()
    happen()
    found = next(stream)
    stream.cancel()
    return found.event


def expected_of(method: str) -> grpc.StatusCode:
    """What a method answers to such a request where an engine is connected."""
    if method in ANSWERED:
        return grpc.StatusCode.OK
    invalid = method in INCOMPLETE
    return grpc.StatusCode.INVALID_ARGUMENT if invalid else grpc.StatusCode.NOT_FOUND
