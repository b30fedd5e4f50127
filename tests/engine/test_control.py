"""The control API from outside, on `kvtier serve`: real vLLM, LMCache and control server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from kvtier.client import NotFound, TtlScope
from kvtier.server.files import SERVER_NAME, ServerFiles
from tests.engine.engine_harness import BLOCK_TOKENS
from tests.engine.served import N_BLOCKS, Served, serving
from tests.unit.control.otlp_collector import Collector
from tests.unit.control.strangers import UNARY_METHODS, call_every_unary_method, expected_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


N_BLOCKS_USABLE = N_BLOCKS - 1
"""vLLM keeps one for itself."""
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def served(
    model_dir: Path, run_dir: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Served]:
    with serving(
        model_dir,
        run_dir,
        tmp_path_factory.mktemp("control"),
        flags=("--otlp-traces-endpoint", collector.endpoint),
        settings={"kvtier.control_otlp_endpoint": collector.endpoint},
        env={
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        },
    ) as found:
        yield found


def test_a_human_sees_the_engine(served: Served) -> None:
    served.turn("seen")
    (engine,) = served.client.get_status().engines
    assert engine.wakeable
    assert engine.cpu.state == "ready"
    assert engine.gpu.total_bytes > 0
    assert {"vllm", "kvtier", "lmcache", "torch", "python"} <= set(engine.versions)
    program = served.program("seen")
    assert (program.state, program.turns, program.context_tokens) == ("paused", 1, 648)
    assert program.tool == "bash"

    env = {**os.environ, "KVTIER_CONTROL_TARGET": served.socket}
    shown = subprocess.run(
        [sys.executable, "-m", "kvtier.cli", "programs", "get", "seen", "--json"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "seen" in shown.stdout


def test_overrides_decide_about_the_next_pause(served: Served) -> None:
    scope = TtlScope.of_tool("bash")
    applied = served.client.set_ttl_override(scope, 0.0)
    assert applied.engines == 1
    told = served.turn("bound")
    assert (told["pinned_blocks"], told["reason"]) == (0, "override_fixed")
    served.program("bound")
    assert served.client.explain_decision("bound")[0].reason == "override_fixed"

    served.client.set_ttl_override(scope, 60.0)
    told = served.turn("bound")
    assert told["pinned_blocks"] > 0
    assert told["ttl_s"] == 60.0
    program = served.program("bound")
    (decision, *_) = [d for d in served.client.explain_decision("bound") if d.event == "pause"]
    assert (decision.action, decision.ttl_s) == ("pin", pytest.approx(60.0))
    assert {cost.option for cost in decision.costs} >= {"drop", "pin"}
    assert program.ttl_left_s is not None
    assert 0 < program.ttl_left_s <= 60.0
    assert [o.scope for o in served.client.iter_ttl_overrides()] == [scope]
    served.client.delete_ttl_override(scope)
    assert not list(served.client.iter_ttl_overrides())


def test_release_frees_the_blocks_of_an_idle_engine(served: Served) -> None:
    served.turn("released", ttl_s=300.0)
    assert served.program("released").gpu_pinned_tokens > 0
    while served.program("released").cpu_tokens < 640:  # copies hold blocks, too
        pass
    (result,) = served.client.release_program("released")
    assert result.outcome in {"accepted", "clipped"}, result
    assert served.program("released").gpu_pinned_tokens == 0
    # The engine does nothing more, and its figures are right: the server's and vLLM's.
    (engine,) = served.client.get_status().engines
    assert engine.gpu.free_bytes + engine.gpu.pinned_bytes == engine.gpu.total_bytes
    block_bytes = engine.gpu.total_bytes // N_BLOCKS_USABLE
    pinned_tokens = sum(program.gpu_pinned_tokens for program in served.client.iter_programs())
    assert engine.gpu.pinned_bytes == pinned_tokens // BLOCK_TOKENS * block_bytes
    while served.metric("pinned_bytes") != engine.gpu.pinned_bytes:
        pass
    assert served.metric("pin_releases_total", cause="command") == 1
    assert served.metric("commands_total", command="release", outcome=str(result.outcome)) == 1
    (decision,) = served.client.explain_decision("released", limit=1)
    assert (decision.event, decision.reason) == ("release", "command")
    (again,) = served.client.release_program("released")
    assert (again.outcome, again.reason) == ("missing", "no_pin")


def test_a_returned_tool_brings_the_kv_back_before_the_turn(served: Served) -> None:
    served.turn("back")
    while served.program("back").cpu_tokens < 640:
        pass
    served.client.release_program("back")
    # Others take its place in GPU memory.
    for i in range(4):
        served.turn(f"other-{i}", 1000, ttl_s=0.0)
    before = {
        source: served.metric("prompt_tokens_total", source=source) for source in ("gpu_pin", "cpu")
    }
    while served.program("back").gpu_pinned_tokens < 640:
        # Again: on a busy machine a lookup may be given up, and nothing else is to be waited for.
        (result,) = served.client.announce_tool_return("back")
        assert result.outcome == "accepted" or result.reason == "busy", result
    served.turn("back", 64)
    # Found in GPU memory, by a pin that the announcement began: nothing to wait for.
    assert served.metric("prompt_tokens_total", source="gpu_pin") - before["gpu_pin"] >= 640
    assert served.metric("prompt_tokens_total", source="cpu") == before["cpu"]
    assert served.metric("prefetched_tokens_total") >= 640
    explained = served.client.explain_decision("back")
    assert ("prefetch", "end", "loaded") in [(d.event, d.action, d.reason) for d in explained]

    # Without an announcement the same turn loads it while it waits.
    while served.program("back").cpu_tokens < 704:
        pass
    served.client.release_program("back")
    for i in range(4):
        served.turn(f"other-{i}", 100, ttl_s=0.0)
    served.turn("back", 64)
    assert served.metric("prompt_tokens_total", source="cpu") - before["cpu"] >= 640


def test_decisions_are_in_the_traces_of_their_requests(
    served: Served, collector: Collector
) -> None:
    served.turn("traced", headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
    # With vLLM's own, so the header took the way of every request's.
    collector.wait_for(lambda: collector.names_in(TRACE) >= {"llm_request", "kvtier.pause"})


def test_the_end_of_a_program_is_the_end_of_its_kv(served: Served) -> None:
    served.turn("ended")
    served.program("ended")
    (result,) = served.client.end_program("ended")
    assert result.outcome == "accepted"
    with pytest.raises(NotFound):
        served.client.get_program("ended")


def test_strangers_tools_work(served: Served) -> None:
    """Reflection, health and every method, with clients that know nothing of kvtier."""
    with grpc.insecure_channel(served.socket) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        services = {f"kvtier.v1.{n}Service" for n in ("Program", "Ttl", "Policy", "Observability")}
        assert services | {"grpc.health.v1.Health"} <= names
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", *services):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        found = call_every_unary_method(channel)
    assert len(found) == UNARY_METHODS
    assert found == {method: expected_of(method) for method in found}


def test_an_idle_engine_without_its_tier_is_seen_and_gets_it_back_without_a_request(
    served: Served, run_dir: Path
) -> None:
    """The last test of the module: what was in the CPU tier is gone."""
    served.turn("idle")
    (engine,) = served.client.get_status().engines
    assert engine.cpu.state == "ready"
    record = ServerFiles(run_dir, SERVER_NAME).read_record()
    assert record is not None
    assert record.server is not None
    with grpc.insecure_channel(served.socket) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="kvtier.v1.ProgramService"), timeout=120
        )
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        os.kill(record.server.pid, signal.SIGKILL)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        (engine,) = served.client.get_status().engines
        assert engine.cpu.state != "ready"
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
    (engine,) = served.client.get_status().engines
    assert engine.cpu.state == "ready"
