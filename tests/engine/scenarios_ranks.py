"""Engines of several workers: what fails on one of them, and pipeline stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.engine.engine_harness import BATCH_TOKENS, BLOCK_TOKENS, readable, tokens

if TYPE_CHECKING:
    from tests.engine.engine_harness import Engine

FOREVER_S = 600.0
LAST_RANK = 1


def _break_copies(worker: Any, to_gpu: int) -> None:
    """Runs in each worker: on the last rank, copies in one direction fail."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: PLC0415

    if worker.rank != LAST_RANK:
        return
    engine = get_kv_transfer_group().worker_half._pool._attached.engine
    kernel = engine.__dict__.setdefault("whole_kernel", engine._kernel)

    def broken(*args: Any) -> Any:
        if args[3] == to_gpu:
            raise OSError("broken by the test")
        return kernel(*args)

    engine._kernel = broken


def _mend_copies(worker: Any) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: PLC0415

    engine = get_kv_transfer_group().worker_half._pool._attached.engine
    engine._kernel = engine.__dict__.get("whole_kernel", engine._kernel)


def _on_workers(engine: Engine, method: Any, *args: Any) -> None:
    engine.core.engine_core.engine_core.collective_rpc(method, args=args)


def load_fails_on_one_rank(engine: Engine) -> None:
    """Half of the KV comes: none of it is used."""
    engine.set_policy(reload="always")
    first = engine.staged_turn("half-load")
    engine.evict()
    before = engine.failures().get("load_copy", 0)
    _on_workers(engine, _break_copies, 1)
    try:
        second = engine.turn(first.then(tokens("half-load2", 50)), program="half-load")
    finally:
        _on_workers(engine, _mend_copies)
    assert second.cpu == 0
    assert engine.failures()["load_copy"] == before + 1
    engine.evict()
    third = engine.turn(second.then(tokens("half-load3", 50)), program="half-load")
    assert third.cpu > 0


def store_fails_on_one_rank(engine: Engine) -> None:
    """Half of the KV is stored: it does not count as staged, and nobody finds it."""
    engine.await_tier()
    engine.set_policy(reload="always")
    engine.turn(tokens("maps the region", 100), program="mapped")
    engine.drain()
    _on_workers(engine, _break_copies, 0)
    try:
        first = engine.turn(tokens("half-store", 700), program="half-store")
        engine.drain()
    finally:
        _on_workers(engine, _mend_copies)
    assert engine.handle("half-store") not in engine.half.stager.copies._staged
    assert engine.failures()["stage_store_copy"] >= 1
    engine.evict()
    second = engine.turn(first.then(tokens("half-store2", 50)), program="half-store")
    assert second.cpu == 0


def _warm_up(worker: Any) -> None:
    # vLLM's CPU worker leaves this out in eager mode, and later stages lack their input buffers then.
    worker.model_runner._dummy_run(BATCH_TOKENS)


def stages(engine: Engine) -> None:
    """Pipeline stages: pins work, nothing is staged."""
    _on_workers(engine, _warm_up)
    assert str(engine.half.tier.state) == "absent"
    first = engine.turn(tokens("stages", 700), program="stages", ttl_s=FOREVER_S)
    assert first.told["pinned_blocks"] == 711 // BLOCK_TOKENS
    assert not first.told["staging"]
    ids = [engine.start(tokens(f"beside{i}", 900), 12, pin=False) for i in range(4)]
    for request_id in ids:
        engine.finish(request_id)
    second = engine.turn(first.then(tokens("stages2", 50)), program="stages")
    assert (second.cpu, second.cached) == (0, 711 // BLOCK_TOKENS * BLOCK_TOKENS)
    assert readable(len(second.prompt))
