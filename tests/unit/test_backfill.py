"""A turn for which there is no room lets others pass: admission, deferrals and room together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.mini_engine import MiniEngine
from tests.unit.program_cases import prompt, total, turn

N_STEPS = 10


def crowded(backfill_turns: float) -> MiniEngine:
    """25 of 40 blocks are taken for long; behind a turn that needs 20 waits one that needs 5."""
    engine = MiniEngine()
    admission = engine.half.admission
    admission.config = replace(admission.config, backfill_turns=backfill_turns)
    for session in "ab":
        engine.run(turn(f"{session}0", prompt(4, ord(session)), session=session))
    admission._forecast._turn_s.add(10.0)
    engine.add(turn("runs", prompt(100, 1000), session="r", max_tokens=40))
    engine.step()
    engine.add(turn("big", prompt(80, 2000), session="a"))
    engine.add(turn("small", prompt(20, 3000), session="b", max_tokens=20))
    return engine


def running(engine: MiniEngine) -> set[str]:
    return {entry.request.request_id for entry in engine.running}


def test_a_small_turn_passes_a_large_one_that_does_not_fit() -> None:
    engine = crowded(1.0)
    engine.step()
    engine.step()
    assert running(engine) == {"runs", "small"}
    assert total(engine, "deferrals|lets_pass") > 0
    assert engine.half.room.is_short, "memory is short all the same"
    engine.run()
    assert engine.half.admission.waiting == 0
    assert engine.half.deferrals._passed == {}


@pytest.mark.parametrize("backfill_turns", [0.0, 0.001])
def test_without_backfill_or_when_its_time_is_over_memory_is_left_for_it(
    backfill_turns: float,
) -> None:
    engine = crowded(backfill_turns)
    engine.half.room._short["big"] = 20
    engine.half.admission.decide("big", 20, engine.now_s, lacks_room=True)
    engine.now_s += 0.6
    for _ in range(N_STEPS):
        engine.step()
        assert running(engine) == {"runs"}
    engine.run()
    assert engine.half.admission.waiting == 0
