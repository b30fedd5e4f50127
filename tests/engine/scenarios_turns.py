"""Programs' turns on a healthy tier: pins, staging, reloads, pressure, keys, the live switch."""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engine.engine_harness import BATCH_TOKENS, BLOCK_TOKENS, CHUNK_TOKENS, readable, tokens

if TYPE_CHECKING:
    from tests.engine.engine_harness import Engine, Turn

FOREVER_S = 600.0


def ready(engine: Engine) -> str:
    """Wait for the tier; its generation."""
    engine.await_tier()
    return str(engine.half.tier.region.generation)


def pin_hit(engine: Engine) -> None:
    first = engine.turn(tokens("pin", 700), program="pin", stage=False, ttl_s=FOREVER_S)
    assert first.told["pinned_blocks"] == 711 // BLOCK_TOKENS
    engine.flood()
    before = engine.count("prompt_tokens|gpu_pin")
    second = engine.turn(first.then(tokens("pin2", 60)), program="pin")
    assert second.cached == 711 // BLOCK_TOKENS * BLOCK_TOKENS
    assert engine.count("prompt_tokens|gpu_pin") - before == second.cached
    assert second.cpu == 0


def without_a_pin_the_flood_evicts(engine: Engine) -> None:
    """The control of `pin_hit`: what makes the difference is the pin."""
    first = engine.turn(tokens("nopin", 700), program="nopin", stage=False, pin=False)
    engine.flood()
    second = engine.turn(first.then(tokens("nopin2", 60)), program="nopin")
    assert second.cached == 0


def reload(engine: Engine, mode: str, chunks: int) -> None:
    name = f"reload-{mode}-{chunks}"
    first = engine.staged_turn(name)
    engine.evict()
    engine.set_policy(reload=mode, reload_first_chunks=chunks)
    prompt = first.then(tokens(f"{name}-2", 100))
    second = engine.turn(prompt, program=name)
    expected = {"always": readable(711), "never": 0}.get(mode, chunks * CHUNK_TOKENS)
    assert (second.cpu, second.cached) == (expected, expected)
    engine.evict()
    # Turn 2 was staged on top of turn 1, in part from blocks that were loaded.
    engine.set_policy(reload="always")
    prompt = second.then(tokens(f"{name}-3", 100))
    third = engine.turn(prompt, program=name)
    assert third.cpu == readable(len(second.prompt) + len(second.tokens) - 1)


def reload_after_flood(engine: Engine) -> None:
    """Evicted by other traffic, one block after the other, instead of by a reset."""
    first = engine.staged_turn("flooded", pin=False)
    engine.flood()
    second = engine.turn(first.then(tokens("flooded2", 100)), program="flooded")
    assert second.cpu > 0


def reload_behind_gpu_blocks(engine: Engine) -> None:
    """The head of the prompt is in GPU memory, not ending on a chunk; the rest is loaded behind it."""
    engine.set_policy(reload="always")
    head, tail = tokens("behind", 5 * BLOCK_TOKENS), tokens("behind-tail", 500)
    first = engine.staged_turn("behind-1", pin=False)
    del first
    engine.evict()
    whole = engine.turn([*head, *tail], program="behind")
    engine.evict()
    engine.turn([*head, *tokens("behind-x", 7)], program="behind-other", stage=False)
    again = engine.turn(whole.then(tokens("behind-2", 40)), program="behind")
    assert again.cached == readable(len(whole.prompt) + len(whole.tokens) - 1)
    assert again.cpu == again.cached - 5 * BLOCK_TOKENS


def reload_of_spoilt_bytes(engine: Engine) -> None:
    """The control of every reload: with other bytes in the tier, the tokens differ."""
    first = engine.staged_turn("spoilt")
    engine.evict()
    region = engine.half.tier.region
    with (Path("/dev/shm") / region.shm_name.lstrip("/")).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), region.size_bytes)
        memory[:] = bytes(region.size_bytes)
        memory.close()
    engine.set_policy(reload="always")
    second = engine.turn(first.then(tokens("spoilt2", 60)), program="spoilt")
    assert second.cpu > 0
    engine.records[-1]["differs"] = True
    # Do not let later scenarios find what is wrong now.
    engine.half.reset_tier()


