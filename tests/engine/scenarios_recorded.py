"""A run with some of everything, recorded and lived through again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.engine.engine_harness import tokens
from tests.engine.tape import recorded, replayed

if TYPE_CHECKING:
    from tests.engine.engine_harness import Engine


def live_equals_replay(engine: Engine) -> dict[str, Any]:
    """What was decided live, and what is decided when the same is replayed."""
    with recorded(engine) as tape:
        _live(engine)
        engine.drain()
    again = replayed(engine, tape)
    return {
        "live": tape.decisions.entries,
        "replayed": again.decisions.entries,
        "same_steps": again.scheduled == tape.scheduled,
        "same_answers": again.polls == tape.polls,
        "clock_left": len(tape.clock_s) - len(again.clock_s),
        "answers": sorted({what[0] for poll in tape.polls for _, what in poll}),
        "steps": len(tape.scheduled),
    }


def _live(engine: Engine) -> None:
    """Programs that pause, come back to a pin, to a copy, too late, together, or go away."""
    names = [f"agent{i}" for i in range(3)]
    ids = [
        engine.start(
            tokens(name, 300 + 90 * i), 10 + i, program=name, tool=("bash", "search")[i % 2]
        )
        for i, name in enumerate(names)
    ]
    turns = {name: engine.finish(i) for name, i in zip(names, ids, strict=True)}
    for round_ in range(2):
        for name in names:
            prompt = turns[name].then(tokens(f"{name}.{round_}", 70))
            turns[name] = engine.turn(prompt, program=name)
    engine.turn(tokens("no tool", 200), tool=None)
    # Copies only: everything in GPU memory goes.
    engine.evict()
    first, second, third = names
    turns[first] = engine.turn(turns[first].then(tokens("back", 40)), program=first)
    # One holds its memory until others need it, another for less time than a step takes.
    turns[second] = engine.turn(
        turns[second].then(tokens("pin", 40)), program=second, ttl_s=600.0, stage=False
    )
    turns[third] = engine.turn(turns[third].then(tokens("brief", 40)), program=third, ttl_s=0.001)
    engine.flood(4)
    engine.turn(tokens("kept", 700), program="kept", ttl_s=600.0, stage=False)
    aborted = engine.start(tokens("aborted", 400), 50, program="aborted")
    engine.step_until(lambda: engine.produced(aborted), "first token")
    engine.abort(aborted)
    # More than fits beside what is kept.
    ids = [
        engine.start(turns[name].then(tokens(f"{name} last", 500)), 60, program=name)
        for name in names
    ]
    ids.append(engine.start(tokens("large", 1500), 60))
    for request_id in ids:
        engine.finish(request_id)
    engine.turn(tokens("end", 100), program=first, end=True)
