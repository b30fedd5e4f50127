"""No setting of kvtier, and no policy, stalls: every program completes, and every block comes back.

By default some tens of random configurations; `TEST_CONFIGURATIONS=200 pytest tests/engine/test_replay_any_setting.py`
for more. Configuration i is the same on every machine.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import Any, Final

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

pytest.importorskip("vllm")

from kvtier.replay.machine import Machine
from kvtier.replay.policies import POLICIES, policy
from kvtier.replay.simulation import Simulation
from kvtier.replay.workload import Child, Program, Run, Turn
from tests.engine.test_replay_engine import BLOCK_TOKENS, GPU, MODEL

pytestmark = pytest.mark.engine

N_CONFIGURATIONS: Final = int(os.environ.get("TEST_CONFIGURATIONS", "60"))
MAX_BATCH: Final = 8
SETTINGS: Final[dict[str, tuple[Any, ...]]] = {
    "ttl_policy": ("auto", "fixed"),
    "ttl_fixed_s": (0.0, 0.01, 1.0, 30.0, 1e9),
    "max_ttl_s": (0.0, 0.5, 600.0, 1e9),
    "pin_budget_fraction": (0.0, 0.1, 0.5, 1.0),
    "stage": (True, False),
    "stage_split_chunks": (1, 2, 32),
    "reload": ("auto", "always", "never", "first_k"),
    "reload_first_chunks": (0, 1, 3),
    "admission": ("off", "program_fcfs", "working_set"),
    "aging_s": (0.0, 0.5, 5.0, 600.0),
    "max_defer_s": (0.0, 1.0, 3600.0),
    "forget_after_s": (0.1, 2.0, 3600.0),
    "max_programs": (1, 3, 10_000),
    "lease_s": (0.01, 1.0, 600.0),
}


def turns(chance: random.Random, n_turns: int, content: int, depth: int = 0) -> tuple[Turn, ...]:
    """A chain that grows, compacts itself now and then, and starts sub-agents."""
    made: list[Turn] = []
    runs = (Run(0, chance.choice((1, 16, 100))), Run(content, chance.randint(1, 300)))
    for i in range(n_turns):
        output = chance.randint(1, 40)
        children: tuple[Child, ...] = ()
        if not depth and chance.random() < 0.1:
            children = tuple(
                Child(chance.uniform(0, 1), turns(chance, 2, content + 1000 * (k + 1), 1))
                for k in range(chance.randint(1, 3))
            )
        gap_s = chance.choice((0.0, 0.05, 1.0, 20.0)) * chance.random()
        made.append(Turn(runs, output, gap_s, chance.choice(("a", "b", None)), children))
        runs = (*runs, Run(content + 2 * i + 1, output), Run(content + 2 * i + 2, 60))
        if chance.random() < 0.1:
            runs = runs[:2]
    return tuple(made)


def configuration(number: int) -> tuple[str, dict[str, Any], Machine, list[Program], int | None]:
    """Policy, settings, machine, workload and concurrency of a configuration."""
    chance = random.Random(f"configuration {number}")
    name = "kvtier" if number % 2 else chance.choice(sorted(POLICIES))
    chosen = {
        key: chance.choice(values) for key, values in SETTINGS.items() if chance.random() < 0.5
    }
    # Of chance of its own: the other settings are those of the configuration's number whatever is added here.
    chosen["backfill_turns"] = random.Random(f"backfill {number}").choice((0.0, 1.0, 1e9))
    if chosen.get("ttl_policy") == "fixed":
        # A fixed TTL above the limit is refused.
        chosen.setdefault("ttl_fixed_s", 1.0)
        chosen["max_ttl_s"] = max(chosen.get("max_ttl_s", 600.0), chosen["ttl_fixed_s"])
    # The longest program has 12 turns: 100 + 300 tokens, and 100 more a turn.
    longest_blocks = (400 + 12 * 100) // BLOCK_TOKENS + 2
    block_bytes = int(BLOCK_TOKENS * MODEL.kv_bytes_per_token)
    machine = Machine(
        MODEL,
        GPU,
        n_gpus=1,
        gpu_kv_bytes=chance.choice((longest_blocks, 2 * longest_blocks, 5 * longest_blocks))
        * block_bytes,
        dram_bytes=chance.choice((0, 10, 100, 3000)) * block_bytes,
        link_bytes_per_s=chance.choice((1e6, 1e8, 1e10)),
        block_tokens=BLOCK_TOKENS,
        batch_tokens=chance.choice((64, 512)),
        max_running=chance.choice((1, 3, MAX_BATCH)),
    )
    workload = [
        Program(
            f"p{i}",
            chance.choice((0.0, 3.0)) * chance.random() * i,
            turns(chance, chance.randint(1, 12), 1),
            chance.choice(("", "shared")),
        )
        for i in range(chance.randint(1, 10))
    ]
    return name, chosen, machine, workload, chance.choice((None, None, 1, 3))


@pytest.mark.parametrize("number", range(N_CONFIGURATIONS))
def test_every_program_completes(number: int) -> None:
    name, chosen, machine, workload, concurrency = configuration(number)
    spec = policy(name)
    if spec.connector == "KVTierConnector":
        given = {f"kvtier.{key}": value for key, value in chosen.items()}
        spec = replace(spec, settings={**spec.settings, **given})
    sim = Simulation(spec, machine, workload, concurrency=concurrency)
    result = sim.run()
    assert set(result.ended_s) == {program.name for program in workload}
    assert len(result.turns) == sum(len(program.all_turns()) for program in workload)
    pool = sim.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    if sim.half is not None:
        assert result.counters.get("failures|internal", 0) == 0
    if sim.tier is not None:
        assert sim.tier.table.counts()["locked_chunks"] == 0
        # The replay ends with the last program, whatever is still on a slow link then.
        is_on_the_way = sim.link.next_end_s < float("inf")
        assert sim.tier.table.counts()["reservations"] == 0 or is_on_the_way
