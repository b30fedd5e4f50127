"""kvtier fails inside at the worst moments: it is off from then on, and the engine goes on."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

from kvtier.gpu_pin import PinTable
from tests.engine.engine_spec import EngineSpec
from tests.engine.pin_scenarios import KEEP, PIN_ONLY
from tests.engine.scheduler_harness import Drive, Engine
from tests.engine.tier_scenarios import PASSING, STAGE_ONLY, TIER, Facts, prompt_of
from tests.engine.virtual_tier import VirtualTier


def _fail(*_: Any) -> Any:
    message = "injected"
    raise RuntimeError(message)


def _while_loading(where: str, *, is_async: bool) -> Facts:
    """kvtier fails inside while a request is given blocks for its load: vLLM waits for that load."""
    tier = VirtualTier()
    engine = Engine(EngineSpec(is_async=is_async, blocks=30, settings=TIER), tier)
    drive, generator = Drive(engine), random.Random(1)
    first = engine.request("a1", prompt_of(generator, 100), 61, session="A", kvtier=STAGE_ONLY)
    drive.run(first)
    for i in range(8):
        drive.run(engine.request(f"x{i}", prompt_of(generator, 200), 3, kvtier=PASSING))
    prompt = [*drive.text(first), *prompt_of(generator, 30)]
    half = engine.half
    hook = getattr(half, where)

    def fail(*args: Any) -> Any:
        # Other hooks' calls of the same name, before anything is to be loaded, go through.
        if where == "build" and not half.reader.n_loads:
            return hook(*args)
        message = "injected"
        raise RuntimeError(message)

    setattr(half, where, fail)
    drive.run(engine.request("a2", prompt, 5, session="A", kvtier=STAGE_ONLY))
    return {
        "gave_up": engine.connector.scheduler_half is None,
        "counted": half.stats.totals.get("failures|internal", 0),
        "output_tokens": len(drive.output["a2"]),
        "copies": dict(drive.worker.done),
        "lost_blocks": engine.spec.blocks - engine.free_blocks,
    }


def give_up_in_build(*, is_async: bool) -> Facts:
    """The load was ordered in this step, then building the step's orders fails."""
    return _while_loading("build", is_async=is_async)


def give_up_in_allocation(*, is_async: bool) -> Facts:
    """The load was promised, then ordering it fails."""
    return _while_loading("on_allocated", is_async=is_async)


def _while_making_room(when: str, *, is_async: bool) -> Facts:
    """Every block is pinned; kvtier fails while it makes room for a request."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, generator = Drive(engine), random.Random(1)
    for name in ("A", "B"):
        drive.run(engine.request(name, prompt_of(generator, 141), 20, session=name, kvtier=KEEP))
    free_before, half = engine.free_blocks, engine.half
    if when == "before":
        half.room.make = _fail  # type: ignore[method-assign]
    else:
        # Called once the request has its blocks.
        half.room._note = _fail
    drive.run(engine.request("new", prompt_of(generator, 200), 5))
    return {
        "gave_up": engine.connector.scheduler_half is None,
        "counted": half.stats.totals.get("failures|internal", 0),
        "free_before": free_before,
        "output_tokens": len(drive.output["new"]),
        "lost_blocks": engine.spec.blocks - engine.free_blocks,
    }


def give_up_before_room(*, is_async: bool) -> Facts:
    """No room was made yet: what kvtier held is free once it is off."""
    return _while_making_room("before", is_async=is_async)


def give_up_after_room(*, is_async: bool) -> Facts:
    """vLLM has given the blocks already: they are the request's."""
    return _while_making_room("after", is_async=is_async)


def give_up_after_taking_over(*, is_async: bool) -> Facts:
    """A pin has taken over a finished request's references; vLLM is about to free what is left to it."""
    engine = Engine(EngineSpec(is_async=is_async, settings=PIN_ONLY))
    drive, generator = Drive(engine), random.Random(1)
    pin, held = PinTable.pin, []

    def pin_and_fail(*args: Any, **kwargs: Any) -> bool:
        held.append(pin(*args, **kwargs))
        _fail()
        return True

    with mock.patch.object(PinTable, "pin", pin_and_fail):
        drive.run(engine.request("A", prompt_of(generator, 141), 20, session="A", kvtier=KEEP))
    drive.run(engine.request("new", prompt_of(generator, 200), 5))
    engine.check()
    return {
        "gave_up": engine.connector.scheduler_half is None,
        "pinned": held,
        "output_tokens": len(drive.output["new"]),
        "lost_blocks": engine.spec.blocks - engine.free_blocks,
    }


ALL = [
    give_up_in_build,
    give_up_in_allocation,
    give_up_before_room,
    give_up_after_room,
    give_up_after_taking_over,
]
