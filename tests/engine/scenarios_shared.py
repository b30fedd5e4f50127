"""What an engine does that shares a server with others; used step by step, without `settle`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.engine.engine_harness import tokens
from tests.engine.tier_probe import server_status

if TYPE_CHECKING:
    from tests.engine.engine_harness import Engine


def ready(engine: Engine) -> str:
    """Wait for the tier; its generation."""
    engine.await_tier()
    return str(engine.half.tier.region.generation)


def stage(engine: Engine, name: str, salt: str | None = None) -> dict[str, Any]:
    """A program's first turn, staged; returns its prompt and tokens."""
    engine.await_tier()
    turn = engine.turn(tokens(name, 700), program=name, salt=salt)
    engine.drain()
    n_chunks = engine.half.stager.copies._staged[engine.handle(name, salt)].n_chunks
    return {"prompt": turn.prompt, "tokens": turn.tokens, "chunks": n_chunks}


def come_back(engine: Engine, name: str, prompt: list[int], salt: str | None = None) -> int:
    """The program's next turn, with nothing in GPU memory; returns how many tokens were loaded."""
    engine.evict()
    engine.set_policy(reload="always")
    return engine.turn(prompt, program=name, salt=salt).cpu


def go_on(engine: Engine, name: str, prompt: list[int]) -> int:
    """As `come_back`; and what the turn has added is staged."""
    loaded = come_back(engine, name, prompt)
    engine.drain()
    return loaded


def lock_and_hang(engine: Engine, name: str, prompt: list[int]) -> int:
    """Begin a load that does not end: the server holds locks for this engine. Returns their number."""
    engine.evict()
    engine.set_policy(reload="always")
    with engine.held_copies("load"):
        engine.start(prompt, program=name)
        engine.step_until(lambda: engine.half.reader.n_loads, "load")
        # The trim of the load's surroundings is answered in order before the status.
        return server_status(engine.half.tier._config.endpoint).locked_chunks
