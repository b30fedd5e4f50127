"""`PolicyService` from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import msgspec
import pytest
from google.protobuf.duration_pb2 import Duration

from kvtier import link_messages as link
from kvtier.v1 import outcome_pb2, policy_pb2
from tests.unit.control.control_host import POLICY, Refused, in_background

if TYPE_CHECKING:
    from tests.unit.control.control_host import FakeEngine, Host

ALL_FIELDS = {
    "mode": policy_pb2.MODE_SHADOW,
    "pin_budget_fraction": 0.25,
    "max_ttl": Duration(seconds=60),
    "admission": policy_pb2.ADMISSION_OFF,
    "aging": Duration(),
    "max_defer": Duration(seconds=9),
    "stage": False,
    "tenant_budgets": [
        policy_pb2.TenantBudget(tenant="acme", byte_seconds=5, period=Duration(seconds=10)),
        policy_pb2.TenantBudget(byte_seconds=0, period=Duration(seconds=1)),
    ],
}


def update(paths: list[str], engine_id: str = "", **policy: Any) -> policy_pb2.UpdatePolicyRequest:
    request = policy_pb2.UpdatePolicyRequest(
        policy=policy_pb2.Policy(**policy), engine_id=engine_id
    )
    request.update_mask.paths.extend(paths)
    return request


def test_the_policy_of_each_engine_is_what_it_said_last(host: Host, engine: FakeEngine) -> None:
    host.engine("engine-1", policy=msgspec.structs.replace(POLICY, mode="off")).join()
    found = host.client.policy.GetPolicy(policy_pb2.GetPolicyRequest()).policies
    assert [(p.engine_id, p.policy.mode) for p in found] == [
        ("engine-0", policy_pb2.MODE_ON),
        ("engine-1", policy_pb2.MODE_OFF),
    ]
    policy = found[0].policy
    assert (policy.pin_budget_fraction, policy.max_ttl.seconds) == (0.5, 600)
    assert policy.admission == policy_pb2.ADMISSION_WORKING_SET
    assert (policy.aging.seconds, policy.max_defer.seconds, policy.stage) == (600, 3600, True)
    (found,) = host.client.policy.GetPolicy(
        policy_pb2.GetPolicyRequest(engine_id="engine-1")
    ).policies
    assert found.engine_id == "engine-1"


def test_an_update_sends_what_the_mask_names_and_shows_what_came_of_it(
    host: Host, engine: FakeEngine
) -> None:
    request = update(["pin_budget_fraction", "max_ttl"], **ALL_FIELDS)
    result = in_background(lambda: host.client.policy.UpdatePolicy(request))
    command = engine.next(link.PolicyCommand)
    assert command == link.PolicyCommand(
        id=command.id, asked_s=command.asked_s, pin_budget_fraction=0.25, max_ttl_s=60.0
    )
    now = msgspec.structs.replace(POLICY, pin_budget_fraction=0.25, max_ttl_s=60.0)
    engine.answer(command, policy=now)
    answer = result()
    assert answer.results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED
    assert answer.policies[0].policy.pin_budget_fraction == 0.25
    (found,) = host.client.policy.GetPolicy(policy_pb2.GetPolicyRequest()).policies
    assert found.policy.max_ttl.seconds == 60


def test_every_field_can_be_updated(host: Host, engine: FakeEngine) -> None:
    request = update(list(ALL_FIELDS), **ALL_FIELDS)
    assert set(ALL_FIELDS) == set(policy_pb2.Policy.DESCRIPTOR.fields_by_name)
    result = in_background(lambda: host.client.policy.UpdatePolicy(request))
    command = engine.next(link.PolicyCommand)
    assert command == link.PolicyCommand(
        id=command.id,
        asked_s=command.asked_s,
        mode="shadow",
        pin_budget_fraction=0.25,
        max_ttl_s=60.0,
        admission="off",
        aging_s=0.0,
        max_defer_s=9.0,
        stage=False,
        tenant_budgets=[link.TenantBudget("acme", 5, 10.0), link.TenantBudget(None, 0, 1.0)],
    )
    engine.answer(command, "rejected", "contradiction", policy=POLICY)
    assert result().results[0].reason == "contradiction"


def test_an_update_may_be_for_one_engine_and_an_unknown_one_is_not_found(
    host: Host, engine: FakeEngine
) -> None:
    second = host.engine("engine-1")
    second.join()
    request = update(["stage"], "engine-1", stage=True)
    result = in_background(lambda: host.client.policy.UpdatePolicy(request))
    command = second.next(link.PolicyCommand)
    assert command.stage is True
    second.answer(command, policy=POLICY)
    assert [p.engine_id for p in result().policies] == ["engine-1"]
    assert engine.says_nothing()
    for call in (
        lambda: host.client.policy.UpdatePolicy(update(["stage"], "nobody", stage=True)),
        lambda: host.client.policy.GetPolicy(policy_pb2.GetPolicyRequest(engine_id="nobody")),
    ):
        refused = Refused(call)
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.NOT_FOUND,
            "ENGINE_NOT_FOUND",
        )


BUDGET = {"tenant": "a", "byte_seconds": 1, "period": Duration(seconds=1)}
BAD: list[tuple[policy_pb2.UpdatePolicyRequest, set[str]]] = [
    (update([]), {"update_mask"}),
    (update(["*"]), {"update_mask.paths[0]"}),
    (update(["stage", "nonsense"], stage=True), {"update_mask.paths[1]"}),
    (update(["tenant_budgets.tenant"]), {"update_mask.paths[0]"}),
    (update(["stage"] * 65), {"update_mask"}),
    (update(["mode"]), {"policy.mode"}),
    (update(["mode"], mode=9), {"policy.mode"}),
    (update(["admission"]), {"policy.admission"}),
    (update(["pin_budget_fraction"], pin_budget_fraction=1.01), {"policy.pin_budget_fraction"}),
    (update(["pin_budget_fraction"], pin_budget_fraction=-0.1), {"policy.pin_budget_fraction"}),
    (
        update(["pin_budget_fraction"], pin_budget_fraction=float("nan")),
        {"policy.pin_budget_fraction"},
    ),
    (update(["max_ttl"]), {"policy.max_ttl"}),
    (update(["max_ttl"], max_ttl=Duration(seconds=-1)), {"policy.max_ttl"}),
    (update(["aging"], aging=Duration(seconds=10**9)), {"policy.aging"}),
    (update(["max_defer"], max_defer=Duration(nanos=-1)), {"policy.max_defer"}),
    (
        update(["tenant_budgets"], tenant_budgets=[BUDGET, BUDGET]),
        {"policy.tenant_budgets[1].tenant"},
    ),
    (
        update(["tenant_budgets"], tenant_budgets=[{"tenant": "a\n", "byte_seconds": -1}]),
        {f"policy.tenant_budgets[0].{name}" for name in ("tenant", "byte_seconds", "period")},
    ),
    (
        update(["tenant_budgets"], tenant_budgets=[BUDGET] * 257),
        {"policy.tenant_budgets"},
    ),
    (update(["stage"], "x" * 257, stage=True), {"engine_id"}),
]


def test_every_bad_field_is_named_and_no_engine_hears_of_it(host: Host, engine: FakeEngine) -> None:
    client = host.client
    for request, names in BAD:
        refused = Refused(lambda request=request: client.policy.UpdatePolicy(request))  # type: ignore[misc]
        assert refused.code == grpc.StatusCode.INVALID_ARGUMENT, request
        assert set(refused.fields) == names, request
        assert all("accepted" in text for text in refused.fields.values()), refused.fields
    assert engine.says_nothing()


@pytest.mark.parametrize("call", ["GetPolicy", "UpdatePolicy"])
def test_without_an_engine_there_is_no_policy(host: Host, call: str) -> None:
    request = (
        policy_pb2.GetPolicyRequest() if call == "GetPolicy" else update(["stage"], stage=True)
    )
    refused = Refused(lambda: getattr(host.client.policy, call)(request))
    assert refused.code == grpc.StatusCode.UNAVAILABLE