def superseded(engine: Engine) -> None:
    """The next prompt repeats turn 1's prompt but not its output: the pinned output is worth nothing."""
    first = engine.staged_turn("super", ttl_s=FOREVER_S)
    (old,) = engine.pins_of("super")
    assert old.data.prompt_blocks == 700 // BLOCK_TOKENS < len(old.block_ids)
    prompt = [*first.prompt, *tokens("super2", 150)]
    second = engine.turn(prompt, program="super", ttl_s=FOREVER_S)
    assert second.cached == 700 // BLOCK_TOKENS * BLOCK_TOKENS
    (new,) = engine.pins_of("super")
    assert new.key != old.key
    engine.evict()
    engine.set_policy(reload="always")
    third = engine.turn(second.then(tokens("super3", 50)), program="super")
    assert third.cpu == readable(len(second.prompt) + len(second.tokens) - 1)


def branched(engine: Engine) -> None:
    """Another history of the same program: a branch, both ends are kept and both are reloaded."""
    first = engine.staged_turn("branch", ttl_s=FOREVER_S)
    other = [*first.prompt[:400], *tokens("branch2", 350)]
    second = engine.turn(other, program="branch", ttl_s=FOREVER_S)
    assert second.cached == 400 // BLOCK_TOKENS * BLOCK_TOKENS
    engine.drain()
    assert len(engine.pins_of("branch")) == 2
    engine.evict()
    engine.set_policy(reload="always")
    for turn in (second, first):
        engine.evict()
        again = engine.turn(turn.then(tokens("branch3", 50)), program="branch")
        assert again.cpu > readable(401)


def handed_over(engine: Engine) -> None:
    """An ordinary return ends the old pin; only the newest turn is pinned afterwards."""
    first = engine.turn(tokens("hand", 400), program="hand", ttl_s=FOREVER_S)
    before = engine.count("pin_releases|handoff")
    engine.turn(first.then(tokens("hand2", 50)), program="hand", ttl_s=FOREVER_S)
    assert engine.count("pin_releases|handoff") - before == 1
    assert len(engine.pins_of("hand")) == 1


def parallel_turns(engine: Engine) -> None:
    """Sub-agents of one program at the same time are all kept."""
    prompts = [[*tokens("par", 300), *tokens(f"par{i}", 100)] for i in range(3)]
    ids = [engine.start(p, program="par", ttl_s=FOREVER_S) for p in prompts]
    for request_id in ids:
        engine.finish(request_id)
    assert len(engine.pins_of("par")) == 3


def preempted(engine: Engine) -> None:
    """Two programs come back, reload, and grow until one of them is preempted."""
    engine.set_policy(reload="always")
    names = ["pre-a", "pre-b"]
    firsts = [engine.staged_turn(name, 400) for name in names]
    engine.evict()
    with engine.squeezed(34):
        ids = [
            engine.start(first.then(tokens(name, 30)), 150, program=name)
            for name, first in zip(names, firsts, strict=True)
        ]
        requests = [engine.request(i) for i in ids]
        turns = [engine.finish(i) for i in ids]
    assert sum(r.num_preemptions for r in requests) > 0
    # Squeezed memory cannot hold what was kept: nothing of it may be wrong.
    for name, turn in zip(names, turns, strict=True):
        engine.turn(turn.then(tokens(f"{name}-3", 30)), program=name)


def grows_into_pins(engine: Engine) -> None:
    """A growing request ends pins; it is never preempted for one."""
    engine.turn(tokens("kept", 700), program="kept", ttl_s=FOREVER_S, stage=False)
    assert engine.pins_of("kept")
    before = engine.count("pin_releases|pressure")
    with engine.squeezed(14):
        request_id = engine.start(tokens("grows", 400), 200)
        engine.step_until(lambda: engine.produced(request_id), "first token")
        request = engine.request(request_id)
        engine.finish(request_id)
    assert request.num_preemptions == 0
    assert engine.count("pin_releases|pressure") - before == 1


