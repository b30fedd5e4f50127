"""`TtlService` from outside, and how overrides reach engines and survive restarts."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from kvtier import link_messages as link
from kvtier.control import override_book
from kvtier.v1 import program_pb2, ttl_pb2
from tests.unit.control.control_host import Host, Refused, in_background, program, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.control.control_host import FakeEngine

SCOPES: dict[str, dict[str, Any]] = {
    "program": {"program": {"name": "agent", "tenant": "acme"}},
    "tool": {"tool": "bash"},
    "tenant": {"tenant": "acme"},
    "all": {"all": True},
}


def override(
    scope: dict[str, Any], mode: int = ttl_pb2.TTL_MODE_CAP, ttl_s: int = 5, **fields: Any
) -> ttl_pb2.TtlOverride:
    return ttl_pb2.TtlOverride(
        scope=ttl_pb2.TtlScope(**scope), mode=mode, ttl=Duration(seconds=ttl_s), **fields
    )


def set_one(host: Host, *args: Any, **fields: Any) -> ttl_pb2.SetTtlOverrideResponse:
    request = ttl_pb2.SetTtlOverrideRequest(override=override(*args, **fields))
    return host.client.ttl.SetTtlOverride(request)


def listed(host: Host) -> list[ttl_pb2.TtlOverride]:
    return list(host.client.ttl.ListTtlOverrides(ttl_pb2.ListTtlOverridesRequest()).overrides)


def in_seconds(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(time.time() + seconds))


# -- reaching engines --------------------------------------------------------------------------------


def test_a_set_override_reaches_the_engines_that_are_there_and_those_that_come(
    host: Host, engine: FakeEngine
) -> None:
    idle = host.engine("engine-1")
    idle.join()
    result = in_background(lambda: set_one(host, SCOPES["program"], ttl_s=7))
    command = engine.next(link.OverridesCommand)
    wanted = [link.TtlOverride(mode="cap", ttl_s=7.0, program=program("agent", "acme"))]
    assert command.overrides == wanted
    engine.answer(command)
    answer = result()
    assert (answer.engines, answer.saved) == (1, True)
    assert answer.override == override(SCOPES["program"], ttl_s=7)
    # The idle one takes it when it runs.
    command = idle.next(link.OverridesCommand)
    assert command.overrides == wanted
    assert host.engine("engine-2").join() == wanted


def test_one_list_at_a_time_is_on_its_way_to_an_engine_and_the_next_is_the_newest(
    host: Host, engine: FakeEngine
) -> None:
    for ttl_s in range(5):
        assert set_one(host, SCOPES["all"], ttl_s=ttl_s).engines == 0
    first = engine.next(link.OverridesCommand)
    assert [o.ttl_s for o in first.overrides] == [0.0]
    assert engine.says_nothing()
    engine.answer(first)
    second = engine.next(link.OverridesCommand)
    assert [o.ttl_s for o in second.overrides] == [4.0]
    engine.answer(second)
    engine.settle()
    assert engine.says_nothing()


def test_a_list_whose_answer_is_lost_is_sent_again(host: Host, engine: FakeEngine) -> None:
    engine.knows(program())
    set_one(host, SCOPES["all"])
    engine.next(link.OverridesCommand)
    request = program_pb2.EndProgramRequest(name="agent")
    result = in_background(lambda: host.client.programs.EndProgram(request))
    # An answer tells that those before it will not come.
    engine.answer(engine.next(link.EndCommand))
    result()
    assert len(engine.next(link.OverridesCommand).overrides) == 1


def test_an_answer_to_an_older_list_does_not_count_for_the_newest(
    host: Host, engine: FakeEngine
) -> None:
    lists = []
    for _ in range(2):
        engine.send(engine.hello)
        lists.append(engine.next(link.OverridesCommand))
    result = in_background(lambda: set_one(host, SCOPES["all"]))
    # The change waits for the answer to the last list, and the one before says nothing of it.
    engine.answer(lists[0])
    assert engine.says_nothing(50)
    engine.answer(lists[1])
    newest = engine.next(link.OverridesCommand)
    assert len(newest.overrides) == 1
    engine.answer(newest)
    assert result().engines == 1


def test_an_override_of_a_program_known_by_its_prefix_names_it_as_the_engine_does(
    host: Host, engine: FakeEngine
) -> None:
    engine.knows(program("req-1#1", named=False))
    set_one(host, {"program": {"name": "req-1#1"}})
    command = engine.next(link.OverridesCommand)
    assert command.overrides[0].program == program("req-1#1", named=False)


def test_an_override_that_expires_is_taken_from_the_engines(host: Host, engine: FakeEngine) -> None:
    soon = Timestamp()
    soon.FromNanoseconds(int((time.time() + 1.5) * 1e9))
    result = in_background(lambda: set_one(host, SCOPES["tool"], expires_at=soon))
    command = engine.next(link.OverridesCommand)
    assert command.overrides[0].expires_s == pytest.approx(soon.ToNanoseconds() / 1e9, abs=1e-3)
    engine.answer(command)
    assert result().engines == 1
    command = engine.next(link.OverridesCommand)
    assert command.overrides == []
    engine.answer(command)
    assert listed(host) == []


# -- the list ----------------------------------------------------------------------------------------


def test_overrides_are_listed_the_most_specific_first_and_replaced_by_scope(host: Host) -> None:
    for scope in reversed(SCOPES.values()):
        set_one(host, scope, ttl_s=1)
    set_one(host, SCOPES["tool"], ttl_pb2.TTL_MODE_FLOOR, 9)
    found = listed(host)
    assert [o.scope.WhichOneof("scope") for o in found] == ["program", "tool", "tenant", "all"]
    assert (found[1].mode, found[1].ttl.seconds) == (ttl_pb2.TTL_MODE_FLOOR, 9)


def test_pages_of_overrides_stay_right_while_some_come_and_go(host: Host) -> None:
    for n in range(1, 8):
        set_one(host, {"tool": f"t{n}"})
    client = host.client
    request = ttl_pb2.ListTtlOverridesRequest(page_size=3)
    answer = client.ttl.ListTtlOverrides(request)
    assert [o.scope.tool for o in answer.overrides] == ["t1", "t2", "t3"]
    set_one(host, {"tool": "t0"})
    client.ttl.DeleteTtlOverride(ttl_pb2.DeleteTtlOverrideRequest(scope={"tool": "t3"}))
    client.ttl.DeleteTtlOverride(ttl_pb2.DeleteTtlOverrideRequest(scope={"tool": "t5"}))
    request.page_token = answer.next_page_token
    answer = client.ttl.ListTtlOverrides(request)
    assert [o.scope.tool for o in answer.overrides] == ["t4", "t6", "t7"]
    assert answer.next_page_token == ""
    request.page_token = "bad"
    assert list(Refused(lambda: client.ttl.ListTtlOverrides(request)).fields) == ["page_token"]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_deleted_override_is_gone_and_a_second_time_not_found(host: Host, scope: str) -> None:
    set_one(host, SCOPES[scope])
    request = ttl_pb2.DeleteTtlOverrideRequest(scope=ttl_pb2.TtlScope(**SCOPES[scope]))
    assert host.client.ttl.DeleteTtlOverride(request).saved
    assert listed(host) == []
    refused = Refused(lambda: host.client.ttl.DeleteTtlOverride(request))
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.NOT_FOUND,
        "TTL_OVERRIDE_NOT_FOUND",
    )


def test_there_is_a_limit_on_overrides_that_replacing_does_not_reach(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(override_book, "MAX_OVERRIDES", 2)
    set_one(host, {"tool": "a"})
    set_one(host, {"tool": "b"})
    set_one(host, {"tool": "b"}, ttl_s=6)
    refused = Refused(lambda: set_one(host, {"tool": "c"}))
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.details["QuotaFailure"].violations[0].subject == "overrides"
    # Waiting does not help.
    assert "RetryInfo" not in refused.details


# -- restarts ----------------------------------------------------------------------------------------


def test_overrides_survive_a_restart_but_those_that_have_expired(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        for scope in SCOPES.values():
            set_one(host, scope, expires_at=in_seconds(3600))
        before = listed(host)
        path = host.settings.control_state_file
        assert path is not None
    content = json.loads(path.read_text())
    content["overrides"][3]["expires_s"] = time.time() - 1
    path.write_text(json.dumps(content))
    with Host(tmp_path) as host:
        assert listed(host) == before[:3]
        assert len(host.engine().join()) == 3


@pytest.mark.parametrize("content", [b'{"version": 1, "overri', b'{"version": 2, "overrides": []}'])
def test_a_state_file_that_cannot_be_used_is_kept_and_the_server_serves(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "overrides.json"
    file.write_bytes(content)
    with Host(tmp_path, state_file=str(file)) as host:
        assert "that is ignored" in caplog.text
        assert listed(host) == []
        assert set_one(host, SCOPES["all"]).saved is True
    (copy,) = tmp_path.glob("overrides.json.ignored-*")
    assert copy.read_bytes() == content
    with Host(tmp_path, state_file=str(file)) as host:
        assert len(listed(host)) == 1


def test_an_override_that_cannot_be_saved_holds_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Host(tmp_path, state_file=str(tmp_path / "file" / "below")) as host:
        assert set_one(host, SCOPES["all"]).saved is False
        assert len(listed(host)) == 1
        request = ttl_pb2.DeleteTtlOverrideRequest(scope=ttl_pb2.TtlScope(all=True))
        assert host.client.ttl.DeleteTtlOverride(request).saved is False


def test_an_engine_that_the_server_does_not_know_is_asked_and_gets_the_list(
    tmp_path: Path,
) -> None:
    with Host(tmp_path) as host:
        set_one(host, SCOPES["tool"])
    with Host(tmp_path) as host:
        engine = host.engine()
        engine.send(link.Answered(engine_id="engine-0", answers=[]))
        engine.next(link.Resync)
        assert [o.tool for o in engine.join()] == ["bash"]
        assert wait_until(
            lambda: host.call(lambda: len(host.server.registry)) == 1, "the engine is known"
        )


# -- bad requests ------------------------------------------------------------------------------------

LONG = "x" * 257
BAD: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"override.scope", "override.mode", "override.ttl"}),
    ({"scope": {}}, {"override.scope"}),
    ({"scope": {"all": False}}, {"override.scope.all"}),
    ({"scope": {"tool": ""}}, {"override.scope.tool"}),
    ({"scope": {"tool": LONG}}, {"override.scope.tool"}),
    ({"scope": {"tenant": ""}}, {"override.scope.tenant"}),
    ({"scope": {"tenant": LONG}}, {"override.scope.tenant"}),
    ({"scope": {"program": {}}}, {"override.scope.program.name"}),
    (
        {"scope": {"program": {"name": "\t", "tenant": LONG}}},
        {"override.scope.program.name", "override.scope.program.tenant"},
    ),
    ({"mode": 0}, {"override.mode"}),
    ({"mode": 17}, {"override.mode"}),
    ({"ttl": Duration(seconds=-1)}, {"override.ttl"}),
    ({"ttl": Duration(seconds=604_801)}, {"override.ttl"}),
    ({"expires_at": Timestamp(seconds=1)}, {"override.expires_at"}),
    ({"expires_at": Timestamp(seconds=2**62)}, {"override.expires_at"}),
    ({"expires_at": Timestamp(nanos=-1)}, {"override.expires_at"}),
]


def test_every_bad_field_is_named_and_nothing_is_set(host: Host, engine: FakeEngine) -> None:
    good = {"scope": {"all": True}, "mode": ttl_pb2.TTL_MODE_CAP, "ttl": Duration(seconds=1)}
    client = host.client
    for fields, names in BAD:
        content = {**good, **fields} if fields else {}
        request = ttl_pb2.SetTtlOverrideRequest(override=ttl_pb2.TtlOverride(**content))
        refused = Refused(lambda request=request: client.ttl.SetTtlOverride(request))  # type: ignore[misc]
        assert refused.code == grpc.StatusCode.INVALID_ARGUMENT, fields
        assert set(refused.fields) == names, fields
        assert all("accepted" in text for text in refused.fields.values()), refused.fields
    refused = Refused(lambda: client.ttl.DeleteTtlOverride(ttl_pb2.DeleteTtlOverrideRequest()))
    assert set(refused.fields) == {"scope"}
    assert listed(host) == []
    assert engine.says_nothing()


def test_a_ttl_of_0_and_one_of_7_days_are_accepted(host: Host) -> None:
    for ttl_s in (0, 604_800):
        set_one(host, SCOPES["all"], ttl_pb2.TTL_MODE_FIXED, ttl_s)
        assert listed(host)[0].ttl.seconds == ttl_s
