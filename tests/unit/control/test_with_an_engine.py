"""The engine's half of kvtier and the control server, steered from outside through gRPC."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from kvtier.control.engine_status import EngineStatus
from kvtier.control.link import EngineLink
from kvtier.v1 import observability_pb2, outcome_pb2, policy_pb2, program_pb2, ttl_pb2
from tests.unit.control.control_host import Host, Refused, in_background, wait_until
from tests.unit.fake_vllm import BLOCK_TOKENS
from tests.unit.mini_engine import MiniEngine
from tests.unit.program_cases import evict, follow_up, prompt, turn
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AGENT = {"name": "agent"}


class Rig:
    """A small engine that is followed by a control server."""

    def __init__(self, host: Host) -> None:
        self.client = host.client
        status: list[EngineStatus] = []
        started_s = time.time()
        began_s = 0.0
        self.link = EngineLink(
            f"ipc://{host.files.link_socket_path}",
            engine_id="engine",
            hello=lambda: status[0].hello(),  # noqa: PLW0108 - it comes later
            read_gauges=lambda: status[0].gauges(),  # noqa: PLW0108
            block_tokens=BLOCK_TOKENS,
            clock=lambda: self.engine.now_s,
            wall_clock=lambda: started_s + self.engine.now_s - began_s,
        )
        self.engine = MiniEngine(link=self.link)
        began_s = self.engine.now_s
        status.append(EngineStatus(self.engine.half, "engine", "a-model", dp_rank=0))
        self.until(lambda: self.status().engines)

    def until(self, condition: Callable[[], Any]) -> Any:
        """Run hooks, as an engine with other work does, until `condition` holds."""

        def holds() -> Any:
            self.engine.now_s += 0.02
            self.engine.wake()
            return condition()

        return wait_until(holds, "it happens")

    def result(self, call: Callable[[], Any]) -> Any:
        """Make a call while the engine runs."""
        results: list[Any] = []
        answer = in_background(lambda: results.append(call()))
        self.until(lambda: results)
        answer()
        return results[0]

    def status(self) -> observability_pb2.GetStatusResponse:
        return self.client.observability.GetStatus(observability_pb2.GetStatusRequest())

    def program(self) -> program_pb2.Program:
        (found,) = self.client.programs.GetProgram(program_pb2.GetProgramRequest(**AGENT)).programs
        return found

    def paused(self) -> program_pb2.Program:
        """The program when the server has heard of its pause."""

        def found() -> program_pb2.Program | None:
            try:
                program = self.program()
            except grpc.RpcError:
                return None
            return program if program.state == program_pb2.PROGRAM_STATE_PAUSED else None

        return self.until(found)


@pytest.fixture
def rig(host: Host) -> Iterator[Rig]:
    made = Rig(host)
    yield made
    made.link.close()


def test_a_pause_is_seen_released_and_ended_from_outside(rig: Rig) -> None:
    rig.engine.run(turn("r1", prompt(30), session="agent", hints={"tool": "bash"}))
    found = rig.paused()
    assert (found.turns, found.context_tokens, found.tool) == (1, 34, "bash")
    assert found.gpu_pinned_tokens == 32
    assert found.HasField("ttl_left")
    request = observability_pb2.ExplainDecisionRequest(**AGENT)
    decision = rig.client.observability.ExplainDecision(request).decisions[0]
    assert (decision.event, decision.action) == ("pause", "pin")
    assert "pin" in {cost.option for cost in decision.costs}

    release = program_pb2.ReleaseProgramRequest(**AGENT)
    answer = rig.result(lambda: rig.client.programs.ReleaseProgram(release))
    assert answer.results[0].outcome in {
        outcome_pb2.OUTCOME_ACCEPTED,
        outcome_pb2.OUTCOME_CLIPPED,
    }
    # An answer comes after all that led to it: the picture is right at once.
    assert rig.program().gpu_pinned_tokens == 0
    assert rig.engine.half.pins.pinned_blocks == 0
    decision = rig.client.observability.ExplainDecision(request).decisions[0]
    assert (decision.event, decision.reason) == ("release", "command")
    assert decision.inputs["tokens"] == "32"
    # So are the figures of the engine, which does nothing more.
    gpu = rig.status().engines[0].gpu
    assert (gpu.pinned_bytes, gpu.free_bytes) == (0, gpu.total_bytes)

    end = program_pb2.EndProgramRequest(**AGENT)
    answer = rig.result(lambda: rig.client.programs.EndProgram(end))
    assert answer.results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED
    assert Refused(rig.program).code == grpc.StatusCode.NOT_FOUND


def test_an_engine_that_runs_no_hook_after_its_last_turn_is_known_to_be_idle(rig: Rig) -> None:
    rig.engine.run(turn("r1", prompt(30), session="agent", hints={"tool": "bash"}))

    def is_told() -> bool:
        try:
            return rig.program().state == program_pb2.PROGRAM_STATE_PAUSED
        except grpc.RpcError:
            return False

    wait_until(is_told, "the report of the last turn's end is there")
    assert rig.status().engines[0].queue.running_requests == 0


def test_the_memory_of_the_last_turn_is_told_to_be_free_when_it_is(rig: Rig) -> None:
    """The turn is told to have ended before its answer goes out, and that is before vLLM frees its blocks."""
    rig.engine.run(turn("r1", prompt(30), session="agent", hints={"end": True}))

    def is_free() -> bool:
        gpu = rig.status().engines[0].gpu
        return gpu.free_bytes == gpu.total_bytes

    wait_until(is_free, "the figures after the last turn are there")


def test_a_prefetch_and_what_an_announcement_changed_are_explained(rig: Rig) -> None:
    rig.engine.run(turn("r1", prompt(30), session="agent", hints={"tool": "bash"}))
    rig.paused()

    def decisions() -> list[observability_pb2.Decision]:
        request = observability_pb2.ExplainDecisionRequest(**AGENT)
        return list(rig.client.observability.ExplainDecision(request).decisions)

    before = len(decisions())
    announced = program_pb2.AnnounceToolCallRequest(
        **AGENT, tool="slow", duration=Duration(seconds=9)
    )
    rig.result(lambda: rig.client.programs.AnnounceToolCall(announced))
    (anew,) = decisions()[:-before]
    assert (anew.event, anew.request_id, anew.inputs["tool"]) == ("pause", "r1", "slow")
    assert anew.costs

    release = program_pb2.ReleaseProgramRequest(**AGENT)
    rig.result(lambda: rig.client.programs.ReleaseProgram(release))
    evict(rig.engine)
    returned = program_pb2.AnnounceToolReturnRequest(**AGENT)
    answer = rig.result(lambda: rig.client.programs.AnnounceToolReturn(returned))
    assert answer.results[0].reason == "loading"
    asked = decisions()[0]
    assert (asked.event, asked.action, asked.reason) == ("prefetch", "accepted", "loading")
    assert "32 of 32 tokens" in asked.inputs["detail"]
    rig.engine.run()
    rig.until(lambda: decisions()[0].action == "end")
    ended = decisions()[0]
    assert (ended.event, ended.reason, ended.inputs["tokens"]) == ("prefetch", "loaded", "32")


def test_the_use_of_the_cpu_tier_is_told(rig: Rig) -> None:
    def used() -> int | None:
        (engine,) = rig.status().engines
        return engine.cpu.used_bytes if engine.cpu.HasField("used_bytes") else None

    rig.until(lambda: used() == 0)
    rig.engine.run(turn("r1", prompt(30), session="agent"))
    # 4 chunks of 8 tokens.
    rig.until(lambda: used() == 4)
    assert isinstance(rig.engine.tier, VirtualTier)
    rig.engine.tier.lose()
    rig.engine.now_s += 2.0
    rig.until(lambda: used() is None)


def test_an_override_of_0_leaves_a_tools_next_pause_unpinned(rig: Rig) -> None:
    override = ttl_pb2.TtlOverride(
        scope=ttl_pb2.TtlScope(tool="bash"), mode=ttl_pb2.TTL_MODE_FIXED, ttl=Duration()
    )
    answer = rig.result(
        lambda: rig.client.ttl.SetTtlOverride(ttl_pb2.SetTtlOverrideRequest(override=override))
    )
    assert answer.engines == 1
    first = turn("r1", prompt(30), session="agent", hints={"tool": "bash"})
    rig.engine.run(first)
    assert rig.paused().gpu_pinned_tokens == 0
    override.ttl.seconds = 60
    rig.result(
        lambda: rig.client.ttl.SetTtlOverride(ttl_pb2.SetTtlOverrideRequest(override=override))
    )
    rig.engine.run(follow_up(first, "r2", session="agent", hints={"tool": "bash"}))
    rig.until(lambda: rig.program().turns == 2)
    found = rig.paused()
    assert found.gpu_pinned_tokens > 0
    assert 50 < found.ttl_left.seconds <= 60


def test_the_policy_is_changed_and_shown_and_a_restarted_server_learns_all_anew(
    rig: Rig, host: Host
) -> None:
    request = policy_pb2.UpdatePolicyRequest(policy=policy_pb2.Policy(mode=policy_pb2.MODE_SHADOW))
    request.update_mask.paths.append("mode")
    answer = rig.result(lambda: rig.client.policy.UpdatePolicy(request))
    assert answer.results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED
    assert answer.policies[0].policy.mode == policy_pb2.MODE_SHADOW
    assert rig.status().engines[0].mode == "shadow"
    rig.engine.run(turn("r1", prompt(30), session="agent"))
    before = rig.paused()
    host.stop()
    host.join()
    with Host(host.run_dir) as again:
        rig.client = again.client
        rig.until(lambda: rig.status().engines)
        after = rig.paused()
        assert (after.turns, after.context_tokens) == (before.turns, before.context_tokens)
        policy = again.client.policy.GetPolicy(policy_pb2.GetPolicyRequest())
        assert policy.policies[0].policy.mode == policy_pb2.MODE_SHADOW
