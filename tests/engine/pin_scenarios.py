"""Scenarios of pins, on vLLM's real scheduler, that return facts for `test_pressure` to judge."""

from __future__ import annotations

import logging
import random
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus
from vllm.version import __version__

from tests.engine.engine_spec import EngineSpec
from tests.engine.scheduler_harness import Drive, Engine

Facts = dict[str, Any]

PIN_ONLY = {"kvtier.tier": "off", "kvtier.admission": "off", "kvtier.pin_budget_fraction": 1.0}
KEEP = {"ttl_s": 60.0}
PASSING = {"pin": False, "stage": False}


class Tokens:
    """Seeded prompts."""

    def __init__(self, seed: int = 1) -> None:
        self.random = random.Random(seed)

    def __call__(self, n_tokens: int) -> list[int]:
        return [self.random.randrange(3, 999) for _ in range(n_tokens)]


def _pin_two(engine: Engine, drive: Drive, tokens: Tokens, prompt: int = 80) -> None:
    """Two paused sessions, A and B, of `(prompt + 20) // 16` blocks each."""
    for name in "AB":
        drive.run(engine.request(name, tokens(prompt), 20, session=name, kvtier=KEEP))


def _end(engine: Engine, drive: Drive) -> Facts:
    """Common facts, after kvtier has given everything back."""
    drive.run()
    engine.check()
    gave_up = engine.connector is not None and engine.connector.scheduler_half is None
    if engine.connector is not None:
        engine.connector.shutdown()
    engine.check()
    return {
        "gave_up": gave_up,
        "preemptions": drive.preemptions,
        "preempted_beside_pins": drive.preempted_beside_pins,
        "worst_idle_run": drive.worst_idle_run,
        "lost_blocks": engine.spec.blocks - engine.free_blocks,
    }


def release(*, is_async: bool) -> Facts:
    """Which vLLM this is."""
    del is_async
    return {"version": __version__.partition("+")[0]}


def pin_hit(*, is_async: bool) -> Facts:
    """The second turn of a session after other traffic that would have evicted the first."""
    facts: Facts = {}
    for name, settings in (("with", PIN_ONLY), ("without", None)):
        engine = Engine(EngineSpec(is_async=is_async, blocks=30, settings=settings))
        drive, tokens = Drive(engine), Tokens()
        first = engine.request("a1", tokens(100), 61, session="A", kvtier=KEEP)
        drive.run(first)
        for i in range(8):
            drive.run(engine.request(f"x{i}", tokens(200), 3, kvtier=PASSING))
        prompt = [*drive.text(first), *tokens(30)]
        drive.run(engine.request("a2", prompt, 2, session="A", kvtier=KEEP))
        facts[f"{name}_cached_tokens"] = drive.cached_tokens["a2"]
        if settings is not None:
            facts["handoffs"] = engine.releases("handoff")
            facts["pinned"] = sorted(engine.pinned_keys)
            facts["counted_gpu_pin"] = engine.half.stats.totals["prompt_tokens|gpu_pin"]
        facts[f"{name}_end"] = _end(engine, drive)
    return facts


def all_pinned(*, is_async: bool) -> Facts:
    """Pins keep every block; a request arrives that needs most of them."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    _pin_two(engine, drive, tokens, prompt=141)
    free_before, steps_before = engine.free_blocks, drive.steps
    drive.run(engine.request("new", tokens(200), 5))
    return {
        "free_before": free_before,
        "steps_to_start": drive.first_step["new"] - steps_before,
        "pressure_releases": engine.releases("pressure"),
        **_end(engine, drive),
    }


def cheapest_first(*, is_async: bool) -> Facts:
    """A small need ends one pin, not all, and not that of the request's own program."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    own = engine.request("A", tokens(141), 20, session="A", kvtier=KEEP)
    drive.run(own)
    drive.run(engine.request("B", tokens(141), 20, session="B", kvtier=KEEP))
    prompt = [*drive.text(own), *tokens(20)]
    drive.run(engine.request("A2", prompt, 2, session="A", kvtier=KEEP))
    return {
        "cached_tokens": drive.cached_tokens["A2"],
        "handoffs": engine.releases("handoff"),
        "pressure_releases": engine.releases("pressure"),
        **_end(engine, drive),
    }


def growth(*, is_async: bool) -> Facts:
    """Two growing requests and one that waits, beside two pinned sessions (research: t15)."""
    facts: Facts = {}
    for name, settings in (("with", PIN_ONLY), ("without", None)):
        engine = Engine(EngineSpec(is_async=is_async, settings=settings))
        drive, tokens = Drive(engine), Tokens()
        _pin_two(engine, drive, tokens)
        steps_before = drive.steps
        drive.run(
            engine.request("g1", tokens(30), 110),
            engine.request("g2", tokens(30), 90),
            engine.request("w", tokens(90), 10),
        )
        facts[f"{name}_steps"] = drive.steps - steps_before
        facts[name] = _end(engine, drive)
    return facts


