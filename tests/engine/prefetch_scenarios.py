"""Scenarios of prefetch on vLLM's real scheduler, block pool and prefix cache.

Contents of blocks are tracked: a block that is hit before its copy has ended, or given away while a copy
writes to it, fails the scenario.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from kvtier.programs import ProgramId
from tests.engine.engine_spec import BLOCK_TOKENS, EngineSpec
from tests.engine.scheduler_harness import Drive, Engine
from tests.engine.tier_scenarios import PASSING, STAGE_ONLY, TIER, WALK_STEPS, Walk, prompt_of, walk
from tests.engine.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from tests.engine.copy_worker import Fate

Facts = dict[str, Any]

PREFETCHED_TOKENS = 128
"""100 + 61 tokens leave 160 that can be hit; those of two whole chunks are staged."""


class _Paused:
    """A program whose KV is in the tier alone.

    Args:
        is_async: Whether the scheduler is the asynchronous one.
        load_steps: How many steps a copy to GPU memory takes.
        loads_ok: Whether such copies succeed.
        blocks: Of GPU memory.
    """

    def __init__(
        self, *, is_async: bool, load_steps: int = 0, loads_ok: bool = True, blocks: int = 30
    ) -> None:
        self.tier = VirtualTier()
        self.engine = Engine(EngineSpec(is_async=is_async, blocks=blocks, settings=TIER), self.tier)
        self.load_steps, self.loads_ok = load_steps, loads_ok
        self.drive = Drive(self.engine, self._fate)
        self.random = random.Random(1)
        self.requests_loads = 0
        self.first = self.engine.request("a1", self.text(100), 61, session="A", kvtier=STAGE_ONLY)
        self.drive.run(self.first)
        self.evict()
        prefetcher = self.engine.half.prefetcher
        # In pieces, as long contexts are, and all of them ordered ahead.
        prefetcher._pieces._piece_chunks = 1

    def text(self, n_tokens: int) -> list[int]:
        return prompt_of(self.random, n_tokens)

    def evict(self) -> None:
        for i in range(8):
            self.drive.run(self.engine.request(f"x{i}", self.text(200), 3, kvtier=PASSING))

    def ask(self, ttl_s: float | None = None) -> tuple[str, str]:
        handle = self.engine.half.facts.program_handle(ProgramId(None, "named", "A"))
        return self.engine.half.prefetch(handle, self.engine.clock(), ttl_s)[:2]

    def await_copies(self) -> None:
        while not self.engine.half.prefetcher.n_in_flight:
            self.drive.step()

    def come_back(self) -> Any:
        prompt = [*self.drive.text(self.first), *self.text(30)]
        return self.engine.request("a2", prompt, 2, session="A", kvtier=STAGE_ONLY)

    def facts(self, **more: Any) -> Facts:
        """What is the same in all scenarios, at their end."""
        self.drive.run()
        self.engine.check()
        totals = self.engine.half.stats.totals
        counted = {k.split("|")[1]: int(v) for k, v in totals.items() if k.startswith("prompt_tok")}
        ends = {k.split("|")[1]: int(v) for k, v in totals.items() if k.startswith("prefetch_ends")}
        held = self.engine.half.pins.held_blocks
        self.engine.connector.shutdown()
        self.engine.check()
        return {
            "cached_tokens": self.drive.cached_tokens.get("a2"),
            "counted": counted,
            "ends": ends,
            "requests_loads": self.requests_loads,
            "copies": dict(self.drive.worker.done),
            "held_blocks": held,
            "locked_chunks": self.tier.locked_chunks,
            "preemptions": self.drive.preemptions,
            "internal_failures": totals.get("failures|internal", 0),
            "lost_blocks": self.engine.spec.blocks - self.engine.free_blocks,
            **more,
        }

    def _fate(self, order: Any) -> Fate:
        if order.direction == "store":
            return 0, True
        self.requests_loads += bool(order.request_id)
        return self.load_steps, self.loads_ok


def prefetch(*, is_async: bool) -> Facts:
    """An idle engine loads a program's KV before the program comes back."""
    case = _Paused(is_async=is_async)
    answer = case.ask()
    case.drive.run()
    pinned = case.engine.half.pins.pinned_blocks
    case.drive.run(case.come_back())
    return case.facts(answer=answer, pinned_tokens=pinned * BLOCK_TOKENS)


