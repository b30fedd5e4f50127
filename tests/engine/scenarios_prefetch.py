"""Programs whose KV is loaded before they come back, on a healthy tier."""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.engine.engine_harness import BLOCK_TOKENS, CHUNK_TOKENS, readable, tokens

if TYPE_CHECKING:
    from tests.engine.engine_harness import Engine, Turn

STAGED_TOKENS = readable(711)
"""Of 700 tokens of prompt and 12 of output, those of whole chunks."""


def paused(engine: Engine, name: str) -> Turn:
    """A program whose KV is in the tier alone."""
    engine.set_policy(reload="always")
    first = engine.staged_turn(name, pin=False)
    engine.evict()
    return first


def ask(engine: Engine, name: str) -> tuple[str, str]:
    return tuple(engine.half.prefetch(engine.handle(name), time.monotonic(), 600.0)[:2])


def come_back(engine: Engine, name: str, first: Turn) -> tuple[Turn, int]:
    """The program's next turn, and how many of its prompt's tokens came from a pin."""
    before = engine.count("prompt_tokens|gpu_pin")
    second = engine.turn(first.then(tokens(f"{name}-2", 60)), program=name)
    return second, int(engine.count("prompt_tokens|gpu_pin") - before)


def prefetched(engine: Engine) -> None:
    """Paused, evicted, prefetched in an idle engine, and back: nothing is loaded, little computed."""
    first = paused(engine, "pre")
    loaded = engine.count("loaded_bytes")
    assert ask(engine, "pre") == ("accepted", "loading")
    engine.drain()
    assert engine.count("loaded_bytes") > loaded
    (pin,) = engine.pins_of("pre")
    assert len(pin.block_ids) * BLOCK_TOKENS == STAGED_TOKENS
    engine.flood()
    loaded = engine.count("loaded_bytes")
    second, pinned = come_back(engine, "pre", first)
    assert (second.cached, pinned, second.cpu) == (STAGED_TOKENS, STAGED_TOKENS, 0)
    assert engine.count("loaded_bytes") == loaded
    # And what came that way can be staged and loaded again.
    engine.evict()
    third = engine.turn(second.then(tokens("pre-3", 60)), program="pre")
    assert third.cpu == readable(len(second.prompt) + len(second.tokens) - 1)


def not_prefetched(engine: Engine) -> None:
    """The control of `prefetched`: what makes the difference is the prefetch."""
    first = paused(engine, "not")
    second, pinned = come_back(engine, "not", first)
    assert (second.cached, pinned, second.cpu) == (STAGED_TOKENS, 0, STAGED_TOKENS)


def prefetched_behind_gpu_blocks(engine: Engine) -> None:
    """The head of the turn is in GPU memory, not ending on a chunk; the rest is loaded behind it."""
    first = paused(engine, "behind")
    head = first.prompt[: 5 * BLOCK_TOKENS]
    engine.turn([*head, *tokens("behind-x", 7)], 2, program="other", stage=False, pin=False)
    engine.evict()
    engine.set_policy(reload="never")
    engine.turn([*head, *tokens("behind-x", 7)], 2, program="other", stage=False, pin=False)
    engine.set_policy(reload="always")
    assert ask(engine, "behind") == ("accepted", "loading")
    engine.drain()
    engine.flood()
    second, pinned = come_back(engine, "behind", first)
    assert (second.cached, pinned, second.cpu) == (STAGED_TOKENS, STAGED_TOKENS, 0)


def prefetched_in_pieces(engine: Engine) -> None:
    """Chunk by chunk, one ordered ahead."""
    prefetcher = engine.half.prefetcher
    before = prefetcher._pieces._piece_chunks, prefetcher._pieces._window_bytes
    first = paused(engine, "pieces")
    prefetcher._pieces._piece_chunks, prefetcher._pieces._window_bytes = 1, 1
    assert ask(engine, "pieces") == ("accepted", "loading")
    engine.drain()
    prefetcher._pieces._piece_chunks, prefetcher._pieces._window_bytes = before
    second, pinned = come_back(engine, "pieces", first)
    assert (second.cached, pinned, second.cpu) == (STAGED_TOKENS, STAGED_TOKENS, 0)


