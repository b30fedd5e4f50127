"""The end of a turn: the decision is applied, within the budget, and nothing in shadow."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvtier.backend import NoTier, TierBackend
from kvtier.chunk_keys import ChunkChain
from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.gpu_pin import Pin, PinTable, ReleaseCause
from kvtier.identity.request_params import RequestHints
from kvtier.orders import OrderIds, OrderResult
from kvtier.policy import Policy
from kvtier.policy_facts import PolicyConfig
from kvtier.stats import Stats
from kvtier.tools.detection import ToolCall
from kvtier.ttl.announcements import announced_curve
from kvtier.turns.block_pool import VllmBlockPool
from kvtier.turns.decision_log import DecisionLog
from kvtier.turns.happenings import Happenings
from kvtier.turns.pauses import Load, Pauses
from kvtier.turns.pin_charges import PinCharges
from kvtier.turns.staging import Stager
from kvtier.turns.turn import Turn
from tests.unit.fake_vllm import BLOCK_TOKENS, CHUNK_TOKENS, FakePool, FakeRequest, engine_facts
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from pathlib import Path

SEED = bytes(16)
CALL = ToolCall("tool", "bash", "hint")


class Rig:
    """`end` finishes a turn with `n_blocks` full blocks, of which the last is output."""

    def __init__(
        self,
        *,
        budget_blocks: int = 40,
        tier: TierBackend | None = None,
        log_path: Path | None = None,
        config: PolicyConfig | None = None,
    ) -> None:
        self.facts = engine_facts()
        self.tier = tier or VirtualTier()
        self.pool = FakePool(60)
        adapter = VllmBlockPool(self.pool)
        self.pins = PinTable(adapter, budget_blocks)
        self.stats = Stats()
        self.policy = Policy(self.facts, config or PolicyConfig())
        self.stager = Stager(
            self.tier,
            self.pins,
            self.stats,
            namespace="ns",
            chunk_blocks=self.facts.chunk_blocks,
            split_chunks=8,
            next_order_id=OrderIds(),
        )
        self.released: list[tuple[str, ReleaseCause]] = []
        self.regret: dict[str, float] = {}
        self.log = DecisionLog(log_path)
        self.pauses = Pauses(
            self.facts,
            self.tier,
            adapter,
            self.pins,
            self.stager,
            self.policy,
            self.stats,
            self.log,
            self._release,
            Happenings(),
            PinCharges(self.facts, self.policy.ttl.budgets, lambda: 100.0),
            lambda: 100.0 + 250e-6,
        )
        self.pauses.regret_s_per_block = (  # type: ignore[method-assign]
            lambda pin, _: self.regret.get(pin.key, 1.0)
        )

    def _release(self, key: str, cause: ReleaseCause) -> None:
        self.pins.unpin(key, cause)
        self.released.append((key, cause))

    def end(
        self,
        key: str,
        n_blocks: int = 8,
        *,
        hints: RequestHints | None = None,
        tierable: bool = True,
        aborted: bool = False,
        shadow: bool = False,
        waiting: tuple[int, int] = (0, 0),
        index: int = 0,
    ) -> dict[str, Any] | None:
        n_tokens = n_blocks * BLOCK_TOKENS
        tokens = [hash(key) % 1000 + i for i in range(n_tokens)]
        request = FakeRequest(key, tokens[:-BLOCK_TOKENS], output_token_ids=tokens[-BLOCK_TOKENS:])
        turn = Turn(
            request, f"program-{key}", hints or RequestHints(), SEED, tierable, 0.0, 0.0, index
        )
        taken = self.pool.take(n_blocks)
        assert taken is not None
        blocks = [b.block_id for b in taken]
        chain = None
        if tierable:
            chain = ChunkChain(SEED, CHUNK_TOKENS).extended(
                tokens, n_tokens, request.block_hashes, BLOCK_TOKENS
            )
        told = self.pauses.decide(
            turn,
            CALL,
            blocks,
            chain,
            now_s=100.0,
            aborted=aborted,
            shadow=shadow,
            load=Load(*waiting, 1, 0),
        )
        self.pool.free_blocks(list(reversed(taken)))
        return told

    def decisions(self) -> list[str]:
        return [key for key in self.stats.totals if key.startswith("decisions|")]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_program_that_most_likely_ends_here_gets_less(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those before it have come back from their first turn, and never from their second."""
    values: list[float] = []
    start = rig.stager.start

    def noted(
        key: str, program: str, chain: Any, blocks: Any, value_s: float, *rest: Any, **more: Any
    ) -> bool:
        values.append(value_s)
        return start(key, program, chain, blocks, value_s, *rest, **more)

    monkeypatch.setattr(rig.stager, "start", noted)
    ttl = rig.policy.ttl
    for i in range(8):
        for turns in (1, 2):
            ttl.observe_pause(f"p{i}", f"r{turns}", turns, 0.0)
        ttl.returning.returned(f"p{i}", "r1")
        ttl.returning.gone(f"p{i}", "r2")
    rig.end("a", waiting=(3, 3000))
    rig.end("b", waiting=(3, 3000), index=1)
    assert values[1] < 0.5 * values[0]
    pins = [rig.pins.get(key) for key in ("a", "b")]
    ttls_s = [pin.deadline_s - pin.pinned_s if pin is not None else 0.0 for pin in pins]
    assert ttls_s[1] < ttls_s[0]
    assert len(ttl.returning) == 2, "pauses of their own have begun"


