"""Every policy through vLLM's real scheduler: programs end, blocks come back, and two runs are the same."""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

pytest.importorskip("vllm")

from kvtier.replay import simulation
from kvtier.replay.baselines import continuum_2s, infercept, pins
from kvtier.replay.baselines.thunderagent import ThunderAgentPolicy
from kvtier.replay.baselines.ttl_const import TtlConstPolicy
from kvtier.replay.machine import GpuSpec, Machine, ModelSpec, step_s
from kvtier.replay.policies import policy
from kvtier.replay.simulation import Replayed, Simulation
from kvtier.replay.text import shared_tokens
from kvtier.replay.workload import Child, Limits, Program, Run, Turn
from kvtier.replay.workloads import source

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

NAMES = (
    "offload-lru",
    "offload-pfcfs",
    "infercept",
    "ttl-const",
    "continuum",
    "continuum-2s",
    "autellix",
    "thunderagent",
)
ALL = (*NAMES, "kvtier", "kvtier-ends", "oracle")
BLOCK_TOKENS = 16
# 4 KiB of KV a token, and a slow GPU, so that small contexts take their time.
MODEL = ModelSpec("small", 1e9, 1e9, 4, 8, 4, 64, 512)
GPU = GpuSpec("slow", 2e12, 2e11, 8e9, 1e9)


def machine(gpu_blocks: int = 160, cpu_blocks: int = 2000) -> Machine:
    block_bytes = int(BLOCK_TOKENS * MODEL.kv_bytes_per_token)
    return Machine(
        MODEL,
        GPU,
        n_gpus=1,
        gpu_kv_bytes=gpu_blocks * block_bytes,
        dram_bytes=cpu_blocks * block_bytes,
        link_bytes_per_s=1e9,
        block_tokens=BLOCK_TOKENS,
        batch_tokens=512,
        max_running=8,
    )


def chain(rnd: random.Random, n_turns: int, first: int, children: bool = False) -> tuple[Turn, ...]:
    """Turns that grow by some 150 tokens each."""
    turns = []
    runs = (Run(0, 64), Run(first, 200))
    for i in range(n_turns):
        output = rnd.randint(5, 25)
        inner: tuple[Child, ...] = ()
        if children and i == 1:
            inner = tuple(Child(0.1, chain(rnd, 2, first + 1000 * (k + 1))) for k in range(2))
        turns.append(Turn(runs, output, rnd.uniform(0.1, 3.0), rnd.choice(("a", "b", None)), inner))
        runs = (*runs, Run(first + 2 * i + 1, output), Run(first + 2 * i + 2, 120))
    return tuple(turns)


def programs(n_programs: int = 6, children: bool = False) -> list[Program]:
    rnd = random.Random(3)
    return [
        Program(f"p{i}", 0.3 * i, chain(rnd, rnd.randint(4, 7), 1, children))
        for i in range(n_programs)
    ]


def replay(name: str, on: Machine, workload: list[Program]) -> tuple[Simulation, Replayed]:
    """Run a policy, and see that every block has come back."""
    sim = Simulation(policy(name), on, workload)
    result = sim.run()
    pool = sim.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert set(result.ended_s) == {program.name for program in workload}
    assert len(result.turns) == sum(len(program.all_turns()) for program in workload)
    return sim, result


def sizes(program: Program) -> list[tuple[int, int]]:
    return [(turn.prompt_tokens, turn.output_tokens) for turn in program.turns]


def cpu_tokens(result: Replayed) -> int:
    return sum(turn.cpu_tokens for turn in result.turns)


@pytest.mark.parametrize("name", ALL)
def test_programs_end_and_two_runs_are_the_same(name: str) -> None:
    first = replay(name, machine(), programs())[1]
    second = replay(name, machine(), programs())[1]
    assert first.turns == second.turns
    assert first.ended_s == second.ended_s
    assert (first.steps, first.preemptions) == (second.steps, second.preemptions)
    assert first.link_bytes == second.link_bytes


