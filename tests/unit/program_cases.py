"""Programs' turns in a small engine, and what tests of the scheduler half look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.unit.fake_vllm import FakeRequest
from tests.unit.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from tests.unit.mini_engine import MiniEngine


def prompt(n_tokens: int, start: int = 0) -> list[int]:
    return list(range(start, start + n_tokens))


def turn(
    request_id: str,
    tokens: list[int],
    *,
    session: str | None = "s",
    max_tokens: int = 4,
    hints: dict[str, Any] | None = None,
    **fields: Any,
) -> FakeRequest:
    params = {"kvtier": hints} if hints is not None else None
    return FakeRequest(
        request_id,
        tokens,
        max_tokens,
        session_id=session,
        kv_transfer_params=params,
        **fields,
    )


def follow_up(before: FakeRequest, request_id: str, n_new: int = 10, **how: Any) -> FakeRequest:
    """The program's next turn: all of the last one, and the tool's answer."""
    return turn(request_id, before.all_token_ids + prompt(n_new, 500), **how)


def evict(engine: MiniEngine) -> None:
    """Somebody else has used all of the memory."""
    assert engine.half.pins.pinned_blocks == 0
    blocks = engine.pool.take(engine.pool.get_num_free_blocks())
    assert blocks is not None
    engine.pool.free_blocks(blocks)


def expire(engine: MiniEngine) -> None:
    engine.now_s += 700.0
    engine.step()
    assert len(engine.half.pins) == 0


def total(engine: MiniEngine, key: str) -> float:
    return engine.stats.totals.get(key, 0)


def sources(engine: MiniEngine) -> dict[str, float]:
    """Prompt tokens by where their KV came from, since the last call."""
    names = ("gpu_pin", "gpu_cache", "cpu", "recomputed")
    now = {name: total(engine, f"prompt_tokens|{name}") for name in names}
    before = getattr(engine, "seen", dict.fromkeys(names, 0))
    engine.seen = now  # type: ignore[attr-defined]
    return {name: now[name] - before[name] for name in names if now[name] != before[name]}


def failures(engine: MiniEngine) -> dict[str, float]:
    found = engine.stats.totals.items()
    return {key.removeprefix("failures|"): n for key, n in found if key.startswith("failures|")}


def assert_nothing_held(engine: MiniEngine) -> None:
    """After everything has ended and every pin has expired."""
    expire(engine)
    engine.run()
    assert engine.pool.references == {}
    assert isinstance(engine.tier, VirtualTier)
    assert engine.tier.leaks() == {}
