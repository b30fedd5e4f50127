"""Scenarios with a CPU tier (virtual) and copies that end late, in any order, or badly.

The random walks check after each step that every reference on a block has a holder, and before each
token that the KV it attends to is its own.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.engine.engine_spec import EngineSpec
from tests.engine.scheduler_harness import Drive, Engine
from tests.engine.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.copy_worker import Fate

Facts = dict[str, Any]

TIER = {"kvtier.admission": "off", "kvtier.reload": "always"}
STAGE_ONLY = {"ttl_s": 0.0}
PASSING = {"pin": False, "stage": False}
WALK_STEPS = 300
SESSIONS = 6


def prompt_of(generator: random.Random, n_tokens: int) -> list[int]:
    return [generator.randrange(3, 999) for _ in range(n_tokens)]


def _two_turns(
    *,
    is_async: bool,
    fate: Callable[[Any], Fate] | None = None,
    tier: VirtualTier | None = None,
) -> Facts:
    """A turn that is staged, traffic that evicts it, and the next turn."""
    tier = tier or VirtualTier()
    engine = Engine(EngineSpec(is_async=is_async, blocks=30, settings=TIER), tier)
    drive, generator = Drive(engine, fate), random.Random(1)
    first = engine.request("a1", prompt_of(generator, 100), 61, session="A", kvtier=STAGE_ONLY)
    drive.run(first)
    staged = tier.resident_chunks
    held_after = engine.half.pins.held_blocks
    for i in range(8):
        drive.run(engine.request(f"x{i}", prompt_of(generator, 200), 3, kvtier=PASSING))
    prompt = [*drive.text(first), *prompt_of(generator, 30)]
    drive.run(engine.request("a2", prompt, 2, session="A", kvtier=STAGE_ONLY))
    engine.check()
    totals = engine.half.stats.totals
    facts = {
        "staged_chunks": staged,
        "held_after_staging": held_after,
        "cached_tokens": drive.cached_tokens["a2"],
        "counted_cpu": totals.get("prompt_tokens|cpu", 0),
        "output_tokens": len(drive.output["a2"]),
        "copies": dict(drive.worker.done),
        "locked_chunks": tier.locked_chunks,
        "failures": {k: v for k, v in totals.items() if k.startswith("failures")},
    }
    engine.connector.shutdown()
    engine.check()
    return {**facts, "lost_blocks": engine.spec.blocks - engine.free_blocks}


def reload(*, is_async: bool) -> Facts:
    """Copies end in their own step, answers come at the next poll."""
    return _two_turns(is_async=is_async)


def reload_slowly(*, is_async: bool) -> Facts:
    """Copies take several steps, answers several polls: staging goes on in an idle engine."""
    return _two_turns(is_async=is_async, fate=lambda _: (7, True), tier=VirtualTier(answer_after=5))


def failed_load(*, is_async: bool) -> Facts:
    """A load fails: the request recomputes."""
    return _two_turns(is_async=is_async, fate=lambda order: (2, order.direction == "store"))


def failed_store(*, is_async: bool) -> Facts:
    """A store fails: nothing counts as staged, the request recomputes."""
    return _two_turns(is_async=is_async, fate=lambda order: (2, order.direction == "load"))


def abort_while_loading(*, is_async: bool) -> Facts:
    """The client goes away while its KV is being loaded."""
    tier = VirtualTier()
    engine = Engine(EngineSpec(is_async=is_async, blocks=30, settings=TIER), tier)
    drive = Drive(engine, lambda order: (6 if order.direction == "load" else 0, True))
    generator = random.Random(1)
    first = engine.request("a1", prompt_of(generator, 100), 61, session="A", kvtier=STAGE_ONLY)
    drive.run(first)
    for i in range(8):
        drive.run(engine.request(f"x{i}", prompt_of(generator, 200), 3, kvtier=PASSING))
    prompt = [*drive.text(first), *prompt_of(generator, 30)]
    engine.scheduler.add_request(engine.request("a2", prompt, 9, session="A", kvtier=STAGE_ONLY))
    for _ in range(4):
        drive.step()
    loads = engine.half.reader.n_loads
    drive.abort("a2")
    # Others must not get the blocks that the load still writes to.
    drive.run(*(engine.request(f"y{i}", prompt_of(generator, 150), 8) for i in range(3)))
    engine.check()
    loads_after = engine.half.reader.n_loads
    engine.connector.shutdown()
    return {
        "loads_at_abort": loads,
        "loads_after": loads_after,
        "locked_chunks": tier.locked_chunks,
        "lost_blocks": engine.spec.blocks - engine.free_blocks,
    }


def start_while_staging(*, is_async: bool) -> Facts:
    """A request needs the blocks that a running copy reads, in an engine with nothing else to do."""
    engine = Engine(EngineSpec(is_async=is_async, settings=TIER), VirtualTier())
    drive, generator = Drive(engine, lambda _: (20, True)), random.Random(1)
    engine.scheduler.add_request(
        engine.request("a1", prompt_of(generator, 250), 10, session="A", kvtier=STAGE_ONLY)
    )
    while not drive.worker.busy:
        drive.step()
    held, steps_before = engine.half.pins.held_blocks, drive.steps
    drive.run(engine.request("new", prompt_of(generator, 200), 5))
    engine.check()
    engine.connector.shutdown()
    return {
        "held_blocks": held,
        "steps_to_start": drive.first_step["new"] - steps_before,
        "lost_blocks": engine.spec.blocks - engine.free_blocks,
    }


def silent_tier(*, is_async: bool) -> Facts:
    """The tier stops answering; a request needs blocks that wait to be staged, and nothing runs."""
    tier = VirtualTier()
    engine = Engine(EngineSpec(is_async=is_async, blocks=18, settings=TIER), tier)
    drive, generator = Drive(engine), random.Random(1)
    first = engine.request("a1", prompt_of(generator, 250), 10, session="A", kvtier=STAGE_ONLY)
    engine.scheduler.add_request(first)
    while not drive.output.get("a1"):
        drive.step()
    tier.answer_after = 1_000_000
    while not first.is_finished():
        drive.step()
    held, steps_before = engine.half.pins.held_blocks, drive.steps
    # Shorter than a chunk, so it asks the tier for nothing.
    engine.scheduler.add_request(engine.request("new", prompt_of(generator, 60), 2, kvtier=PASSING))
    for _ in range(50):
        drive.step()
    started = "new" in drive.first_step
    return {
        "held_blocks": held,
        "steps_to_start": drive.first_step["new"] - steps_before if started else None,
    }


def cancelled_staging(*, is_async: bool) -> Facts:
    """A growing request takes the blocks that a slow copy reads: what was copied must not count."""
    tier = VirtualTier()
    engine = Engine(EngineSpec(is_async=is_async, settings=TIER), tier)
    drive, generator = Drive(engine, lambda _: (200, True)), random.Random(1)
    first = engine.request("a1", prompt_of(generator, 230), 10, session="A", kvtier=STAGE_ONLY)
    engine.scheduler.add_request(first)
    while not drive.worker.busy:
        drive.step()
    held = engine.half.pins.held_blocks
    grow = engine.request("grow", prompt_of(generator, 30), 150, kvtier=PASSING)
    drive.run(grow)
    resident = tier.resident_chunks
    prompt = [*drive.text(first), *prompt_of(generator, 20)]
    drive.run(engine.request("a2", prompt, 2, session="A", kvtier=PASSING))
    engine.check()
    engine.connector.shutdown()
    return {
        "held_blocks": held,
        "preemptions": drive.preemptions,
        "resident_chunks": resident,
        "open_reservations": tier.open_reservations,
        "locked_chunks": tier.locked_chunks,
        "lost_blocks": engine.spec.blocks - engine.free_blocks,
    }


class Walk:
    """A seeded random life of an engine.

    Args:
        engine: The engine.
        drive: Runs its steps.
        generator: Chance.
    """

    def __init__(self, engine: Engine, drive: Drive, generator: random.Random) -> None:
        self.engine = engine
        self.drive = drive
        self.random = generator
        self.history: dict[str, list[int]] = {f"s{i}": [] for i in range(SESSIONS)}
        self.open: dict[str, Any] = {}
        self.done: Counter[str] = Counter()
        self._n_requests = 0

    def step(self) -> None:
        """Something may happen, then the engine steps and everything is checked."""
        self._collect()
        roll = self.random.random()
        if roll < 0.25:
            self._arrive()
        elif roll < 0.29 and self.open:
            request_id = self.random.choice(sorted(self.open))
            del self.open[request_id]
            self.drive.abort(request_id)
            self.done["aborted"] += 1
        elif roll < 0.31:
            self.engine.clock.now_s += self.random.choice((1.0, 10.0, 100.0))
        elif roll < 0.315:
            self.engine.scheduler.reset_prefix_cache()
            self.done["reset"] += 1
        self.drive.step()
        self.engine.check()

    def _arrive(self) -> None:
        session = self.random.choice(sorted(self.history))
        busy = any(known == session for known, _ in self.open.values())
        if busy and self.random.random() < 0.8:
            return
        text = self.history[session]
        if len(text) > 260:
            text = self.history[session] = []
        prompt = [*text, *prompt_of(self.random, self.random.randrange(5, 90))]
        self._n_requests += 1
        request_id = f"r{self._n_requests}"
        hints = self.random.choice(
            (None, {"ttl_s": 2.0}, {"ttl_s": 60.0}, {"ttl_s": 0.0}, {"end": True}, {"pin": False})
        )
        request = self.engine.request(
            request_id,
            prompt,
            self.random.randrange(1, 60),
            session=self.random.choice((session, session, None)),
            kvtier=hints,
        )
        self.open[request_id] = (session, request)
        self.engine.scheduler.add_request(request)

    def _collect(self) -> None:
        for request_id, (session, request) in list(self.open.items()):
            if request.is_finished():
                del self.open[request_id]
                self.history[session] = self.drive.text(request)
                self.done["finished"] += 1


def walk(
    *,
    is_async: bool,
    seed: int,
    tier: VirtualTier | None,
    fate: Callable[[Any], Fate] | None = None,
    settings: dict[str, Any],
    disturb: Callable[[int], None] | None = None,
    kind: type[Walk] = Walk,
    n_steps: int = WALK_STEPS,
) -> Facts:
    """A random life of an engine, checked at each step; what is left at the end.

    Args:
        is_async: Whether the scheduler is the asynchronous one.
        seed: Of chance.
        tier: The CPU tier, if there is one.
        fate: See `Drive`.
        settings: kvtier's.
        disturb: Called before each step, with its number.
        kind: What may happen.
        n_steps: How long it goes on before all is brought to an end.
    """
    spec = EngineSpec(is_async=is_async, blocks=40, settings=settings, max_batch=5)
    engine = Engine(spec, tier)
    drive = Drive(engine, fate)
    life = kind(engine, drive, random.Random(seed))
    for i in range(n_steps):
        if disturb is not None:
            disturb(i)
        life.step()
    drive.run()
    engine.check()
    assert not engine.scheduler.requests, "requests are left"
    totals = engine.half.stats.totals
    facts = {
        "done": dict(life.done),
        "hit_tokens": sum(drive.cached_tokens.values()),
        "copies": dict(drive.worker.done),
        "releases": {k: v for k, v in totals.items() if k.startswith("pin_releases")},
        "internal_failures": totals.get("failures|internal", 0),
        "preemptions": drive.preemptions,
        "preempted_beside_pins": drive.preempted_beside_pins,
        "worst_idle_run": drive.worst_idle_run,
        "loads_left": engine.half.reader.n_loads,
        "staging_left": engine.half.stager.n_jobs,
        "prefetches_left": engine.half.prefetcher.n_going + engine.half.prefetcher.n_in_flight,
        "prefetched_tokens": totals.get("prefetched_tokens", 0),
        "prefetch_ends": {k: v for k, v in totals.items() if k.startswith("prefetch_ends")},
    }
    engine.connector.shutdown()
    engine.check()
    if tier is not None:
        facts["locked_chunks"] = tier.locked_chunks
        facts["open_reservations"] = tier.open_reservations
    return {**facts, "lost_blocks": engine.spec.blocks - engine.free_blocks}


def walk_pins(*, is_async: bool) -> Facts:
    """Pins alone."""
    settings = {"kvtier.tier": "off", "kvtier.pin_budget_fraction": 0.7}
    return walk(is_async=is_async, seed=1, tier=None, settings=settings)


def walk_tier(*, is_async: bool) -> Facts:
    """A small tier, copies of any duration, some of which fail."""
    chance = random.Random(2)
    return walk(
        is_async=is_async,
        seed=2,
        tier=VirtualTier(n_slots=12, answer_after=2),
        fate=lambda _: (chance.randrange(9), chance.random() > 0.1),
        settings={"kvtier.reload": "always", "kvtier.stage_split_chunks": 2},
    )


def walk_tier_restarts(*, is_async: bool) -> Facts:
    """As `walk_tier`, and the tier's server goes away and comes back empty."""
    tier = VirtualTier(n_slots=12, answer_after=2)
    chance = random.Random(3)

    def disturb(step: int) -> None:
        if step % 100 == 60:
            tier.lose()
        elif step % 100 == 80:
            tier.come_back(12)

    return walk(
        is_async=is_async,
        seed=3,
        tier=tier,
        fate=lambda _: (chance.randrange(9), True),
        settings={"kvtier.reload": "always"},
        disturb=disturb,
    )


ALL = [
    reload,
    reload_slowly,
    failed_load,
    failed_store,
    abort_while_loading,
    start_while_staging,
    cancelled_staging,
    silent_tier,
    walk_pins,
    walk_tier,
    walk_tier_restarts,
]
