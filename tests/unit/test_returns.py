"""A program's return: what a pin gave, what a load can bring, and which tokens came from where."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.gpu_pin import PinTable, ReleaseCause
from kvtier.identity.request_params import RequestHints
from kvtier.orders import OrderIds
from kvtier.policy import Policy
from kvtier.policy_facts import PolicyConfig
from kvtier.stats import Stats
from kvtier.turns.block_pool import VllmBlockPool
from kvtier.turns.decision_log import DecisionLog
from kvtier.turns.reading import TierReader
from kvtier.turns.returns import LOOKUP_DEADLINE_S, Returns
from kvtier.turns.staged_copies import Staged
from kvtier.turns.staging import Stager
from kvtier.turns.turn import Turn
from tests.unit.fake_vllm import BLOCK_TOKENS, CHUNK_TOKENS, FakePool, FakeRequest, engine_facts
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvtier.gpu_pin import Released

SEED = bytes(16)


class Rig:
    """`Returns` with its surroundings, and a tier that holds what `store` puts there."""

    def __init__(self, config: PolicyConfig | None = None, log_path: Path | None = None) -> None:
        self.now_s = 100.0
        self.facts = engine_facts()
        self.tier = VirtualTier()
        pool = VllmBlockPool(FakePool(60))
        self.pins = PinTable(pool, 60)
        self.stats = Stats()
        self.policy = Policy(self.facts, config or PolicyConfig())
        ids, blocks = OrderIds(), self.facts.chunk_blocks
        self.stager = Stager(
            self.tier,
            self.pins,
            self.stats,
            namespace="ns",
            chunk_blocks=blocks,
            split_chunks=8,
            next_order_id=ids,
        )
        self.reader = TierReader(
            self.tier,
            self.stats,
            namespace="ns",
            block_tokens=BLOCK_TOKENS,
            chunk_blocks=blocks,
            order_ids=ids,
        )
        self.noted: list[Released | None] = []
        self.log = DecisionLog(log_path)
        self.returns = Returns(
            self.facts,
            self.reader,
            self.stager,
            self.pins,
            self.policy,
            self.stats,
            self.log,
            lambda *released: self.noted.extend(released),
        )
        self.waits = 0

    def turn(
        self, n_tokens: int, *, request_id: str = "r", seed: bytes = SEED, local_tokens: int = 0
    ) -> Turn:
        request = FakeRequest(request_id, list(range(n_tokens)))
        turn = Turn(request, "p", RequestHints(), seed, True, 0.0, 0.0)
        turn.local_tokens = local_tokens
        return turn

    def store(self, n_tokens: int) -> None:
        chain = self.returns.chain_of(self.turn(n_tokens), n_tokens)
        keys = bytes(chain.keys)
        table = self.tier.table
        slots = table.reserve("o", 1, "ns", "p", keys, 0, len(chain), 1, 1, 1.0, 9.0, 0.0)
        assert slots is not None
        table.commit("o", 1, 0.0, ok=True)

    def wait(self) -> None:
        self.waits += 1
        for event in self.tier.poll(0.0):
            self.reader.on_event(event)  # type: ignore[arg-type]

    def hit(self, turn: Turn) -> int | None:
        return self.returns.hit_tokens(
            turn, self.returns.readable_tokens(turn), self.now_s, self.wait
        )

    def pin(self, key: str, blocks: Sequence[int], prompt_blocks: int, program: str = "p") -> None:
        data = PinnedTurn("bash", len(blocks) * BLOCK_TOKENS, prompt_blocks, 1.0)
        assert self.pins.pin(key, program, blocks, now_s=0.0, ttl_s=9.0, data=data)


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.mark.parametrize(
    ("prompt_tokens", "readable"), [(1, 0), (8, 0), (9, 8), (16, 8), (17, 16), (30, 24)]
)
def test_whole_chunks_without_the_last_token_are_readable(
    rig: Rig, prompt_tokens: int, readable: int
) -> None:
    assert rig.returns.readable_tokens(rig.turn(prompt_tokens)) == readable


def test_an_answer_that_came_in_a_long_step_is_not_late(rig: Rig) -> None:
    rig.store(16)
    rig.tier.answer_after = 1
    turn = rig.turn(30)
    assert rig.hit(turn) is None
    rig.now_s += 10 * LOOKUP_DEADLINE_S
    assert rig.hit(turn) == 16
    assert "failures|lookup_late" not in rig.stats.totals


def test_a_late_answer_is_not_waited_for(rig: Rig) -> None:
    rig.store(16)
    rig.tier.answer_after = 2
    turn = rig.turn(30)
    assert rig.hit(turn) is None
    rig.now_s += LOOKUP_DEADLINE_S * 0.9
    assert rig.hit(turn) is None
    rig.now_s += LOOKUP_DEADLINE_S * 0.1
    assert rig.hit(turn) == 0
    assert turn.bypass_tier
    assert rig.stats.totals["failures|lookup_late"] == 1
    rig.wait()
    assert not rig.tier.leaks(), "the answer came, and its locks were given back"


def test_the_tier_is_asked_once_and_waited_for_once(rig: Rig) -> None:
    rig.store(16)
    rig.tier.answer_after = 1
    turn = rig.turn(30)
    assert rig.hit(turn) is None
    assert rig.hit(turn) is None
    assert rig.waits == 1
    rig.wait()
    assert rig.hit(turn) == 16
    assert rig.tier._next_id == 1


def test_a_prompt_shorter_than_a_chunk_asks_nobody(rig: Rig) -> None:
    assert rig.hit(rig.turn(CHUNK_TOKENS)) == 0
    assert rig.waits == 0


def test_an_answer_corrects_what_staging_believes(rig: Rig) -> None:
    chain = rig.returns.chain_of(rig.turn(24), 24)
    rig.stager.copies._staged["p"] = Staged(chain, 3)
    rig.store(8)
    assert rig.hit(rig.turn(30)) == 8
    assert rig.stager.copies.chunks_of("p", chain) == 1


def test_what_the_gpu_has_is_not_loaded(rig: Rig) -> None:
    assert rig.returns.reload_tokens(rig.turn(30, local_tokens=16), 16) == 0
    assert rig.stats.totals == {}


def test_a_decision_is_recorded_when_it_changes(rig: Rig, tmp_path: Path) -> None:
    rig = Rig(log_path=tmp_path / "log")
    turn = rig.turn(30)
    for _ in range(3):
        assert rig.returns.reload_tokens(turn, 24) == 24
    assert rig.stats.totals == {"decisions|return|reload|reload_cheaper": 1}
    assert turn.predicted_load_s > 0
    rig.returns.reload_tokens(turn, 16)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["reload_tokens"] for line in lines] == [24, 16]
    assert lines[0]["event"] == "return"
    assert lines[0]["costs"]["reload"] < lines[0]["costs"]["recompute"]


@pytest.mark.parametrize(
    ("mode", "tokens"), [("always", 24), ("never", 0), ("first_k", 16), ("auto", 24)]
)
def test_reload_can_be_forced(mode: str, tokens: int) -> None:
    config = PolicyConfig(reload=mode, reload_first_chunks=2)  # type: ignore[arg-type]
    assert Rig(config).returns.reload_tokens(Rig(config).turn(30), 24) == tokens


def test_the_pin_is_handed_over(rig: Rig) -> None:
    rig.pin("before", [1, 2, 3, 4, 5], prompt_blocks=4)
    turn = rig.turn(30, local_tokens=5 * BLOCK_TOKENS)
    assert rig.returns.hand_over(turn, lambda: [1, 2, 3, 4, 5, 9, 10]) == 20
    assert len(rig.pins) == 0
    (released,) = rig.noted
    assert released is not None
    assert (released.pin.key, released.cause) == ("before", ReleaseCause.HANDOFF)


def test_a_rewritten_answer_still_continues_its_prompt(rig: Rig) -> None:
    rig.pin("before", [1, 2, 3, 4, 5], prompt_blocks=3)
    turn = rig.turn(30, local_tokens=3 * BLOCK_TOKENS)
    before = rig.policy.ttl.output_reuse
    assert rig.returns.hand_over(turn, lambda: [1, 2, 3, 8, 9]) == 12
    assert len(rig.pins) == 0
    assert rig.policy.ttl.output_reuse < before


def test_a_repeated_answer_raises_the_expectation(rig: Rig) -> None:
    for _ in range(5):
        rig.policy.ttl.observe_output_reuse(0, 8)
    before = rig.policy.ttl.output_reuse
    rig.pin("before", [1, 2, 3, 4], prompt_blocks=2)
    rig.returns.hand_over(rig.turn(30, local_tokens=16), lambda: [1, 2, 3, 4, 5])
    assert rig.policy.ttl.output_reuse > before


@pytest.mark.parametrize("blocks", [[1, 2, 7, 8], [1], [], [6, 7, 8, 9]])
def test_who_shares_only_a_beginning_takes_no_pin(rig: Rig, blocks: list[int]) -> None:
    rig.pin("before", [1, 2, 3, 4, 5], prompt_blocks=4)
    assert rig.returns.hand_over(rig.turn(30, local_tokens=8), lambda: blocks) == 0
    assert "before" in rig.pins
    assert rig.noted == []


def test_pins_of_other_programs_stay(rig: Rig) -> None:
    rig.pin("other", [1, 2], prompt_blocks=1, program="q")
    assert rig.returns.hand_over(rig.turn(30, local_tokens=8), lambda: [1, 2, 3]) == 0
    assert "other" in rig.pins


@pytest.mark.parametrize("ok", [True, False])
def test_the_sources_add_up_to_the_prompt(rig: Rig, *, ok: bool) -> None:
    turn = rig.turn(30, local_tokens=12)
    rig.returns.count_sources(turn, 8, 12)
    now = {"gpu_pin": 8.0, "gpu_cache": 4.0, "recomputed": 6.0}
    assert rig.stats.totals == {f"prompt_tokens|{name}": n for name, n in now.items()}
    rig.returns.count_loaded(turn, ok=ok)
    rig.returns.count_loaded(turn, ok=ok)
    loaded = "cpu" if ok else "recomputed"
    now[loaded] = now.get(loaded, 0.0) + 12
    assert {k: v for k, v in rig.stats.totals.items() if v} == {
        f"prompt_tokens|{name}": n for name, n in now.items()
    }
    assert sum(rig.stats.totals.values()) == 30


def test_chains_grow_with_the_program_and_end_with_it(rig: Rig) -> None:
    first = rig.returns.chain_of(rig.turn(16), 16)
    second = rig.returns.chain_of(rig.turn(30), 30)
    assert bytes(second.keys).startswith(bytes(first.keys))
    other = rig.returns.chain_of(rig.turn(30, seed=b"x" * 16), 30)
    assert other.seed != second.seed
    assert set(other.keys[:16]) != set(second.keys[:16])
    rig.returns.forget("p")
    assert rig.returns._chains == {}
