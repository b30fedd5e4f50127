"""`ObservabilityService` from outside: status, reasons, and events that nobody can dam up."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
import pytest

from kvtier import link_messages as link
from kvtier.control import event_hub
from kvtier.control.api import watched_events
from kvtier.v1 import observability_pb2, outcome_pb2, program_pb2
from tests.unit.control.control_host import (
    BLOCK_BYTES,
    GAUGES,
    Client,
    Host,
    Refused,
    in_background,
    program,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.control.control_host import FakeEngine

NOW_S = 1_700_000_000.0
Watch = observability_pb2.WatchEventsRequest


def decided(
    name: str = "agent", tenant: str | None = None, reason: str = "cheapest"
) -> link.Decided:
    return link.Decided(
        at_s=NOW_S,
        program=program(name, tenant),
        request_id="r",
        event="pause",
        action="pin",
        reason=reason,
        ttl_s=2.5,
        costs=[link.OptionCost("pin", 0.5, {"memory": 0.25}), link.OptionCost("drop", 3.0)],
        inputs={"context_tokens": 9, "tool": None, "late": True, "gap_s": 1 / 3, "why": "x"},
    )


# -- status ------------------------------------------------------------------------------------------


def test_the_status_has_each_engines_figures_in_bytes(host: Host, engine: FakeEngine) -> None:
    silent = host.engine("silent")
    silent.join(None)
    status = host.client.observability.GetStatus(observability_pb2.GetStatusRequest())
    assert status.version
    assert abs(status.started_at.ToSeconds() - time.time()) < 60
    first, second = status.engines
    assert (first.engine_id, first.model, first.mode) == ("engine-0", "small", "on")
    assert first.pid == engine.hello.pid
    assert first.gpu == observability_pb2.GpuTier(
        total_bytes=100 * BLOCK_BYTES,
        free_bytes=60 * BLOCK_BYTES,
        pinned_bytes=10 * BLOCK_BYTES,
        budget_bytes=50 * BLOCK_BYTES,
        programs=1,
    )
    assert (first.cpu.state, first.cpu.total_bytes) == ("ready", 1 << 30)
    assert (first.link.to_cpu_bytes_per_s, first.link.to_gpu_bytes_per_s) == (1e9, 2e9)
    assert first.link.calibrated_at.seconds == NOW_S
    assert first.queue.delay.nanos == 250_000_000
    assert dict(first.versions) == {"kvtier": "0.1.0", "vllm": "0.32.0"}
    assert first.HasField("reported_at")
    assert not first.wakeable
    assert (second.engine_id, second.gpu.total_bytes) == ("silent", 100 * BLOCK_BYTES)
    assert not second.HasField("reported_at")


def test_the_status_is_there_without_an_engine_too(host: Host) -> None:
    status = host.client.observability.GetStatus(observability_pb2.GetStatusRequest())
    assert list(status.engines) == []


# -- reasons -----------------------------------------------------------------------------------------


def explain(host: Host, **fields: Any) -> list[observability_pb2.Decision]:
    request = observability_pb2.ExplainDecisionRequest(**{"name": "agent", **fields})
    return list(host.client.observability.ExplainDecision(request).decisions)


def test_a_decision_is_explained_with_every_options_cost_and_all_inputs(
    host: Host, engine: FakeEngine
) -> None:
    engine.report(decided(reason="first"), decided())
    found, first = explain(host)
    assert (first.reason, found.reason) == ("first", "cheapest")
    assert (found.engine_id, found.request_id, found.event) == ("engine-0", "r", "pause")
    assert (found.action, found.ttl.nanos, found.ttl.seconds) == ("pin", 500_000_000, 2)
    assert [(c.option, c.cost_s, dict(c.parts_s)) for c in found.costs] == [
        ("pin", 0.5, {"memory": 0.25}),
        ("drop", 3.0, {}),
    ]
    assert dict(found.inputs) == {
        "context_tokens": "9",
        "tool": "none",
        "late": "true",
        "gap_s": "0.333333",
        "why": "x",
    }


def test_decisions_are_limited_newest_first_and_outlive_program_and_engine(
    host: Host, engine: FakeEngine
) -> None:
    engine.report(*[decided(reason=f"r{n}") for n in range(20)])
    assert [d.reason for d in explain(host)] == [f"r{n}" for n in range(19, 11, -1)]
    assert len(explain(host, limit=64)) == 16
    assert [d.reason for d in explain(host, limit=1)] == ["r19"]
    engine.send(link.EngineBye(engine_id="engine-0"))
    wait_until(lambda: host.call(lambda: not len(host.server.registry)), "the engine is gone")
    assert len(explain(host)) == 8
    refused = Refused(lambda: explain(host, name="other"))
    assert refused.code == grpc.StatusCode.UNAVAILABLE


def test_a_program_without_decisions_has_none_and_an_unknown_one_is_not_found(
    host: Host, engine: FakeEngine
) -> None:
    engine.knows(program())
    assert explain(host) == []
    assert Refused(lambda: explain(host, tenant="acme")).code == grpc.StatusCode.NOT_FOUND
    refused = Refused(lambda: explain(host, name="", limit=65))
    assert set(refused.fields) == {"name", "limit"}


# -- watching ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def watching(host: Host, client: Client | None = None, **fields: Any) -> Iterator[Any]:
    """A stream of events; from here on nothing is missed."""
    stream = (client or host.client).observability.WatchEvents(Watch(**fields))
    stream.initial_metadata()
    try:
        yield stream
    finally:
        stream.cancel()


EVENTS: dict[str, tuple[Any, dict[str, str]]] = {
    "turn_started": (
        link.TurnStarted(at_s=NOW_S, program=program(), turn=2, prompt_tokens=7, gap_s=0.5),
        {"turn": "2", "prompt_tokens": "7", "gap_s": "0.5"},
    ),
    "turn_running": (
        link.TurnRunning(
            at_s=NOW_S, program=program(), gpu_tokens=1, cpu_tokens=2, recomputed_tokens=3
        ),
        {"gpu_tokens": "1", "cpu_tokens": "2", "recomputed_tokens": "3"},
    ),
    "turn_ended": (
        link.TurnEnded(
            at_s=NOW_S, program=program(), context_tokens=9, output_tokens=2, tool="bash"
        ),
        {"context_tokens": "9", "output_tokens": "2", "tool": "bash", "aborted": "false"},
    ),
    "decision": (decided(), {}),
    "pinned": (
        link.Pinned(at_s=NOW_S, program=program(), tokens=5, deadline_s=NOW_S + 4),
        {"tokens": "5", "ttl_s": "4"},
    ),
    "pin_ended": (
        link.PinEnded(at_s=NOW_S, program=program(), cause="ttl", tokens=5),
        {"cause": "ttl", "tokens": "5"},
    ),
    "staged": (link.Staged(at_s=NOW_S, program=program(), tokens=5), {"tokens": "5"}),
    "loaded": (
        link.Loaded(at_s=NOW_S, program=program(), tokens=5, duration_s=0.25, ok=False),
        {"tokens": "5", "duration_s": "0.25", "ok": "false"},
    ),
    "program_gone": (link.ProgramGone(at_s=NOW_S, program=program()), {}),
}


def test_every_kind_of_event_is_told_with_what_there_is_to_say(
    host: Host, engine: FakeEngine
) -> None:
    with watching(host) as stream:
        assert (
            host.client.observability.GetStatus(observability_pb2.GetStatusRequest()).watchers == 1
        )
        for kind, (event, fields) in EVENTS.items():
            engine.report(event)
            found = next(item.event for item in stream if item.event.kind != "command")
            assert (found.kind, dict(found.fields)) == (kind, fields)
            assert (found.engine_id, found.name, found.tenant) == ("engine-0", "agent", "")
            assert found.happened_at.seconds == NOW_S
        assert found.HasField("decision") is False
    assert set(EVENTS) | {"command", "engine"} == set(watched_events.KINDS)
    wait_until(lambda: host.call(lambda: not len(host.server.hub)), "the watcher is gone")


def test_a_decision_is_told_as_it_is_explained(host: Host, engine: FakeEngine) -> None:
    with watching(host, kinds=["decision"]) as stream:
        engine.report(decided())
        assert next(stream).event.decision == explain(host)[0]


def test_engines_that_come_and_go_and_their_tiers_are_told(host: Host) -> None:
    with watching(host, kinds=["engine"]) as stream:
        engine = host.engine()
        engine.join()
        engine.report(gauges=msgspec.structs.replace(GAUGES, tier_state="lost"))
        engine.send(link.EngineBye(engine_id="engine-0"))
        found = [next(stream).event for _ in range(4)]
    assert [(e.fields["change"], e.fields["tier_state"]) for e in found] == [
        ("started", ""),
        ("tier", "ready"),
        ("tier", "lost"),
        ("gone", "lost"),
    ]
    assert found[3].fields["cause"] == "bye"


def test_commands_are_told_with_what_became_of_them(host: Host, engine: FakeEngine) -> None:
    engine.knows(program())
    with watching(host, kinds=["command"], name="agent") as stream:
        request = program_pb2.EndProgramRequest(name="agent")
        result = in_background(lambda: host.client.programs.EndProgram(request))
        engine.answer(engine.next(link.EndCommand), "rejected", "running", "a turn is under way")
        result()
        found = next(stream).event
    assert (found.kind, found.name) == ("command", "agent")
    assert dict(found.fields) == {
        "command": "end",
        "outcome": "rejected",
        "reason": "running",
        "detail": "a turn is under way",
    }


def ends_of(stream: Any, count: int) -> list[tuple[str, str]]:
    found = [next(stream).event.fields for _ in range(count)]
    return [(fields["outcome"], fields["reason"]) for fields in found]


@pytest.mark.parametrize("how", ["reconnected", "later answer", "engine_gone", "server_stops"])
def test_a_deferred_command_that_gets_lost_is_told_and_counted(
    host: Host, engine: FakeEngine, how: str
) -> None:
    engine.knows(program())
    request = program_pb2.StageProgramRequest(name="agent")
    with watching(host, kinds=["command"], name="agent") as stream:
        (found,) = host.client.programs.StageProgram(request).results
        assert found.outcome == outcome_pb2.OUTCOME_DEFERRED
        match how:
            case "reconnected":
                host.engine().join()
            case "later answer":
                engine.next(link.StageCommand)
                engine.settle()
            case "engine_gone":
                engine.send(link.EngineBye(engine_id="engine-0"))
            case _:
                host.stop()
        reason = "reconnected" if how == "later answer" else how
        assert ends_of(stream, 2) == [("deferred", "not_answered"), ("rejected", reason)]
        if how == "server_stops":
            refused = Refused(lambda: next(stream))
            assert refused.reason == "SERVER_STOPS"
            assert refused.details["RetryInfo"].retry_delay.seconds > 0
            return
    told = {"command": "stage", "outcome": "rejected"}
    assert host.sample("kvtier_control_commands_total", **told) == 1


def test_a_command_that_cannot_be_sent_is_told_and_counted(host: Host, engine: FakeEngine) -> None:
    engine.knows(program())
    engine.socket.close()
    request = program_pb2.StageProgramRequest(name="agent")

    def reason() -> str:
        (found,) = host.client.programs.StageProgram(request).results
        return str(found.reason)

    with watching(host, kinds=["command"], name="agent") as stream:
        wait_until(lambda: reason() == "unreachable", "the server knows that the link is down")
        while ends_of(stream, 1) != [("rejected", "unreachable")]:
            pass
    told = {"command": "stage", "outcome": "rejected"}
    assert host.sample("kvtier_control_commands_total", **told) == 1


def test_a_watcher_sees_what_it_asked_for_only(host: Host, engine: FakeEngine) -> None:
    events = [
        decided(name, tenant, f"{name}-{tenant}")
        for name, tenant in itertools.product(["a", "b"], [None, "acme"])
    ]
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"kinds": ["decision"]}, ["a-None", "a-acme", "b-None", "b-acme"]),
        ({"kinds": ["decision"], "name": "a"}, ["a-None"]),
        ({"kinds": ["decision"], "name": "a", "tenant": "acme"}, ["a-acme"]),
        ({"kinds": ["decision"], "tenant": "acme"}, ["a-acme", "b-acme"]),
    ]
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(watching(host, **fields)) for fields, _ in cases]
        engine.report(*events, link.ProgramGone(at_s=NOW_S, program=program("a")))
        for stream, (_, reasons) in zip(streams, cases, strict=True):
            assert [next(stream).event.decision.reason for _ in reasons] == reasons


def test_what_an_engine_could_not_report_is_told_as_lost(host: Host, engine: FakeEngine) -> None:
    with (
        watching(host) as all_events,
        watching(host, kinds=["decision"]) as decisions,
        watching(host, tenant="acme") as tenant,
    ):
        engine.report(lost=12)
        assert next(all_events).lost == 12
        # Whose they were is not known, and how much others do is nobody's business.
        assert (next(decisions).lost, next(tenant).lost) == (1, 1)


def test_what_comes_from_an_engine_that_must_say_hello_first_is_told_as_lost(
    host: Host, engine: FakeEngine
) -> None:
    """It has connected anew and does not know it, or the server has begun anew."""
    again = host.engine()
    with watching(host) as stream:
        happened = link.TurnStarted(at_s=1.0, program=program(), turn=1, prompt_tokens=9)
        again.send(
            link.Report(
                engine_id="engine-0", sent_s=1.0, events=[happened] * 3, gauges=GAUGES, lost=4
            )
        )
        again.next(link.Resync)
        assert next(stream).lost == 7
    assert host.sample("kvtier_control_lost_events_total", where="engine") == 7


def test_a_stuck_watcher_is_told_what_it_lost_and_holds_up_nobody(
    host: Host, engine: FakeEngine
) -> None:
    total, batch, padding = 8_000, 400, "x" * 2000
    seen: list[int] = []
    lost_to_the_quick_one: list[int] = []

    def read(stream: Any) -> None:
        for item in stream:
            if item.WhichOneof("item") == "lost":
                lost_to_the_quick_one.append(item.lost)
            else:
                seen.append(int(item.event.request_id[:6]))
                if seen[-1] == total - 1:
                    return

    # Little of what is sent waits on the way: what is not read stays at the server.
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    channel = host.channel(options=narrow)
    with (
        watching(host, Client(channel), kinds=["staged"]) as stuck,
        watching(host, kinds=["staged"]) as quick,
    ):
        reader = threading.Thread(target=read, args=(quick,))
        reader.start()
        for start in range(0, total, batch):
            engine.report(
                *[
                    link.Staged(
                        at_s=NOW_S, program=program(), request_id=f"{n:06}{padding}", tokens=n
                    )
                    for n in range(start, start + batch)
                ]
            )
            wait_until(lambda start=start: len(seen) >= start, "the quick reader keeps up")  # type: ignore[misc]
        reader.join(20)
        assert seen == list(range(total))
        assert lost_to_the_quick_one == []
        waiting = host.call(lambda: sorted(len(w) for w in host.server.hub._watchers))
        assert waiting == [0, event_hub.BUFFER_EVENTS]

        got: list[int] = []
        lost = 0
        while not got or got[-1] < total - 1:
            item = next(stuck)
            lost += item.lost
            if item.WhichOneof("item") == "event":
                got.append(int(item.event.request_id[:6]))
    assert got == sorted(got)
    assert lost > 0
    assert len(got) + lost == total
    assert host.sample("kvtier_control_lost_events_total", where="watcher") == lost


def test_watchers_are_limited_and_one_that_goes_makes_room(
    host: Host,
) -> None:
    host.call(lambda: setattr(host.server.hub, "_max_watchers", 1))
    with watching(host):
        refused = Refused(lambda: next(host.client.observability.WatchEvents(Watch())))
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "TOO_MANY_WATCHERS",
        )
    wait_until(lambda: host.call(lambda: not len(host.server.hub)), "the watcher is gone")
    with watching(host):
        pass


def test_watchers_end_with_unavailable_when_the_server_stops(host: Host) -> None:
    with watching(host) as stream:
        host.stop()
        refused = Refused(lambda: next(stream))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPS")


def test_bad_filters_are_named(host: Host) -> None:
    request = Watch(kinds=["decision", "nonsense"], name="a\n", tenant="x" * 257)
    refused = Refused(lambda: next(host.client.observability.WatchEvents(request)))
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(refused.fields) == {"kinds[1]", "name", "tenant"}


# -- calibrating -------------------------------------------------------------------------------------


def test_all_engines_or_one_are_told_to_measure_anew(host: Host, engine: FakeEngine) -> None:
    second = host.engine("engine-1")
    second.join()
    calibrate = observability_pb2.CalibrateRequest
    result = in_background(lambda: host.client.observability.Calibrate(calibrate()))
    for each in (engine, second):
        each.answer(each.next(link.CalibrateCommand))
    assert [r.outcome for r in result().results] == [outcome_pb2.OUTCOME_ACCEPTED] * 2
    result = in_background(
        lambda: host.client.observability.Calibrate(calibrate(engine_id="engine-1"))
    )
    second.answer(second.next(link.CalibrateCommand), "rejected", "busy")
    assert [r.engine_id for r in result().results] == ["engine-1"]
    assert engine.says_nothing()
    refused = Refused(lambda: host.client.observability.Calibrate(calibrate(engine_id="x")))
    assert refused.code == grpc.StatusCode.NOT_FOUND
