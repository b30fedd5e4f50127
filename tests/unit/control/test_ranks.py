"""Two data-parallel ranks of one engine: each registers by itself, and is seen and steered by itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from google.protobuf.duration_pb2 import Duration

from kvtier import link_messages as link
from kvtier.control import command_desk, link_server
from kvtier.v1 import observability_pb2, outcome_pb2, policy_pb2, program_pb2, ttl_pb2
from tests.unit.control.control_host import (
    BLOCK_BYTES,
    GAUGES,
    Host,
    in_background,
    program,
    wait_until,
)

if TYPE_CHECKING:
    from tests.unit.control.control_host import FakeEngine, Peer

# As vLLM names its ranks, with kvtier's process id.
IDS = ("vllm_dp0-100", "vllm_dp1-101")
# Of the process that has started both.
PARENT = os.getpid()
HERE, THERE, BOTH = program("here"), program("there"), program("both")


def rank(host: Host, number: int) -> FakeEngine:
    return host.engine(IDS[number], dp_rank=number, parent_pid=PARENT)


@pytest.fixture
def ranks(host: Host) -> tuple[FakeEngine, FakeEngine]:
    """Both ranks, each with a program of its own, and one that has moved from the first to the second."""
    first, second = rank(host, 0), rank(host, 1)
    first.join()
    second.join(msgspec.structs.replace(GAUGES, programs=2, pinned_blocks=7, free_blocks=93))
    first.knows(HERE, BOTH)
    second.send(
        link.Report(
            engine_id=second.engine_id,
            sent_s=1.0,
            events=[
                link.TurnStarted(at_s=1.0, program=key, turn=1, prompt_tokens=1)
                for key in (THERE, BOTH)
            ],
            gauges=msgspec.structs.replace(GAUGES, programs=2, pinned_blocks=7, free_blocks=93),
        )
    )
    second.settle()
    return first, second


def waker_of_both(host: Host) -> Peer:
    """vLLM's API process, whose children both ranks are."""
    waker = host.peer()
    waker.send(link.WakerHello(link=link.LINK_VERSION, pid=os.getpid(), parent_pid=1))
    return waker


def woken(waker: Peer) -> int:
    return link.waker_decoder.decode(waker.next_frame()).dp_rank


def outcomes(answer: Any) -> dict[str, int]:
    return {result.engine_id: result.outcome for result in answer.results}