def prefetch_slowly(*, is_async: bool) -> Facts:
    """Piece by piece, and each takes several steps."""
    case = _Paused(is_async=is_async, load_steps=5)
    case.tier.answer_after = 4
    case.engine.half.prefetcher._pieces._window_bytes = 1
    case.ask()
    case.drive.run()
    case.drive.run(case.come_back())
    return case.facts()


def prefetch_beside_others(*, is_async: bool) -> Facts:
    """Other requests run meanwhile, and start as soon as they would without."""
    case = _Paused(is_async=is_async, load_steps=9)
    case.ask()
    case.await_copies()
    before = case.drive.steps
    others = [case.engine.request(f"y{i}", case.text(100), 20, kvtier=PASSING) for i in range(2)]
    case.drive.run(*others)
    first = max(case.drive.first_step[request.request_id] for request in others) - before
    case.drive.run(case.come_back())
    return case.facts(steps_to_start=first)


def prefetch_and_return(*, is_async: bool) -> Facts:
    """The program comes back while its KV is on its way: it waits for that, and loads nothing itself."""
    case = _Paused(is_async=is_async, load_steps=6)
    case.ask()
    case.await_copies()
    before = case.drive.steps
    case.drive.run(case.come_back())
    return case.facts(steps_to_start=case.drive.first_step["a2"] - before)


def prefetch_and_return_early(*, is_async: bool) -> Facts:
    """It comes back after the first of two pieces was ordered, and loads the other one itself."""
    case = _Paused(is_async=is_async, load_steps=6)
    case.engine.half.prefetcher._pieces._window_bytes = 1
    case.ask()
    case.await_copies()
    case.drive.run(case.come_back())
    return case.facts()


def prefetch_under_pressure(*, is_async: bool) -> Facts:
    """A request comes that needs all of the memory: it waits for the copies under way, and no longer."""
    case = _Paused(is_async=is_async, load_steps=8)
    case.engine.half.prefetcher._pieces._window_bytes = 1
    case.ask()
    case.await_copies()
    before = case.drive.steps
    big = case.engine.request("big", case.text(29 * BLOCK_TOKENS), 3, kvtier=PASSING)
    case.drive.run(big)
    return case.facts(steps_to_start=case.drive.first_step["big"] - before)


def prefetch_beside_growth(*, is_async: bool) -> Facts:
    """A running request grows into what was prefetched: the pin yields, and nobody is preempted."""
    case = _Paused(is_async=is_async, load_steps=2)
    case.ask(ttl_s=500.0)
    grow = case.engine.request("grow", case.text(200), 250, kvtier=PASSING)
    case.drive.run(grow)
    return case.facts(pressure=case.engine.releases("pressure"))


def prefetch_without_memory(*, is_async: bool) -> Facts:
    """Requests use all of the memory, and others wait for it: nothing is taken from them."""
    case = _Paused(is_async=is_async)
    for name in ("u", "v", "w"):
        case.engine.scheduler.add_request(
            case.engine.request(name, case.text(230), 20, kvtier=PASSING)
        )
    case.drive.step()
    case.drive.step()
    answer = case.ask()
    case.drive.run()
    return case.facts(answer=answer)


def prefetch_fails(*, is_async: bool) -> Facts:
    """The copies fail: the request loads or computes what it needs, and no block is wrong."""
    case = _Paused(is_async=is_async, load_steps=2, loads_ok=False)
    case.ask()
    case.drive.run()
    hit = case.engine.half.pins.pinned_blocks
    case.loads_ok = True
    case.drive.run(case.come_back())
    return case.facts(pinned_after=hit)


def prefetch_and_reset(*, is_async: bool) -> Facts:
    """The prefix cache is reset while copies write; other requests compute at once in what is free."""
    case = _Paused(is_async=is_async, load_steps=10)
    case.ask()
    case.await_copies()
    case.engine.scheduler.add_request(case.engine.request("r", case.text(60), 30, kvtier=PASSING))
    case.drive.step()
    case.drive.step()
    case.drive.drain()
    done = case.engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    case.engine.check()
    in_flight = case.engine.half.prefetcher.n_in_flight
    others = [case.engine.request(f"y{i}", case.text(150), 9, kvtier=PASSING) for i in range(3)]
    case.drive.run(*others)
    case.drive.run(case.come_back())
    return case.facts(succeeded=done, in_flight=in_flight)