def test_who_most_likely_ends_is_missed_less() -> None:
    ttl = Rig().policy.ttl
    data = PinnedTurn("bash", 64, 2, 5.0, miss_unstaged_s=1.0)

    def regret_s(data: PinnedTurn) -> float:
        pin = Pin("r", "p", np.arange(4), 100.0, 160.0, data)
        return ttl.regret_s_per_block(pin, 101.0, staged=False)

    less_likely = replace(data, return_share=0.2)
    assert regret_s(less_likely) < 0.5 * regret_s(data)
    announced = announced_curve(5.0, 10.0)
    told = replace(data, announced=announced, announced_s=100.0)
    assert regret_s(replace(told, return_share=0.2)) == regret_s(told)


def test_a_turn_is_pinned_and_staged(rig: Rig) -> None:
    told = rig.end("a")
    assert told is not None
    assert told == {
        "action": "pin",
        "ttl_s": told["ttl_s"],
        "pinned_blocks": 8,
        "staging": True,
        "reason": "memory_free",
        "tool": "bash",
    }
    assert told["ttl_s"] > 0
    (pin,) = rig.pins.pins()
    assert (pin.key, pin.program, len(pin.block_ids)) == ("a", "program-a", 8)
    assert pin.deadline_s == pytest.approx(100.0 + told["ttl_s"], abs=0.001)
    assert isinstance(pin.data, PinnedTurn)
    assert (pin.data.tool, pin.data.n_tokens, pin.data.prompt_blocks) == ("bash", 32, 7)
    assert pin.data.staged_tokens == 32
    assert rig.stager.n_jobs == 1
    assert rig.decisions() == ["decisions|pause|pin|memory_free"]


def test_the_clients_ttl_is_used(rig: Rig) -> None:
    told = rig.end("a", hints=RequestHints(ttl_s=12.5))
    assert told is not None
    assert (told["ttl_s"], told["reason"]) == (12.5, "override_fixed")
    (pin,) = rig.pins.pins()
    assert pin.deadline_s == 112.5


def test_a_ttl_of_zero_means_not_in_gpu_memory(rig: Rig) -> None:
    told = rig.end("a", hints=RequestHints(ttl_s=0.0))
    assert told is not None
    assert (told["action"], told["pinned_blocks"], told["staging"]) == ("offload", 0, True)
    assert not len(rig.pins)


