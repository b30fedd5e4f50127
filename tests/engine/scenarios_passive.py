"""Without a CPU tier, and in shadow mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tests.engine.engine_harness import BLOCK_TOKENS, tokens

if TYPE_CHECKING:
    from tests.engine.engine_harness import Engine

FOREVER_S = 600.0


def shadow(engine: Engine, decision_log: str) -> None:
    """Decides and logs, changes nothing. The engine was started in this mode."""
    log = Path(decision_log)
    before = len(log.read_text().splitlines()) if log.exists() else 0
    first = engine.turn(tokens("shadow", 700), program="shadow", ttl_s=FOREVER_S)
    assert not first.told
    assert engine.half.pins.pinned_blocks == 0
    assert not engine.half.has_work()
    assert engine.block_pool.get_num_free_blocks() == engine.free_blocks
    # What vLLM itself still has is used as ever.
    second = engine.turn(first.then(tokens("shadow2", 60)), program="shadow")
    assert second.cached == 711 // BLOCK_TOKENS * BLOCK_TOKENS
    engine.flood()
    assert engine.turn(second.then([5]), program="shadow").cached == 0
    entries = [json.loads(line) for line in log.read_text().splitlines()[before:]]
    pauses = [e for e in entries if e["event"] == "pause" and e["action"] == "pin"]
    assert pauses
    assert all(e["reason"] and not e["pinned"] for e in pauses), pauses
    assert engine.count("pin_releases|handoff") == 0


def pin_only(engine: Engine, switch_file: str) -> None:
    """No tier: pins still work, nothing is staged; and the live switch ends them."""
    path = Path(switch_file)
    path.write_text("on")
    engine.half.live_mode._next_check_s = 0.0
    engine.turn(tokens("switch-on", 40), 2)
    assert str(engine.half.tier.state) == "absent"
    first = engine.turn(tokens("only", 700), program="only", ttl_s=FOREVER_S)
    assert first.told["pinned_blocks"] == 711 // BLOCK_TOKENS
    assert not first.told["staging"]
    assert not engine.half.has_work()
    engine.flood()
    second = engine.turn(first.then(tokens("only2", 60)), program="only", ttl_s=FOREVER_S)
    assert second.cached == 711 // BLOCK_TOKENS * BLOCK_TOKENS
    assert engine.pins_of("only")
    path.write_text("off")
    engine.half.live_mode._next_check_s = 0.0
    engine.turn(tokens("switch-off", 40), 2)
    assert engine.half.pins.pinned_blocks == 0
    assert engine.block_pool.get_num_free_blocks() == engine.free_blocks
    assert engine.count("pin_releases|off") > 0
    path.unlink()
    engine.half.live_mode._next_check_s = 0.0


def expired(engine: Engine, switch_file: str) -> None:
    """A pin ends at its deadline."""
    path = Path(switch_file)
    path.write_text("on")
    engine.half.live_mode._next_check_s = 0.0
    engine.turn(tokens("switch-on2", 40), 2)
    first = engine.turn(tokens("short", 300), program="short", ttl_s=0.01)
    assert first.told["pinned_blocks"]
    engine.turn(tokens("later", 300), 8, stage=False)
    assert not engine.pins_of("short")
    assert engine.count("pin_releases|ttl") > 0
    path.unlink()
    engine.half.live_mode._next_check_s = 0.0