def prefetch_and_give_up(*, is_async: bool) -> Facts:
    """kvtier fails while copies write: the engine goes on, and no block is lost or overwritten."""
    case = _Paused(is_async=is_async, load_steps=10)
    case.ask()
    case.await_copies()
    half = case.engine.half
    written = half.pins.held_blocks
    case.engine.connector._give_up()
    missing = case.engine.spec.blocks - case.engine.free_blocks
    others = [case.engine.request(f"y{i}", case.text(130), 30) for i in range(2)]
    case.drive.run(*others)
    return {
        "written": written,
        "missing_at_once": missing,
        "output_tokens": [len(case.drive.output[f"y{i}"]) for i in range(2)],
        "lost_blocks": case.engine.spec.blocks - case.engine.free_blocks,
    }


def prefetch_beside_events(*, is_async: bool) -> Facts:
    """Who follows vLLM's KV events hears nothing false: their tokens are not known any more."""
    case = _Paused(is_async=is_async)
    pool = case.engine.pool
    pool.enable_kv_cache_events = True
    case.ask()
    case.drive.run()
    events = [type(event).__name__ for event in pool.kv_event_queue]
    on = pool.enable_kv_cache_events
    case.drive.run(case.come_back())
    return case.facts(events=sorted(set(events)), events_on=on)


class _PrefetchWalk(Walk):
    """A random life in which programs are also prefetched."""

    def step(self) -> None:
        prefetcher = self.engine.half.prefetcher
        prefetcher._pieces._piece_chunks, prefetcher._pieces._window_bytes = (
            1,
            self.random.choice((1, 1 << 30)),
        )
        roll = self.random.random()
        if roll < 0.06:
            self._evict()
        # By request: the names of nameless programs are drawn anew in each run.
        turns = prefetcher.paused._turns
        known = sorted(turns, key=lambda program: turns[program].request_id)
        if roll < 0.2 and known:
            ttl_s = self.random.choice((None, 0.5, 20.0))
            program = self.random.choice(known)
            self.engine.half.prefetch(program, self.engine.clock(), ttl_s)
        super().step()

    def _evict(self) -> None:
        """All requests end, and GPU memory is used by others."""
        while self.engine.scheduler.has_unfinished_requests():
            self.drive.step()
            self.engine.check()
        self.drive.drain()
        self.engine.scheduler.reset_prefix_cache()


def _walk_prefetch(*, is_async: bool, seed: int, restarts: bool) -> Facts:
    chance = random.Random(seed)
    tier = VirtualTier(n_slots=40, answer_after=1)

    def disturb(step: int) -> None:
        if restarts and step % 100 == 60:
            tier.lose()
        elif restarts and step % 100 == 65:
            tier.come_back(40)

    return walk(
        is_async=is_async,
        seed=seed,
        tier=tier,
        fate=lambda _: (chance.randrange(5), chance.random() > 0.05),
        settings={"kvtier.reload": "always", "kvtier.pin_budget_fraction": 0.6},
        disturb=disturb,
        kind=_PrefetchWalk,
        n_steps=2 * WALK_STEPS,
    )


def walk_prefetch(*, is_async: bool) -> Facts:
    """Copies of any duration, some of which fail."""
    return _walk_prefetch(is_async=is_async, seed=11, restarts=False)


def walk_prefetch_restarts(*, is_async: bool) -> Facts:
    """As `walk_prefetch`, and the tier's server goes away and comes back empty."""
    return _walk_prefetch(is_async=is_async, seed=12, restarts=True)


ALL = [
    prefetch,
    prefetch_slowly,
    prefetch_beside_others,
    prefetch_and_return,
    prefetch_and_return_early,
    prefetch_under_pressure,
    prefetch_beside_growth,
    prefetch_without_memory,
    prefetch_fails,
    prefetch_and_reset,
    prefetch_and_give_up,
    prefetch_beside_events,
    walk_prefetch,
    walk_prefetch_restarts,
]