def growth_beyond_memory(*, is_async: bool) -> Facts:
    """More growth than memory: preemption is due, but only once no pin is left."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    _pin_two(engine, drive, tokens)
    drive.run(*(engine.request(f"g{i}", tokens(30), 150) for i in range(3)))
    return {"done": sorted(map(len, drive.output.values())), **_end(engine, drive)}


def too_large_waits(*, is_async: bool) -> Facts:
    """A waiting request that ending all pins cannot serve must not end them in vain."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    drive.run(engine.request("A", tokens(60), 20, session="A", kvtier=KEEP))
    # Runs in 12 of the 20 blocks; the next one needs 10 where 8 are not in use, 4 of them pinned.
    engine.scheduler.add_request(engine.request("long", tokens(170), 20, kvtier=PASSING))
    for _ in range(4):
        drive.step()
    engine.scheduler.add_request(engine.request("big", tokens(150), 5, kvtier=PASSING))
    for _ in range(8):
        drive.step()
    pinned_while_waiting = sorted(engine.pinned_keys)
    waited = "big" not in drive.first_step
    drive.run()
    return {"waited": waited, "pinned_while_waiting": pinned_while_waiting, **_end(engine, drive)}


def superseded(*, is_async: bool) -> Facts:
    """A session's next turn takes over the pin; a rewritten history ends it at the turn's end."""
    engine = Engine(EngineSpec(is_async=is_async, blocks=60, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    first = engine.request("a1", tokens(100), 20, session="A", kvtier=KEEP)
    drive.run(first)
    second = engine.request("a2", [*drive.text(first), *tokens(20)], 20, session="A", kvtier=KEEP)
    drive.run(second)
    after_second = sorted(engine.pinned_keys)
    # The agent has summarised its history: no block of the old prompt is hit.
    drive.run(engine.request("a3", tokens(60), 20, session="A", kvtier=KEEP))
    after_third = sorted(engine.pinned_keys)
    return {"after_second": after_second, "after_third": after_third, **_end(engine, drive)}


def parallel_turns(*, is_async: bool) -> Facts:
    """Two requests of one session at a time (sub-agents): both stay pinned."""
    engine = Engine(EngineSpec(is_async=is_async, blocks=60, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    first = engine.request("a1", tokens(100), 20, session="A", kvtier=KEEP)
    drive.run(first)
    base = drive.text(first)
    drive.run(
        engine.request("p", [*base, *tokens(20)], 20, session="A", kvtier=KEEP),
        engine.request("q", [*base, *tokens(40)], 30, session="A", kvtier=KEEP),
    )
    cached = {name: drive.cached_tokens[name] for name in "pq"}
    return {"pinned": sorted(engine.pinned_keys), "cached": cached, **_end(engine, drive)}


def program_ended(*, is_async: bool) -> Facts:
    """The client says that the program is over: nothing stays pinned."""
    engine = Engine(EngineSpec(is_async=is_async, blocks=60, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    first = engine.request("a1", tokens(100), 20, session="A", kvtier=KEEP)
    drive.run(first)
    prompt = [*drive.text(first), *tokens(20)]
    drive.run(engine.request("a2", prompt, 2, session="A", kvtier={"end": True}))
    return {"pinned": sorted(engine.pinned_keys), **_end(engine, drive)}


def reset_idle(*, is_async: bool) -> Facts:
    """`reset_prefix_cache` of an engine that holds nothing but pins."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    _pin_two(engine, drive, tokens)
    pinned_before = len(engine.pinned_keys)
    succeeded = engine.scheduler.reset_prefix_cache()
    return {
        "pinned_before": pinned_before,
        "succeeded": succeeded,
        "pinned_after": len(engine.pinned_keys),
        "reset_releases": engine.releases("reset"),
        **_end(engine, drive),
    }


def reset_running(*, is_async: bool) -> Facts:
    """New weights: running requests are preempted, the prefix cache and the connector reset."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    _pin_two(engine, drive, tokens)
    engine.scheduler.add_request(engine.request("r", tokens(60), 30, kvtier=PASSING))
    for _ in range(8):
        drive.step()
    # With a step in flight vLLM itself refuses, whatever the connector: such a step may still write.
    drive.drain()
    succeeded = engine.scheduler.reset_prefix_cache(
        reset_running_requests=True, reset_connector=True
    )
    pinned_after = len(engine.pinned_keys)
    drive.run()
    return {
        "succeeded": succeeded,
        "pinned_after": pinned_after,
        "output_tokens": len(drive.output["r"]),
        **_end(engine, drive),
    }


def pause(*, is_async: bool) -> Facts:
    """What `pause_generation(mode="abort", clear_cache=True)` does, then a new request."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    _pin_two(engine, drive, tokens)
    engine.scheduler.add_request(engine.request("r", tokens(60), 30, session="R", kvtier=KEEP))
    for _ in range(8):
        drive.step()
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    drive.drain()
    succeeded = engine.scheduler.reset_prefix_cache(
        reset_running_requests=True, reset_connector=True
    )
    free_while_paused = engine.free_blocks
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    drive.run(engine.request("after", tokens(60), 5))
    return {
        "succeeded": succeeded,
        "lost_while_paused": engine.spec.blocks - free_while_paused,
        "output_tokens": len(drive.output["after"]),
        **_end(engine, drive),
    }


def ttl(*, is_async: bool) -> Facts:
    """Deadlines are looked at when vLLM calls: at a request's arrival, and in each step."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    drive.run(engine.request("A", tokens(80), 20, session="A", kvtier={"ttl_s": 5.0}))
    drive.run(engine.request("B", tokens(80), 20, session="B", kvtier={"ttl_s": 50.0}))
    drive.run(engine.request("x0", tokens(20), 2, kvtier=PASSING))
    before_deadline = sorted(engine.pinned_keys)
    engine.clock.now_s += 10.0
    while_idle = sorted(engine.pinned_keys)
    engine.scheduler.add_request(engine.request("x1", tokens(20), 200, kvtier=PASSING))
    at_arrival = sorted(engine.pinned_keys)
    for _ in range(3):
        drive.step()
    engine.clock.now_s += 60.0
    drive.step()
    in_a_step = sorted(engine.pinned_keys)
    drive.abort("x1")
    return {
        "before_deadline": before_deadline,
        "while_idle": while_idle,
        "at_arrival": at_arrival,
        "in_a_step": in_a_step,
        "ttl_releases": engine.releases("ttl"),
        **_end(engine, drive),
    }


def abort_waiting(*, is_async: bool) -> Facts:
    """A returning turn is cancelled before it starts: the pin of the turn before it stays."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    first = engine.request("a1", tokens(80), 20, session="A", kvtier=KEEP)
    drive.run(first)
    prompt = [*drive.text(first), *tokens(20)]
    engine.scheduler.add_request(engine.request("a2", prompt, 20, session="A", kvtier=KEEP))
    drive.abort("a2")
    after_abort = sorted(engine.pinned_keys)
    drive.run(engine.request("a3", prompt, 20, session="A", kvtier=KEEP))
    return {
        "after_abort": after_abort,
        "retry_cached_tokens": drive.cached_tokens["a3"],
        **_end(engine, drive),
    }


def abort_running(*, is_async: bool) -> Facts:
    """Cancelled in the middle of its output, with a step in flight under async scheduling."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    engine.scheduler.add_request(engine.request("a", tokens(80), 50, session="A", kvtier=KEEP))
    for _ in range(8):
        drive.step()
    drive.abort("a")
    after_abort = sorted(engine.pinned_keys)
    drive.drain()
    return {"after_abort": after_abort, **_end(engine, drive)}


def preempted_program(*, is_async: bool) -> Facts:
    """A session's own turn is preempted and resumes; its KV is pinned once, at its end."""
    engine = Engine(EngineSpec(is_async=is_async, blocks=12, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    turns = [
        engine.request(name, tokens(30), 100, session=name.upper(), kvtier=KEEP) for name in "ab"
    ]
    drive.run(*turns)
    lengths = {name: len(drive.output[name]) for name in "ab"}
    return {"lengths": lengths, "pins": len(engine.pinned_keys), **_end(engine, drive)}


def hybrid(*, is_async: bool) -> Facts:
    """A model with sliding-window layers: kvtier says what would help and stays out of the way."""
    records = _Records()
    logging.getLogger("kvtier").addHandler(records)
    try:
        spec = EngineSpec(is_async=is_async, blocks=60, settings=PIN_ONLY, sliding_window=64)
        engine = Engine(spec)
    finally:
        logging.getLogger("kvtier").removeHandler(records)
    drive, tokens = Drive(engine), Tokens()
    first = engine.request("a1", tokens(100), 61, session="A", kvtier=KEEP)
    drive.run(first)
    lost_after_turn = engine.spec.blocks - engine.free_blocks
    for i in range(10):
        drive.run(engine.request(f"x{i}", tokens(200), 3))
    drive.run(engine.request("a2", [*drive.text(first), *tokens(30)], 2, session="A"))
    return {
        "warnings": records.messages,
        "is_passive": engine.connector.scheduler_half is None,
        "lost_after_turn": lost_after_turn,
        "output_tokens": len(drive.output["a2"]),
        **_end(engine, drive),
    }


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


ALL = [
    release,
    pin_hit,
    all_pinned,
    cheapest_first,
    growth,
    growth_beyond_memory,
    too_large_waits,
    superseded,
    parallel_turns,
    program_ended,
    reset_idle,
    reset_running,
    pause,
    ttl,
    abort_waiting,
    abort_running,
    preempted_program,
    hybrid,
]
