"""What clients and copies do wrong: aborts, failed copies, bad input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.engine.engine_harness import tokens

if TYPE_CHECKING:
    from tests.engine.engine_harness import Engine

FOREVER_S = 600.0


def aborted_while_running(engine: Engine) -> None:
    first = engine.staged_turn("ab-run")
    request_id = engine.start(first.then(tokens("ab-run2", 50)), 200, program="ab-run")
    engine.step_until(lambda: engine.produced(request_id) > 5, "some tokens")
    engine.abort(request_id)
    engine.step()
    assert not engine.pins_of("ab-run")
    engine.turn(first.then(tokens("ab-run2", 50)), program="ab-run")


def aborted_while_waiting(engine: Engine) -> None:
    """Aborted while it waits for memory, its lookup answered and its chunks locked."""
    engine.set_policy(reload="always")
    first = engine.staged_turn("ab-wait")
    engine.evict()
    prompt = first.then(tokens("ab-wait2", 50))
    with engine.squeezed(2):
        request_id = engine.start(prompt, program="ab-wait")
        internal = engine.request(request_id).request_id
        engine.step_until(
            lambda: (read := engine.half.reader._reads.get(internal)) and read.answered, "lookup"
        )
        assert engine.request(request_id).status.name == "WAITING"
        engine.abort(request_id)
        engine.step()
    assert engine.turn(prompt, program="ab-wait").cpu > 0


def aborted_before_the_first_step(engine: Engine) -> None:
    first = engine.staged_turn("ab-new", 300)
    request_id = engine.start(first.then(tokens("ab-new2", 50)), program="ab-new")
    engine.abort(request_id)
    engine.step()
    engine.turn(first.then(tokens("ab-new2", 50)), program="ab-new")


def aborted_while_loading(engine: Engine) -> None:
    """vLLM keeps the blocks until the load has ended; then they are free, and nothing is locked."""
    engine.set_policy(reload="always")
    first = engine.staged_turn("ab-load")
    engine.evict()
    prompt = first.then(tokens("ab-load2", 50))
    with engine.held_copies("load") as go:
        request_id = engine.start(prompt, program="ab-load")
        engine.step_until(lambda: engine.half.reader.n_loads == 1, "load")
        go.await_begun()
        engine.abort(request_id)
        for _ in range(3):
            engine.step()
        assert engine.block_pool.get_num_free_blocks() < engine.free_blocks
        go.set()
        engine.step_until(lambda: not engine.half.reader.n_loads, "end of the load")
    assert engine.turn(prompt, program="ab-load").cpu > 0


def cancelled_staging(engine: Engine) -> None:
    """Memory runs short for a running request while a turn is staged: the turn is given up for it."""
    engine.await_tier()
    engine.admit_all()
    other = engine.start(tokens("cancel-other", 300), 100)
    engine.step_until(lambda: engine.produced(other), "first token")
    request = engine.request(other)
    with engine.held_copies("store") as go:
        first_id = engine.start(tokens("cancel", 700), program="cancel", pin=False)
        engine.step_until(lambda: engine.ended(first_id), "end of the turn")
        engine.step_until(lambda: engine.half.stager._by_order, "store")
        first = engine.finish(first_id)
        before = engine.failures().get("stage_cancelled_pressure", 0)
        with engine.squeezed(0):
            engine.finish(other)
        assert engine.failures()["stage_cancelled_pressure"] - before == 1
        assert request.num_preemptions == 0
        go.set()
    engine.drain()
    assert engine.handle("cancel") not in engine.half.stager.copies._staged
    assert engine.turn(first.then(tokens("cancel2", 50)), program="cancel").cpu == 0


def waits_for_staging(engine: Engine) -> None:
    """All memory is pinned and being staged: a new request starts when the copies have ended."""
    engine.await_tier()
    with engine.held_copies("store") as go:
        engine.turn(tokens("stg", 700), program="stg", ttl_s=FOREVER_S)
        assert engine.pins_of("stg")
        engine.step_until(lambda: engine.half.stager._by_order, "store")
        with engine.squeezed(0):
            request_id = engine.start(tokens("stg-other", 300))
            for _ in range(20):
                engine.step()
            go.set()
            engine.finish(request_id)


def _raise() -> None:
    msg = "injected"
    raise RuntimeError(msg)


def failed_load(engine: Engine) -> None:
    """A failed copy becomes a recompute of exactly what it should have brought."""
    engine.set_policy(reload="always")
    first = engine.staged_turn("f-load")
    engine.evict()
    before = engine.failures().get("load_copy", 0)
    prompt = first.then(tokens("f-load2", 50))
    with engine.copies("load", _raise):
        second = engine.turn(prompt, program="f-load")
    assert engine.failures()["load_copy"] - before == 1
    assert (second.cpu, second.cached) == (0, 0)
    # The next turn reloads again: one failure is not held against the program.
    engine.evict()
    assert engine.turn(second.then(tokens("f-load3", 50)), program="f-load").cpu > 0


def failed_load_behind_gpu_blocks(engine: Engine) -> None:
    """What was in GPU memory before the failed load is still used."""
    engine.set_policy(reload="always")
    first = engine.staged_turn("f-behind", pin=False)
    engine.evict()
    engine.turn([*first.prompt[:160], 5], program="f-behind-other", stage=False)
    with engine.copies("load", _raise):
        request_id = engine.start(first.then(tokens("f-behind2", 50)), program="f-behind")
        request = engine.request(request_id)
        engine.step_until(lambda: engine.half.reader.n_loads, "load")
        assert request.num_computed_tokens == 704
        engine.step_until(lambda: not engine.half.reader.n_loads, "end of the load")
        assert request.num_computed_tokens == 160
        second = engine.finish(request_id)
    assert second.cpu == 0
    engine.evict()
    assert engine.turn(second.then(tokens("f-behind3", 50)), program="f-behind").cpu > 0


def failed_store(engine: Engine) -> None:
    """A failed store is not believed: nothing counts as staged, the next turn recomputes."""
    engine.await_tier()
    before = engine.failures().get("stage_store_copy", 0)
    with engine.copies("store", _raise):
        first = engine.turn(tokens("f-store", 700), program="f-store")
        engine.drain()
    assert engine.failures()["stage_store_copy"] - before == 1
    assert engine.handle("f-store") not in engine.half.stager.copies._staged
    engine.evict()
    engine.set_policy(reload="always")
    second = engine.turn(first.then(tokens("f-store2", 50)), program="f-store")
    assert second.cpu == 0
    engine.evict()
    assert engine.turn(second.then(tokens("f-store3", 50)), program="f-store").cpu > 0


def _nested(depth: int) -> Any:
    junk: Any = 1
    for _ in range(depth):
        junk = {"kvtier": [junk]}
    return junk


BAD_INPUT: dict[str, Any] = {
    "null": None,
    "empty": {},
    "kvtier is text": {"kvtier": "junk"},
    "kvtier is a list": {"kvtier": [1, 2]},
    "program is a number": {"kvtier": {"program": 5}},
    "program is nested": {"kvtier": {"program": _nested(200)}},
    "program of 10 MB": {"kvtier": {"program": "p" * 10_000_000}},
    "tool of 10 MB": {"kvtier": {"program": "bad", "tool": "t" * 10_000_000}},
    "key of 10 MB": {"kvtier": {"k" * 10_000_000: 1}},
    "100,000 keys": {"kvtier": {f"k{i}": i for i in range(100_000)}},
    "lone surrogate": {"kvtier": {"program": "\ud800", "tool": "\udfff"}},
    "zero byte": {"kvtier": {"program": "a\x00b"}},
    "negative ttl": {"kvtier": {"ttl_s": -1}},
    "ttl is nan": {"kvtier": {"ttl_s": float("nan")}},
    "ttl is infinite": {"kvtier": {"ttl_s": float("inf")}},
    "ttl is huge": {"kvtier": {"ttl_s": 2**63}},
    "ttl is text": {"kvtier": {"ttl_s": "60"}},
    "ttl is a list": {"kvtier": {"ttl_s": [60]}},
    "ttl is an object": {"kvtier": {"ttl_s": {}}},
    "flags are text": {"kvtier": {"pin": "yes", "stage": "no", "end": "maybe"}},
    "keys are no text": {"kvtier": {1: 2, None: 3}},
    "deep": _nested(100),
}
HARMLESS = {"null", "empty"}
"""No hints at all: nothing to complain of."""


def bad_input(engine: Engine) -> dict[str, Any]:
    """Every request runs; each bad one is counted."""
    uncounted = []
    for i, (name, params) in enumerate(BAD_INPUT.items()):
        before = sum(v for k, v in engine.failures().items() if k.startswith("hint_"))
        engine.turn(tokens(f"bad{i % 3}", 100), 6, params=params)
        after = sum(v for k, v in engine.failures().items() if k.startswith("hint_"))
        if (after > before) == (name in HARMLESS):
            uncounted.append(name)
    return {"uncounted": uncounted}