def test_hints_refuse_either_copy(rig: Rig) -> None:
    told = rig.end("a", hints=RequestHints(pin=False))
    assert told is not None
    assert (told["pinned_blocks"], told["ttl_s"], told["staging"]) == (0, 0.0, True)
    assert not len(rig.pins)
    told = rig.end("b", hints=RequestHints(stage=False))
    assert told is not None
    assert (told["pinned_blocks"], told["staging"]) == (8, False)
    assert rig.stager.n_jobs == 1


@pytest.mark.parametrize("why", ["no_tier", "away", "not_tierable", "setting"])
def test_without_a_tier_it_is_pinned_only(why: str) -> None:
    tier = VirtualTier()
    rig = Rig(
        tier=NoTier() if why == "no_tier" else tier,
        config=PolicyConfig(stage=why != "setting"),
    )
    if why == "away":
        tier.lose()
    told = rig.end("a", tierable=why != "not_tierable")
    assert told is not None
    assert (told["action"], told["pinned_blocks"], told["staging"]) == ("pin", 8, False)
    assert rig.stager.n_jobs == 0


def test_an_aborted_turn_is_not_kept_on_purpose(rig: Rig) -> None:
    told = rig.end("a", aborted=True)
    assert told is not None
    assert (told["pinned_blocks"], told["staging"]) == (0, False)
    assert not rig.pool.references


def test_shadow_decides_and_changes_nothing(rig: Rig, tmp_path: Path) -> None:
    rig = Rig(log_path=tmp_path / "log")
    assert rig.end("a", shadow=True) is None
    assert not rig.pool.references
    assert rig.stager.n_jobs == 0
    assert rig.decisions() == ["decisions|pause|pin|memory_free"]
    (line,) = (tmp_path / "log").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["action"], entry["pinned"], entry["stage"]) == ("pin", False, False)


def test_shadow_displaces_nobody() -> None:
    rig = Rig(budget_blocks=10)
    rig.end("cheap")
    rig.regret = {"cheap": 0.1, "a": 9.0}
    rig.end("a", shadow=True)
    assert rig.released == []
    assert "cheap" in rig.pins


def test_the_log_says_why(tmp_path: Path) -> None:
    rig = Rig(log_path=tmp_path / "log")
    rig.end("a")
    (line,) = (tmp_path / "log").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["event"], entry["program"], entry["request_id"]) == ("pause", "program-a", "a")
    assert (entry["pinned"], entry["stage"], entry["stage_reason"]) == (
        True,
        True,
        "staged_at_pause",
    )
    assert entry["costs"]["pin_and_stage"] <= min(entry["costs"].values())
    assert entry["decision_us"] == 250.0


def test_within_the_budget_the_cheapest_pins_yield() -> None:
    rig = Rig(budget_blocks=24)
    for key in ("x", "y", "z"):
        rig.end(key)
    rig.regret = {"x": 0.5, "y": 0.1, "z": 5.0, "a": 2.0}
    told = rig.end("a")
    assert told is not None
    assert told["pinned_blocks"] == 8
    assert rig.released == [("y", ReleaseCause.BUDGET)]
    assert {pin.key for pin in rig.pins.pins()} == {"x", "z", "a"}
    assert rig.pins.pinned_blocks == 24


def test_nobody_yields_to_equals() -> None:
    rig = Rig(budget_blocks=8)
    rig.end("x")
    rig.regret = {"x": 1.0, "a": 1.2}
    told = rig.end("a")
    assert told is not None
    assert told["pinned_blocks"] == 0
    assert rig.released == []
    rig.regret["a"] = 1.3
    told = rig.end("a2")
    assert told is not None
    rig.regret["a3"] = 1.3
    assert rig.end("a3") is not None
    assert rig.released == [("x", ReleaseCause.BUDGET)]


def test_client_and_log_are_told_what_was_done_not_what_was_wished(tmp_path: Path) -> None:
    rig = Rig(budget_blocks=8, log_path=tmp_path / "log")
    rig.end("x")
    rig.regret = {"x": 1.0, "a": 1.2}
    told = rig.end("a")
    assert told is not None
    assert (told["action"], told["pinned_blocks"], told["staging"]) == ("offload", 0, True)
    entry = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert (entry["action"], entry["pinned"], entry["stage"]) == ("pin", False, True)


