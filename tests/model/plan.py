"""What a life is drawn with: the engine, how unreliable the world is, and what happens how often."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.engine.engine_spec import EngineSpec
from tests.model.actions import ACTIONS

if TYPE_CHECKING:
    import random


@dataclass(frozen=True, slots=True)
class Plan:
    """One life.

    Attributes:
        spec: The engine.
        n_slots: Chunks that the CPU tier holds; 0: there is none.
        late: See `Drive`.
        step_share: Of the transitions, how many are steps of the engine.
        actions: What happens besides, each with its weight.
        sessions: Conversations.
        max_tokens: Longest request; it fits an empty engine.
        priorities: What requests ask for, one as often as the other.
    """

    spec: EngineSpec
    n_slots: int
    late: bool
    step_share: float
    actions: dict[str, float]
    sessions: int
    max_tokens: int
    priorities: tuple[int, ...] = (0,)

    def kinds(self) -> list[str]:
        """What of the engine a run should have had both of."""
        settings = self.spec.settings or {}
        found = ["async" if self.spec.is_async else "sync", self.spec.policy]
        found.append("by_program" if self.spec.by_program else "vllm_scheduler")
        found.append("runner_v2" if self.spec.runner_v2 else "runner_v1")
        found.append("one_priority" if len(self.priorities) == 1 else "priorities")
        return [*found, f"backfill_{settings.get('kvtier.backfill_turns', 0)}"]


def draw(chance: random.Random) -> Plan:
    """A plan at random: each leaves some of the actions out, so that others meet more often."""
    blocks = chance.choice((8, 12, 18, 26, 40))
    # kvtier's class is for the priority policy alone, and `kvtier serve` sets both.
    policy, by_program = chance.choice(
        (("fcfs", False), ("priority", False), ("priority", True), ("priority", True))
    )
    spec = EngineSpec(
        # No draw of its own, so that lives that are known by number stay what they were.
        runner_v2=blocks in {12, 26},
        is_async=chance.random() < 0.5,
        blocks=blocks,
        settings=_settings(chance),
        max_batch=chance.choice((1, 3, 5)),
        batch_tokens=chance.choice((None, 32, 100)),
        max_context=4096,
        policy=policy,
        by_program=by_program,
    )
    kept = {name: w for name, w in ACTIONS.items() if chance.random() < 0.8}
    return Plan(
        # No draw of its own, so that lives that are known by number stay what they were.
        spec=replace(spec, runner_v2=len(kept) % 2 == 1),
        n_slots=chance.choice((0, 3, 6, 12, 40, 200)),
        late=chance.random() < 0.5,
        step_share=chance.choice((0.6, 0.75, 0.88)),
        actions={"arrive": ACTIONS["arrive"], "tier_returns": ACTIONS["tier_returns"], **kept},
        sessions=chance.choice((2, 4, 6, 12)),
        max_tokens=blocks * 16,
        priorities=chance.choice(((0,), (0, 0, 1), (-1, 0, 3))),
    )


def _settings(chance: random.Random) -> dict[str, Any]:
    drawn = {
        "mode": chance.choice(("on",) * 9 + ("shadow",)),
        "admission": chance.choice(("off", "program_fcfs", "working_set")),
        "backfill_turns": chance.choice((0, 1)),
        "reload": chance.choice(("auto", "always", "always", "first_k")),
        "reload_first_chunks": chance.choice((1, 2)),
        "pin_budget_fraction": chance.choice((0.1, 0.3, 0.6, 0.9, 1.0)),
        "stage_split_chunks": chance.choice((1, 2, 32)),
        "chunk_tokens": chance.choice((16, 32, 64)),
        "max_ttl_s": chance.choice((3.0, 60.0, 600.0)),
        "forget_after_s": chance.choice((30.0, 2000.0)),
        "max_programs": chance.choice((2, 10_000)),
        "lookup_wait_s": 0.0,
    }
    return {f"kvtier.{name}": value for name, value in drawn.items()}