def returns_meanwhile(engine: Engine) -> None:
    """The program comes back while copies run: its request waits for them."""
    first = paused(engine, "early")
    before = engine.count("prompt_tokens|gpu_pin")
    with engine.held_copies("load") as go:
        ask(engine, "early")
        engine.step_until(lambda: engine.half.prefetcher.n_in_flight, "a copy")
        request_id = engine.start(first.then(tokens("early-2", 60)), program="early")
        for _ in range(3):
            engine.step()
        assert engine.request(request_id).status.name == "WAITING"
        go.set()
        second = engine.finish(request_id)
    assert second.cached == STAGED_TOKENS
    assert engine.count("prompt_tokens|gpu_pin") - before == STAGED_TOKENS
    assert second.cpu == 0


def prefetch_of_spoilt_bytes(engine: Engine) -> None:
    """The control of every prefetch: with other bytes in the tier, the tokens differ."""
    first = paused(engine, "spoilt")
    region = engine.half.tier.region
    with (Path("/dev/shm") / region.shm_name.lstrip("/")).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), region.size_bytes)
        memory[:] = bytes(region.size_bytes)
        memory.close()
    ask(engine, "spoilt")
    engine.drain()
    _, pinned = come_back(engine, "spoilt", first)
    assert pinned == STAGED_TOKENS
    engine.records[-1]["differs"] = True
    # Do not let later scenarios find what is wrong now.
    assert engine.scheduler.reset_prefix_cache()
    engine.half.reset_tier()


def failed_prefetch(engine: Engine) -> None:
    """The copy fails in the middle: what it has written is no hit, and vLLM hears of no bad request."""

    def fail() -> None:
        raise OSError("injected")

    first = paused(engine, "fails")
    with engine.copies("load", fail):
        ask(engine, "fails")
        engine.drain()
    assert engine.failures().get("prefetch_copy")
    assert not engine.pins_of("fails")
    second, pinned = come_back(engine, "fails", first)
    assert (pinned, second.cpu) == (0, STAGED_TOKENS)


def reset_meanwhile(engine: Engine) -> None:
    """The prefix cache is reset while a copy runs; requests compute beside it until it has ended."""
    first = paused(engine, "reset")
    with engine.held_copies("load") as go:
        ask(engine, "reset")
        engine.step_until(lambda: engine.half.prefetcher.n_in_flight, "a copy")
        assert engine.scheduler.reset_prefix_cache()
        held = engine.half.pins.held_blocks
        assert held == STAGED_TOKENS // BLOCK_TOKENS
        request_id = engine.start(tokens("beside", 900), 60)
        engine.step_until(lambda: engine.produced(request_id) > 5, "its tokens")
        go.set()
        engine.finish(request_id)
        engine.drain()
    assert engine.half.pins.held_blocks == 0
    assert not engine.pins_of("reset")
    second, pinned = come_back(engine, "reset", first)
    assert (pinned, second.cpu) == (0, STAGED_TOKENS)


def others_meanwhile(engine: Engine) -> None:
    """A batch decodes and prefills beside the prefetch."""
    first = paused(engine, "beside")
    ids = [engine.start(tokens(f"batch{i}", 300), 40) for i in range(3)]
    engine.step_until(lambda: all(engine.produced(i) for i in ids), "first tokens")
    assert ask(engine, "beside") == ("accepted", "loading")
    for request_id in ids:
        engine.finish(request_id)
    engine.drain()
    second, pinned = come_back(engine, "beside", first)
    assert (second.cached, pinned, second.cpu) == (STAGED_TOKENS, STAGED_TOKENS, 0)
    assert STAGED_TOKENS % CHUNK_TOKENS == 0