def test_what_kvtier_records_is_what_was_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[float, float]] = []

    def noted_step_s(*args: Any) -> float:
        taken_s = step_s(*args)
        steps.append((sim.clock.now_s, sim.clock.now_s + taken_s))
        return taken_s

    def seen_late_s(at_s: float) -> float:
        return max((end_s - at_s for begun_s, end_s in steps if begun_s < at_s < end_s), default=0)

    file = tmp_path / "turns.jsonl"
    spec = policy("kvtier")
    spec = replace(spec, settings={**spec.settings, "kvtier.record_file": str(file)})
    workload = programs()
    sim = Simulation(spec, machine(), workload)
    # Not before: a simulation is calibrated with it.
    monkeypatch.setattr(simulation, "step_s", noted_step_s)
    result = sim.run()
    monkeypatch.undo()
    arrived_s = {(turn.chain, turn.index): turn.arrived_s for turn in result.turns}
    assert not any(program.name in file.read_text() for program in workload)
    recorded = source.load(str(file), seed=0, limits=Limits(), programs=None)
    assert len(recorded) == len(workload)
    # Programs that came in one step are told in the order of their ends.
    told_by_sizes = sorted(recorded, key=sizes)
    for before, after in zip(sorted(workload, key=sizes), told_by_sizes, strict=True):
        assert sizes(after) == sizes(before)
        # A request is seen when the step under way has ended.
        for i, (was, told) in enumerate(zip(before.turns[:-1], after.turns[:-1], strict=True)):
            late_s = seen_late_s(arrived_s[before.name, i + 1])
            assert told.gap_s - was.gap_s == pytest.approx(late_s, abs=0.01)
    assert sum(len(program.turns) for program in recorded) == len(result.turns)
    # Each prompt continues the one before, as it did.
    for program in recorded:
        for turn, following in zip(program.turns, program.turns[1:], strict=False):
            assert shared_tokens(turn.prompt, following.prompt) == turn.prompt_tokens
    assert Simulation(policy("kvtier"), machine(), recorded).run().steps > 0


@pytest.mark.parametrize(
    ("mode", "least", "most"),
    [("x0.1", 0.1, 0.1), ("x10", 10.0, 10.0), ("adversarial", 0.9, 1.0), ("shuffled", 0.0, 100.0)],
)
def test_wrong_predictions_are_what_kvtier_decides_by(mode: str, least: float, most: float) -> None:
    sim = Simulation(policy(f"kvtier:{mode}"), machine(gpu_blocks=100), programs())
    told: list[tuple[float, float]] = []
    told_s: dict[str, float] = {}
    half = sim.half
    tool_of, decide = sim.tool_of, half.policy.decide_pause

    def noted_tool(chain: Any) -> str | None:
        tool = tool_of(chain)
        if tool is not None:
            told_s[tool] = chain.turn.gap_s
        return tool

    def noted(pause: Any) -> Any:
        if pause.tool is not None:
            told.append((half.policy.ttl.away(pause.tool).quantile(0.5), told_s[pause.tool]))
        return decide(pause)

    sim.tool_of, half.policy.decide_pause = noted_tool, noted
    sim.run()
    assert len(told) > len(sim.programs)
    ratios = [predicted_s / true_s for predicted_s, true_s in told]
    assert min(ratios) > 0.999 * least
    assert max(ratios) < 1.001 * most
    assert len({round(ratio, 3) for ratio in ratios}) > 3 or least == most or mode == "adversarial"
    # Learnt is the truth, of the tools by their own names.
    assert set(half.policy.ttl._gaps._tools) == {"a", "b"}
    with pytest.raises(ValueError, match="accepted: shuffled"):
        policy("kvtier:backwards")


@pytest.mark.parametrize(("name", "known_at_the_end"), [("kvtier", 6), ("kvtier-ends", 0)])
def test_clients_of_kvtier_ends_say_when_their_programs_are_over(
    name: str, known_at_the_end: int
) -> None:
    known: list[int] = []
    sim = Simulation(
        policy(name),
        machine(),
        programs(children=True),
        progress=lambda _: known.append(len(sim.half.programs)),
    )
    sim.run()
    assert known[-1] == known_at_the_end


def test_programs_that_have_ended_leave_nothing_but_their_figures() -> None:
    """As many objects after 200 programs as after 100, though they arrived as 200 programs."""
    rnd = random.Random(5)
    workload = [Program(f"p{i}", 0.0, chain(rnd, 2, 1)) for i in range(200)]
    spec = policy("kvtier")
    spec = replace(spec, settings={**spec.settings, "kvtier.forget_after_s": 10.0})
    counts: dict[int, Counter[str]] = {}

    def progress(n_ended: int) -> None:
        if n_ended in (100, 200):
            gc.collect()
            kinds = map(type, gc.get_objects())
            counts[n_ended] = Counter(
                kind.__name__
                for kind in kinds
                if str(kind.__module__).startswith(("kvtier.", "vllm."))
            )

    result = Simulation(spec, machine(), workload, concurrency=4, progress=progress).run()
    assert len(result.turns) == 400
    grown = counts[200] - counts[100]
    assert grown.pop("TurnRecord") > 150
    assert grown.pop("MemorySample") > 0
    assert max(grown.values(), default=0) < 50, grown.most_common(5)