def test_each_rank_is_listed_with_its_own_figures(
    host: Host, ranks: tuple[FakeEngine, FakeEngine]
) -> None:
    status = host.client.observability.GetStatus(observability_pb2.GetStatusRequest())
    assert [engine.engine_id for engine in status.engines] == list(IDS)
    assert [engine.gpu.programs for engine in status.engines] == [1, 2]
    pinned = [engine.gpu.pinned_bytes // BLOCK_BYTES for engine in status.engines]
    assert pinned == [10, 7]
    assert host.sample("kvtier_control_engines") == 2
    # A program that two ranks know is two: its KV is in both.
    assert host.sample("kvtier_control_programs") == 4


def test_programs_of_both_ranks_are_listed_with_the_rank_that_has_them(
    host: Host, ranks: tuple[FakeEngine, FakeEngine]
) -> None:
    found = set()
    request = program_pb2.ListProgramsRequest(page_size=1)
    while True:
        page = host.client.programs.ListPrograms(request)
        assert page.total_size == 4
        found |= {(p.engine_id, p.name) for p in page.programs}
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    first, second = IDS
    assert found == {(first, "here"), (first, "both"), (second, "there"), (second, "both")}
    moved = host.client.programs.GetProgram(program_pb2.GetProgramRequest(name="both"))
    assert [p.engine_id for p in moved.programs] == list(IDS)


def test_a_command_reaches_the_rank_that_has_the_program_and_no_other(
    host: Host, ranks: tuple[FakeEngine, FakeEngine]
) -> None:
    first, second = ranks
    request = program_pb2.ReleaseProgramRequest(name="there")
    result = in_background(lambda: host.client.programs.ReleaseProgram(request))
    command = second.next(link.ReleaseCommand)
    assert command.program == THERE
    second.answer(command)
    assert outcomes(result()) == {IDS[1]: outcome_pb2.OUTCOME_ACCEPTED}
    assert first.says_nothing(50)


def test_a_command_for_a_program_of_both_ranks_has_an_outcome_for_each(
    host: Host, ranks: tuple[FakeEngine, FakeEngine]
) -> None:
    first, second = ranks
    request = program_pb2.PinProgramRequest(name="both", ttl=Duration(seconds=5))
    result = in_background(lambda: host.client.programs.PinProgram(request))
    first.answer(first.next(link.PinCommand), "missing", "nothing_to_pin")
    second.answer(second.next(link.PinCommand))
    assert outcomes(result()) == {
        IDS[0]: outcome_pb2.OUTCOME_MISSING,
        IDS[1]: outcome_pb2.OUTCOME_ACCEPTED,
    }


def test_overrides_and_policies_reach_both_ranks(
    host: Host, ranks: tuple[FakeEngine, FakeEngine]
) -> None:
    override = ttl_pb2.TtlOverride(
        scope=ttl_pb2.TtlScope(tool="bash"), mode=ttl_pb2.TTL_MODE_FIXED, ttl=Duration(seconds=3)
    )
    request = ttl_pb2.SetTtlOverrideRequest(override=override)
    result = in_background(lambda: host.client.ttl.SetTtlOverride(request))
    for engine in ranks:
        command = engine.next(link.OverridesCommand)
        assert [o.tool for o in command.overrides] == ["bash"]
        engine.answer(command)
    assert result().engines == 2
    update = policy_pb2.UpdatePolicyRequest(
        policy=policy_pb2.Policy(stage=False), update_mask={"paths": ["stage"]}
    )
    changed = in_background(lambda: host.client.policy.UpdatePolicy(update))
    for engine in ranks:
        engine.answer(engine.next(link.PolicyCommand))
    assert outcomes(changed()) == dict.fromkeys(IDS, outcome_pb2.OUTCOME_ACCEPTED)


def test_a_rank_that_ends_takes_its_own_programs_along(
    host: Host, ranks: tuple[FakeEngine, FakeEngine]
) -> None:
    first, second = ranks
    second.send(link.EngineBye(engine_id=second.engine_id))
    first.settle()
    found = host.client.programs.ListPrograms(program_pb2.ListProgramsRequest())
    assert {(p.engine_id, p.name) for p in found.programs} == {(IDS[0], "here"), (IDS[0], "both")}


def test_the_rank_that_has_a_command_is_woken(
    host: Host, ranks: tuple[FakeEngine, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_desk, "WAKEABLE_PATIENCE_S", 3600.0)
    _, second = ranks
    waker = waker_of_both(host)
    wait_until(
        lambda: host.call(lambda: len(host.server.link_server.wakers.identities())) == 1, "it waits"
    )
    second.settle()
    request = program_pb2.EndProgramRequest(name="there")
    result = in_background(lambda: host.client.programs.EndProgram(request))
    assert {woken(waker) for _ in range(2)} == {1}
    second.answer(second.next(link.EndCommand))
    assert outcomes(result()) == {IDS[1]: outcome_pb2.OUTCOME_ACCEPTED}


def test_an_unknown_rank_that_may_be_idle_by_now_is_woken_whichever_it_is(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_server, "RESYNC_INTERVAL_S", 3600.0)
    waker = waker_of_both(host)
    assert woken(waker) == link.ALL_RANKS
    second = rank(host, 1)
    second.send(link.Report(engine_id=IDS[1], sent_s=1.0, events=[], gauges=GAUGES))
    assert isinstance(link.engine_decoder.decode(second.next_frame()), link.Resync)
    assert woken(waker) == link.ALL_RANKS