def test_nobody_yields_if_it_would_not_be_enough() -> None:
    rig = Rig(budget_blocks=10)
    rig.end("x", 8)
    rig.regret = {"x": 0.0, "a": 9.0}
    told = rig.end("a", 12)
    assert told is not None
    assert told["pinned_blocks"] == 0
    assert rig.released == []
    assert told["reason"] == "pin_budget"
    assert told["action"] == "offload"


def test_nobody_yields_when_their_blocks_are_shared() -> None:
    """Two pins on the same blocks: ending one makes no room."""
    rig = Rig(budget_blocks=10)
    rig.end("x")
    (first,) = rig.pins.pins()
    assert rig.pins.pin("y", "q", first.block_ids, now_s=100.0, ttl_s=500.0)
    rig.regret = {"x": 0.0, "y": 5.0, "a": 1.0}
    told = rig.end("a")
    assert told is not None
    assert told["pinned_blocks"] == 0
    assert rig.released == [], "a pin was ended for nothing"


def test_blocks_that_are_pinned_already_cost_no_budget() -> None:
    """A parallel turn of the program has pinned nearly the same blocks."""
    rig = Rig(budget_blocks=8)
    rig.end("x")
    (first,) = rig.pins.pins()
    blocks = [rig.pool.blocks[b] for b in first.block_ids]
    rig.pool.touch(blocks)
    request = FakeRequest("y", list(range(28)), output_token_ids=list(range(4)))
    turn = Turn(request, "q", RequestHints(), SEED, False, 0.0, 0.0)
    told = rig.pauses.decide(
        turn,
        CALL,
        list(first.block_ids),
        None,
        now_s=100.0,
        aborted=False,
        shadow=False,
        load=Load(0, 0, 1, 0),
    )
    assert told is not None
    assert told["pinned_blocks"] == 8
    assert len(rig.pins) == 2


def test_what_is_staged_already_is_not_staged_again(rig: Rig) -> None:
    rig.end("a")
    for _ in range(5):
        for order in rig.stager.advance(0.0):
            rig.stager.on_result(OrderResult(order.order_id, "store", True, 1, 0.1, 1))
        for event in rig.tier.poll(0.0):
            rig.stager.on_event(event, 0.0)  # type: ignore[arg-type]
    assert rig.stager.n_jobs == 0
    rig.pins.release_all(ReleaseCause.TTL)
    told = rig.end("a")
    assert told is not None
    assert not told["staging"]
    assert rig.stager.n_jobs == 0


def test_output_that_is_never_repeated_is_neither_pinned_nor_staged(rig: Rig) -> None:
    for _ in range(50):
        rig.policy.ttl.observe_output_reuse(0, BLOCK_TOKENS)
    told = rig.end("a", 8)
    assert told is not None
    assert told["pinned_blocks"] == 7
    (job,) = rig.stager._jobs.values()
    assert len(job.chain) == 7 * BLOCK_TOKENS // CHUNK_TOKENS
    (pin,) = rig.pins.pins()
    assert isinstance(pin.data, PinnedTurn)
    assert pin.data.staged_tokens == 24


def test_regret_is_asked_for_the_pin_that_would_be(rig: Rig) -> None:
    asked: list[Pin] = []

    def regret(pin: Pin, now_s: float) -> float:
        asked.append(pin)
        return 1.0 if pin.key == "x" else 9.0

    rig = Rig(budget_blocks=8)
    rig.end("x")
    rig.pauses.regret_s_per_block = regret  # type: ignore[method-assign]
    rig.end("a")
    mine = next(pin for pin in asked if pin.key == "a")
    assert isinstance(mine.data, PinnedTurn)
    assert mine.data.miss_unstaged_s > 0
    assert "a" in rig.pins