def starts_at_once_on_pinned_memory(engine: Engine) -> None:
    """Every block that is not in use is pinned: a new request starts in the next step."""
    engine.turn(tokens("full", 1500), program="full", ttl_s=FOREVER_S, stage=False)
    assert engine.pins_of("full")
    with engine.squeezed(0), engine.patient_lookups():
        request_id = engine.start(tokens("new", 300))
        engine.step()
        assert engine.request(request_id).status.name == "RUNNING"
        engine.finish(request_id)


def measured(engine: Engine, prompt: list[int], **options: Any) -> tuple[Turn, list[int], float]:
    """A turn of one token, the tokens that each step computed for it, and how long it took, s."""
    computed = []
    schedule = engine.scheduler.schedule

    def counted(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        # Steps of none wait for a copy.
        if step.total_num_scheduled_tokens:
            computed.append(step.total_num_scheduled_tokens)
        return step

    engine.scheduler.schedule = counted
    try:
        begin_s = time.monotonic()
        turn = engine.turn(prompt, 1, stage=False, pin=False, **options)
        return turn, computed, time.monotonic() - begin_s
    finally:
        engine.scheduler.schedule = schedule


def tenants(engine: Engine) -> dict[str, float]:
    """The same prompt and program name under another salt finds nothing; under its own, all.

    For others it is computed in the steps in which a prompt is that nobody has sent, so the time tells nothing.

    Returns:
        Times to the first token, as parts of that of such a prompt.
    """
    engine.set_policy(reload="always")
    first = engine.staged_turn("tenant", salt="a")
    prompt = first.then(tokens("tenant2", 50))
    engine.evict()
    _, cold, cold_s = measured(engine, tokens("nobody's", len(prompt)), program="new", salt="b")
    assert cold == [BATCH_TOKENS, len(prompt) - BATCH_TOKENS]
    ratios = {}
    # With the owner's KV in the CPU tier alone, then in GPU memory too.
    for where in ("cpu", "gpu"):
        for salt in ("b", None):
            engine.evict()
            if where == "gpu":
                engine.turn(prompt, program="tenant", salt="a", pin=False)
            other, computed, other_s = measured(engine, prompt, program="tenant", salt=salt)
            assert (other.cpu, other.cached) == (0, 0)
            assert computed == cold
            ratios[f"{where}, {salt or 'no salt'}"] = other_s / cold_s
    engine.evict()
    own, computed, own_s = measured(engine, prompt, program="tenant", salt="a")
    assert own.cpu >= readable(711)
    assert computed == [len(prompt) - own.cpu]
    return {**ratios, "its own": own_s / cold_s}


def pressure_of_many(engine: Engine) -> None:
    """Many programs with more context than memory, in rounds: everything moves through the tier."""
    names = [f"many{i}" for i in range(6)]
    last: dict[str, Turn] = {}
    for round_ in range(3):
        ids = {}
        for name in names:
            more = tokens(f"{name}-{round_}", 500 if round_ == 0 else 80)
            prompt = last[name].then(more) if round_ else more
            ids[name] = engine.start(prompt, 40, program=name)
        for name, request_id in ids.items():
            last[name] = engine.finish(request_id)
    assert engine.count("prompt_tokens|cpu") > 0


def switched_off(engine: Engine, switch_file: str) -> None:
    """The live switch: off gives every block back and passes requests through; on works again."""
    path = Path(switch_file)
    first = engine.staged_turn("switch", ttl_s=FOREVER_S)
    assert engine.pins_of("switch")
    path.write_text("off\n")
    engine.half.live_mode._next_check_s = 0.0
    off = engine.turn(tokens("off", 300), program="off")
    assert not off.told
    assert engine.half.pins.pinned_blocks == 0
    assert engine.block_pool.get_num_free_blocks() == engine.free_blocks
    assert engine.count("pin_releases|off") == 1
    engine.evict()
    prompt = first.then(tokens("switch2", 50))
    assert engine.turn(prompt, program="switch").cpu == 0
    engine.evict()
    path.write_text("on\n")
    engine.half.live_mode._next_check_s = 0.0
    engine.set_policy(reload="always")
    # The step that reads the file may still pass its request through.
    engine.turn(tokens("on", 40), 2)
    assert engine.turn(prompt, program="switch").cpu > 0
    path.unlink()
    engine.half.live_mode._next_check_s = 0.0
