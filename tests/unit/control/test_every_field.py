"""No field of any request is forgotten by the checks: each is set to what it must not hold, one by one."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor

from kvtier.v1 import observability_pb2, policy_pb2, program_pb2, ttl_pb2
from tests.unit.control.control_host import Host, Refused, program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

    from tests.unit.control.control_host import FakeEngine

MODULES = (observability_pb2, policy_pb2, program_pb2, ttl_pb2)
NAME: dict[str, Any] = {"name": "agent"}
OVERRIDE = {"scope": {"all": True}, "mode": "TTL_MODE_CAP", "ttl": "1s"}
POLICY: dict[str, Any] = {
    "mode": "MODE_ON",
    "pinBudgetFraction": 0.5,
    "maxTtl": "1s",
    "admission": "ADMISSION_OFF",
    "aging": "1s",
    "maxDefer": "1s",
    "tenantBudgets": [{"tenant": "a", "byteSeconds": "1", "period": "1s"}],
}
GOOD: dict[str, dict[str, Any]] = {
    "PinProgram": {**NAME, "ttl": "1s"},
    "AnnounceToolCall": {**NAME, "tool": "bash"},
    "SetTtlOverride": {"override": OVERRIDE},
    "DeleteTtlOverride": {"scope": {"tool": "bash"}},
    "UpdatePolicy": {
        "policy": POLICY,
        "updateMask": "mode,pinBudgetFraction,maxTtl,admission,aging,maxDefer,tenantBudgets",
    },
    **dict.fromkeys(
        (
            *("GetProgram", "ReleaseProgram", "StageProgram", "PrefetchProgram", "EndProgram"),
            *("AnnounceToolReturn", "ExplainDecision"),
        ),
        NAME,
    ),
}
"""Requests that would be accepted; others are empty."""
ANYTHING = {
    # Both of its values are accepted: the mask says whether it counts.
    "UpdatePolicy.policy.stage",
    # True is the only value that says something, and false is refused: tests of the service.
    "SetTtlOverride.override.scope.all",
    "DeleteTtlOverride.scope.all",
}
TEXTS = ("x" * 10_000, "a\nb", "\x00", "a\u202eb")
ABSURD: dict[str, tuple[Any, ...]] = {
    "FieldMask": ("x", "*", "\x00"),
    "Duration": (-1, 10**10, 2**63 - 1, -(2**63)),
    "Timestamp": (-1, 1, 2**62, -(2**63)),
}


def methods() -> Iterator[tuple[str, str, type[Message]]]:
    for module in MODULES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                made: Any = getattr(module, method.input_type.name)
                yield f"/{service.full_name}/{method.name}", method.name, made


def leaves(message: Descriptor, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all fields that hold a value."""
    for field in message.fields:
        own = (*path, field.name)
        kind = field.message_type
        if kind is None or kind.full_name.startswith("google.protobuf."):
            yield own
        else:
            yield from leaves(kind, own)


def absurd(field: FieldDescriptor, holder: Any) -> Iterator[None]:
    """Put into a field what no field of its kind may hold, one after the other."""
    name = field.name
    if field.message_type is not None:
        kind = field.message_type.name
        for value in ABSURD[kind]:
            holder.ClearField(name)
            if kind == "FieldMask":
                holder.update_mask.paths.append(value)
            else:
                getattr(holder, name).seconds = value
            yield
        return
    for value in _values(field):
        if field.is_repeated:
            holder.ClearField(name)
            getattr(holder, name).append(value)
        else:
            setattr(holder, name, value)
        yield


def _values(field: FieldDescriptor) -> tuple[Any, ...]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return TEXTS
        case FieldDescriptor.CPPTYPE_ENUM:
            return (99, -1)
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return (-0.1, 1.1, float("nan"), float("inf"))
        case FieldDescriptor.CPPTYPE_INT64:
            return (-1, -(2**63))
        case FieldDescriptor.CPPTYPE_INT32:
            return (-1, 2**31 - 1, -(2**31))
    raise AssertionError(field.full_name)


def test_every_field_of_every_request_refuses_what_it_must_not_hold(
    host: Host, engine: FakeEngine
) -> None:
    engine.knows(program())
    channel = host.channel()
    seen = set()
    for path, method, made in methods():
        for leaf in leaves(made.DESCRIPTOR):
            full = ".".join((method, *leaf))
            seen.add(full)
            if full in ANYTHING:
                continue
            request = json_format.Parse(json.dumps(GOOD.get(method, {})), made())
            holder: Any = request
            for name in leaf[:-1]:
                holder = getattr(holder, name)
                if not hasattr(holder, "DESCRIPTOR"):
                    holder = holder[0]
            for _ in absurd(holder.DESCRIPTOR.fields_by_name[leaf[-1]], holder):
                refused = Refused(functools.partial(_call, channel, path, request))
                assert refused.code == grpc.StatusCode.INVALID_ARGUMENT, (full, request)
                named = {_plain(field) for field in refused.fields}
                assert any(_same(".".join(leaf), field) for field in named), (full, named)
    assert seen >= ANYTHING
    assert engine.says_nothing()


def _same(asked: str, named: str) -> bool:
    """Whether an error is about a field, one inside of it, or the one that it is inside of."""
    return f"{asked}.".startswith(f"{named}.") or f"{named}.".startswith(f"{asked}.")


def _plain(field: str) -> str:
    """A field's path without the numbers of repeated fields."""
    return ".".join(part.partition("[")[0] for part in field.split("."))


def _call(channel: grpc.Channel, path: str, request: Message) -> Any:
    method = path.rpartition("/")[2]
    raw = request.SerializeToString()
    if method == "WatchEvents":
        return next(channel.unary_stream(path)(raw, timeout=20))
    return channel.unary_unary(path)(raw, timeout=20)


@pytest.mark.parametrize("module", MODULES)
def test_good_requests_are_of_methods_that_there_are(module: Any) -> None:
    names = {name for _, name, _ in methods()}
    assert set(GOOD) <= names
