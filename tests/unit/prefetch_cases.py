"""Programs whose KV is in the CPU tier alone, and prefetches of it in a small engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtier.programs import ProgramId
from tests.unit.program_cases import evict, expire, prompt, sources, total, turn

if TYPE_CHECKING:
    from kvtier.gpu_pin import Pin
    from kvtier.orders import Order
    from tests.unit.fake_vllm import FakeRequest
    from tests.unit.mini_engine import MiniEngine

N_TOKENS = 32
"""Of the paused turn's 34 tokens, those that a later prompt can hit: 8 blocks, 4 chunks."""


def handle(engine: MiniEngine, session: str = "s", tenant: str | None = None) -> str:
    return engine.facts.program_handle(ProgramId(tenant, "named", session))


def paused(engine: MiniEngine, request_id: str = "r1", **how: Any) -> FakeRequest:
    """A program whose KV is in the tier alone."""
    first = turn(request_id, prompt(30), **how)
    engine.run(first)
    expire(engine)
    evict(engine)
    sources(engine)
    return first


def ask(
    engine: MiniEngine, session: str = "s", ttl_s: float | None = None, tenant: str | None = None
) -> tuple[str, str]:
    outcome, reason, _ = engine.half.prefetch(handle(engine, session, tenant), engine.now_s, ttl_s)
    assert total(engine, f"prefetches|{outcome}|{reason}") > 0
    return outcome, reason


def in_pieces(engine: MiniEngine, window_chunks: int = 100) -> None:
    """Copy chunk by chunk, with so many ordered ahead."""
    prefetcher = engine.half.prefetcher
    prefetcher._pieces._piece_chunks = 1
    prefetcher._pieces._window_bytes = window_chunks * engine.facts.slot_bytes


def loads(engine: MiniEngine) -> list[Order]:
    return [order for order in engine.workers.orders if order.direction == "load"]


def pin_of(engine: MiniEngine, request_id: str = "r1") -> Pin:
    pin = engine.half.pins.get(request_id)
    assert pin is not None
    return pin


def ends(engine: MiniEngine) -> dict[str, float]:
    found = engine.stats.totals.items()
    return {k.removeprefix("prefetch_ends|"): n for k, n in found if k.startswith("prefetch_ends")}


def step_until_copying(engine: MiniEngine, n_copies: int = 1) -> None:
    for _ in range(20):
        if engine.half.prefetcher.n_in_flight >= n_copies:
            return
        engine.step()
    raise AssertionError("no copy has begun")


def seize(engine: MiniEngine) -> list[Any]:
    """Somebody takes all free blocks, and writes to them."""
    blocks = engine.pool.take(engine.pool.get_num_free_blocks())
    assert blocks is not None
    for block in blocks:
        block.content = "another's"
    return blocks