@pytest.mark.parametrize("name", ALL)
def test_programs_end_with_sub_agents_and_hardly_any_memory(name: str) -> None:
    # The longest context has 65 blocks.
    replay(name, machine(gpu_blocks=72, cpu_blocks=100), programs(children=True))


@pytest.mark.parametrize("name", ALL)
def test_programs_end_without_a_tier(name: str) -> None:
    _, result = replay(name, machine(cpu_blocks=0), programs())
    assert cpu_tokens(result) == 0
    assert result.link_bytes == {"store": 0, "load": 0}


@pytest.mark.parametrize("name", NAMES)
def test_what_gpu_memory_has_no_room_for_comes_from_the_tier(name: str) -> None:
    sim, result = replay(name, machine(gpu_blocks=100), programs())
    assert cpu_tokens(result) > 0
    assert result.link_bytes["load"] >= cpu_tokens(result) * MODEL.kv_bytes_per_token
    # What can be read has been copied; some copies may have been under way at the end.
    tier = sim.scheduler.connector.tier
    stored_blocks = result.link_bytes["store"] / sim.machine.block_bytes
    assert 0 < len(tier._idle) <= stored_blocks
    assert not tier._read


def test_the_tier_saves_computation() -> None:
    _, plain = replay("vllm-lru", machine(gpu_blocks=100), programs())
    _, tiered = replay("offload-lru", machine(gpu_blocks=100), programs())
    assert tiered.busy_s < plain.busy_s


def test_programs_go_in_the_order_of_their_arrival() -> None:
    on = machine(gpu_blocks=72)
    _, plain = replay("offload-lru", on, programs())
    _, ordered = replay("offload-pfcfs", on, programs())
    assert ordered.ended_s["p0"] < plain.ended_s["p0"]


@pytest.mark.parametrize("name", ["ttl-const", "continuum", "continuum-2s"])
def test_a_policy_that_pins_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[pins.Pin] = []
    add = pins.Pins.add

    def noted(self: pins.Pins, pin: pins.Pin) -> None:
        added.append(pin)
        add(self, pin)

    monkeypatch.setattr(pins.Pins, "add", noted)
    # Too slow a link to reload in no time, so that a pin is worth something to Equation 2.
    on = machine(gpu_blocks=100)
    slow = Machine(**{name: getattr(on, name) for name in on.__slots__} | {"link_bytes_per_s": 1e6})
    replay(name, slow, programs())
    assert added
    assert all(pin.blocks and pin.expires_s > 0 for pin in added)


@pytest.mark.parametrize("name", ["ttl-const", "continuum-2s"])
def test_pins_without_end_do_not_deadlock(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TtlConstPolicy, "ttl_s", lambda *_: 1e9)
    monkeypatch.setattr(continuum_2s, "TTL_S", 1e9)
    replay(name, machine(gpu_blocks=72), programs(children=True))


def test_preserving_without_end_does_not_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is wasted by preserving, and nothing can be swapped.
    monkeypatch.setattr(infercept, "preserve_waste", lambda *_: 0.0)
    replay("infercept", machine(gpu_blocks=72, cpu_blocks=0), programs(children=True))


def test_infercept_swaps_what_it_keeps_and_stores_nothing_else() -> None:
    sim, result = replay("infercept", machine(gpu_blocks=100), programs())
    last_turns = {f"{program.name}.{len(program.turns) - 1}" for program in sim.programs}
    contexts = {
        turn.chain: (turn.prompt_tokens // BLOCK_TOKENS + 2) * sim.machine.block_bytes
        for turn in result.turns
        if f"{turn.chain}.{turn.index}" not in last_turns
    }
    assert 0 < result.link_bytes["store"] <= sum(contexts.values())


def test_autellix_preempts_who_has_been_served_for_those_who_have_not() -> None:
    # Two programs at a time fit; the ones that come last have had nothing yet.
    _, result = replay("autellix", machine(gpu_blocks=100), programs(10))
    _, ordered = replay("offload-pfcfs", machine(gpu_blocks=100), programs(10))
    assert result.preemptions > ordered.preemptions

    def waited_s(replayed: Replayed) -> float:
        return max(t.first_token_s - t.arrived_s for t in replayed.turns if t.index == 0)

    assert waited_s(result) < waited_s(ordered)


def test_thunderagent_keeps_active_programs_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    tick = ThunderAgentPolicy.tick

    def noted(self: Any) -> None:
        tick(self)
        held.append(self.n_held)

    monkeypatch.setattr(ThunderAgentPolicy, "tick", noted)
    _, result = replay("thunderagent", machine(gpu_blocks=100), programs())
    assert max(held) > 0
    assert held[-1] == 0
    assert result.preemptions == 0
