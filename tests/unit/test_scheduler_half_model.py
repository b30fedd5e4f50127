"""Any order of arrivals, turns, aborts, failures and losses: nothing is lost, nothing is left.

`MiniEngine` fails when a request computes on KV that is not its own, `FakePool` when a block is
freed once too often, the fake L1 when a chunk is evicted while it is read.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvtier import link_messages as messages
from kvtier.backend import TierState
from kvtier.gpu_pin import ReleaseCause
from kvtier.link_messages import ProgramKey
from kvtier.programs import ProgramId, ProgramLimits
from kvtier.ttl.tenant_budgets import TenantBudget
from kvtier.turns.live_mode import Mode
from tests.unit.command_cases import ScriptedLink
from tests.unit.fake_vllm import FakeRequest
from tests.unit.mini_engine import MiniEngine
from tests.unit.virtual_tier import VirtualTier

PROGRAMS = ["a", "b", "c"]
MAX_SHOCKS = 3
"""Losses of the tier and weight updates in one run: with more, nothing is ever read back."""


COMMANDS: dict[str, Any] = {
    "pin": messages.PinCommand,
    "release": messages.ReleaseCommand,
    "stage": messages.StageCommand,
    "prefetch": messages.PrefetchCommand,
    "tool_call": messages.ToolCallCommand,
    "tool_return": messages.ToolReturnCommand,
    "end": messages.EndCommand,
    "overrides": messages.OverridesCommand,
    "policy": messages.PolicyCommand,
}
FIELDS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "pin": st.fixed_dictionaries({"ttl_s": st.sampled_from([0.02, 5.0, 1e6])}),
    "release": st.just({}),
    "stage": st.just({}),
    "prefetch": st.just({}),
    "tool_call": st.fixed_dictionaries(
        {"tool": st.just("t"), "p50_s": st.sampled_from([None, 0.1, 1000.0])}
    ),
    "tool_return": st.just({}),
    "end": st.just({}),
    "overrides": st.sampled_from(
        [
            {"overrides": overrides}
            for overrides in (
                [],
                [messages.TtlOverride(mode="fixed", ttl_s=0.0)],
                [messages.TtlOverride(mode="cap", ttl_s=3.0)],
                [messages.TtlOverride(mode="floor", ttl_s=30.0)],
            )
        ]
    ),
    "policy": st.sampled_from(
        [
            {"mode": "shadow"},
            {"mode": "off"},
            {"mode": "on"},
            {"pin_budget_fraction": 0.2},
            {"pin_budget_fraction": 1.0},
            {"max_ttl_s": 2.0},
            {"stage": False},
            {"stage": True},
        ]
    ),
}


class SchedulerHalfMachine(RuleBasedStateMachine):
    """A few programs on a small pool and a small tier."""

    @initialize(
        n_blocks=st.sampled_from([16, 30, 60]),
        n_slots=st.sampled_from([4, 12, 100]),
        ranks=st.sampled_from([1, 2]),
        budget=st.sampled_from([0.3, 1.0]),
        window_chunks=st.sampled_from([1, 2, 100]),
        byte_seconds=st.sampled_from([0, 20_000, 10**9]),
    )
    def start(
        self,
        n_blocks: int,
        n_slots: int,
        ranks: int,
        budget: float,
        window_chunks: int,
        byte_seconds: int,
    ) -> None:
        self.link = ScriptedLink()
        self.tier = VirtualTier(n_slots=n_slots, ranks=ranks)
        self.engine = MiniEngine(
            n_blocks=n_blocks,
            tier=self.tier,
            ranks=ranks,
            limits=ProgramLimits(forget_after_s=2000.0),
            pin_budget_fraction=budget,
            link=self.link,
        )
        if byte_seconds:
            self.engine.half.policy.ttl.budgets.replace([TenantBudget(None, byte_seconds, 60.0)])
        # Prefetch in pieces, as long contexts are.
        self.engine.half.prefetcher._pieces._piece_chunks = 1
        self.engine.half.prefetcher._pieces._window_bytes = (
            window_chunks * self.engine.facts.slot_bytes
        )
        self.max_tokens = (n_blocks - 2) * 4
        self.texts: dict[str, list[int]] = {}
        self.next_id = 0
        self.failing = ""
        self.shocks = 0
        self.tier.fail = lambda what: "server_error" if self._fails(what) else None
        self.engine.workers.ok = lambda order: not self._fails(order.direction)

    def unfinished(self) -> list[str]:
        return sorted(e.request.request_id for e in self.engine._entries())

    @rule(
        program=st.sampled_from(PROGRAMS),
        n_new=st.integers(1, 24),
        n_output=st.integers(1, 10),
        fresh=st.sampled_from([False, False, True]),
        n_steps=st.sampled_from([0, 0, 4, 12, 20]),
        named=st.booleans(),
        hints=st.sampled_from(
            [None, None, {"end": True}, {"ttl_s": 0.1}, {"stage": False}, {"pin": False}]
        ),
    )
    def turn(
        self,
        program: str,
        n_new: int,
        n_output: int,
        fresh: bool,
        n_steps: int,
        named: bool,
        hints: Any,
    ) -> None:
        """A program's next turn; `fresh` ones share no more than a system prompt."""
        self.next_id += 1
        start = 1000 * (1 + PROGRAMS.index(program))
        before = [] if fresh else self.texts.get(program, [])
        before = before or list(range(10))
        tokens = [*before, *range(start + self.next_id, start + self.next_id + n_new)]
        if len(tokens) + n_output > self.max_tokens:
            tokens = [*range(10), start + self.next_id]
        request = FakeRequest(
            f"{program}{self.next_id}",
            tokens,
            n_output,
            session_id=program if named else None,
            kv_transfer_params={"kvtier": hints} if hints else None,
        )
        self.engine.add(request)
        self.texts[program] = [*tokens, *(7 + i for i in range(n_output))]
        for _ in range(n_steps):
            self.engine.step()

    @precondition(lambda self: len(self.engine.half.prefetcher.paused))
    @rule(
        data=st.data(),
        evicted=st.booleans(),
        ttl_s=st.sampled_from([None, 0.02, 30.0]),
        delay=st.integers(0, 3),
        n_steps=st.sampled_from([1, 2, 6]),
        then=st.sampled_from(["", "reset", "new_weights", "lose_tier", "off"]),
        returns=st.booleans(),
    )
    def prefetch(
        self,
        data: st.DataObject,
        evicted: bool,
        ttl_s: float | None,
        delay: int,
        n_steps: int,
        then: str,
        returns: bool,
    ) -> None:
        """A program is said to come back soon. It does at once, or something happens, or both."""
        engine, half = self.engine, self.engine.half
        named = {half.facts.program_handle(ProgramId(None, "named", p)): p for p in PROGRAMS}
        program = data.draw(st.sampled_from(sorted(half.prefetcher.paused._turns)))
        engine.run(max_steps=2000)
        if evicted:
            self.memory_is_used()
        engine.workers.delay = delay
        half.prefetch(program, engine.now_s, ttl_s)
        for _ in range(n_steps):
            engine.step()
        match then:
            case "reset":
                self.reset_prefix_cache()
            case "new_weights" if self.shocks < MAX_SHOCKS:
                self.new_weights()
            case "lose_tier" if self.shocks < MAX_SHOCKS:
                self.lose_tier(n_steps=1, restarted=True)
            case "off":
                half.live_mode.mode = Mode.OFF
                engine.step()
                half.live_mode.mode = Mode.ON
        if returns and program in named:
            self.turn(
                named[program], n_new=3, n_output=2, fresh=False, n_steps=6, named=True, hints=None
            )

    @rule(
        kind=st.sampled_from(list(COMMANDS)),
        data=st.data(),
        program=st.sampled_from(PROGRAMS),
        paused=st.booleans(),
        wake=st.booleans(),
    )
    def command(
        self, kind: str, data: st.DataObject, program: str, paused: bool, wake: bool
    ) -> None:
        """An operator or a client asks for something, at any moment."""
        if paused:
            self.engine.run(max_steps=2000)
        command, fields = COMMANDS[kind], data.draw(FIELDS[kind])
        if kind not in ("overrides", "policy"):
            fields = {"program": ProgramKey(None, program), **fields}
        self.next_id += 1
        self.link.queue.append(command(id=self.next_id, **fields))
        if wake:
            self.engine.wake()
            assert self.link.answers[-1].id == self.next_id
        assert all(answer.reason != "internal" for answer in self.link.answers)

    @rule(n_steps=st.integers(1, 8))
    def steps(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self.engine.step()

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(self.unfinished())))

    @precondition(lambda self: self.engine.running)
    @rule()
    def preempt(self) -> None:
        self.engine._preempt(self.engine.running[-1])

    @rule(seconds=st.sampled_from([0.5, 8.0, 2500.0]))
    def wait(self, seconds: float) -> None:
        self.engine.now_s += seconds

    @rule(polls=st.integers(0, 3), delay=st.integers(0, 3))
    def slow_down(self, polls: int, delay: int) -> None:
        self.tier.answer_after = polls
        self.engine.workers.delay = delay

    @rule(what=st.sampled_from(["load", "store", "lookup", "reserve", "commit"]))
    def fail_next(self, what: str) -> None:
        """The next such copy or operation fails, and no other."""
        self.failing = what

    def _fails(self, what: str) -> bool:
        fails = what == self.failing
        self.failing = "" if fails else self.failing
        return fails

    @precondition(lambda self: self.shocks < MAX_SHOCKS)
    @rule(n_steps=st.integers(0, 4), restarted=st.booleans())
    def lose_tier(self, n_steps: int, restarted: bool) -> None:
        self.shocks += 1
        self.tier.lose()
        for _ in range(n_steps):
            self.engine.step()
        self.tier.come_back(restarted=restarted)

    @rule()
    def memory_is_used(self) -> None:
        """Pins expire, and others use the memory: what is paused is in the tier or nowhere."""
        self.engine.now_s += 700.0
        self.engine.step()
        blocks = self.engine.pool.take(self.engine.pool.get_num_free_blocks())
        assert blocks is not None
        self.engine.pool.free_blocks(blocks)

    @rule()
    def poll(self) -> None:
        self.engine.half.answers.poll(self.engine.now_s)

    @rule()
    def reset_prefix_cache(self) -> None:
        """Sleep, say: the weights stay, and so does what is in the tier."""
        if not self.engine.running and not self.engine.loading:
            self.engine.reset_prefix_cache()

    @precondition(lambda self: self.shocks < MAX_SHOCKS)
    @rule()
    def new_weights(self) -> None:
        self.shocks += 1
        self.engine.update_weights()

    @invariant()
    def references_have_holders(self) -> None:
        if not hasattr(self, "engine"):
            return
        named: dict[int, int] = {}
        pins = self.engine.half.pins
        entries = [*self.engine.waiting, *self.engine.running, *self.engine.loading.values()]
        holders = [
            *(entry.blocks for entry in entries),
            *(block_ids.tolist() for block_ids in pins.references()),
        ]
        for blocks in holders:
            for block in blocks:
                named[block] = named.get(block, 0) + 1
        assert self.engine.pool.references == named
        assert pins.pinned_blocks <= pins.budget_blocks

    @invariant()
    def tenants_pay_for_their_pins(self) -> None:
        if not hasattr(self, "engine"):
            return
        half = self.engine.half
        budgets = half.policy.ttl.budgets
        for budget in budgets.all():
            left = budgets.left(budget.tenant, self.engine.now_s)
            assert -1e-3 <= left <= budget.byte_seconds
            charged = budgets._accounts[budget.tenant].charged
            assert charged.keys() <= {pin.key for pin in half.pins.pins()}
            for pin in half.pins.pins():
                n_bytes = len(pin.block_ids) * half.facts.block_bytes * half.facts.ranks
                due = n_bytes * (pin.deadline_s - self.engine.now_s)
                assert charged[pin.key] >= due - 1e-3

    @invariant()
    def nothing_is_pinned_unless_kvtier_is_on(self) -> None:
        if hasattr(self, "engine") and self.engine.half.housekeeping._seen_mode is not Mode.ON:
            assert len(self.engine.half.pins) == 0

    @invariant()
    def prompt_tokens_add_up(self) -> None:
        if hasattr(self, "engine"):
            totals = self.engine.stats.totals
            assert all(n >= 0 for key, n in totals.items() if key.startswith("prompt_tokens"))

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.half.live_mode.set(Mode.ON)
        engine.run(max_steps=2000)
        assert not self.unfinished(), "a request waits for ever"
        assert self.tier.state is TierState.READY
        for _ in range(10):
            engine.step()
        assert not engine.half.has_work()
        engine.now_s += 700.0
        engine.step()
        assert engine.pool.references == {}, "a reference without a holder"
        assert self.tier.leaks() == {}
        assert self.tier.idle
        assert engine.half.reader.n_loads == 0
        assert not self.tier._started, "an operation without an event"
        engine.now_s += 2500.0
        engine.step()
        engine.step()
        half = engine.half
        left = (half._turns, half._waiting_tokens, half.stager.copies._staged, half.returns._chains)
        assert not any(left), left
        assert half.policy.ttl.announcements.n_turns == 0
        assert not half.prefetcher.busy()
        assert (len(half.prefetcher.paused), half.prefetcher.paused.n_bytes) == (0, 0)
        assert not half.prefetcher._lookups._reader._reads
        assert not half.room.is_short
        assert len(half.programs) == 0
        assert half.pins.release_all(ReleaseCause.SHUTDOWN) == []


TestSchedulerHalfMachine = SchedulerHalfMachine.TestCase
TestSchedulerHalfMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_a_pin_that_is_over_is_not_lengthened() -> None:
    """An idle engine ends no pin in time: one whose tenant had 10 byte-seconds left was then kept on for 8 s."""
    machine = SchedulerHalfMachine()
    machine.start(n_blocks=16, n_slots=4, ranks=1, budget=0.3, window_chunks=1, byte_seconds=20_000)
    machine.turn(program="a", n_new=1, n_output=2, fresh=False, n_steps=0, named=False, hints=None)
    machine.engine.run()
    half = machine.engine.half
    (pin,) = half.pins.pins()
    assert half.policy.ttl.budgets.left(None, machine.engine.now_s) < 100.0
    machine.wait(seconds=8.0)
    assert pin.deadline_s < machine.engine.now_s
    half.prefetch(pin.program, machine.engine.now_s)
    machine.engine.step()
    machine.tenants_pay_for_their_pins()
