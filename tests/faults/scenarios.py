"""What goes wrong in an engine's process or on its machine, and what must be right after it.

Each scenario ends with a turn that is reloaded from the CPU tier again, in the same engine, and returns how
long that took from the end of the fault, and what was counted meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtier import cpu_pool
from kvtier.calibration import load_profile, profile_path
from kvtier.control import launch
from kvtier.copies.kernel import DONE
from kvtier.worker_half import calibrate
from tests.engine.engine_harness import Turn, readable, tokens
from tests.engine.scenarios_faults import await_new_server, generation, kill_server, works_again
from tests.engine.scenarios_prefetch import ask, come_back, paused
from tests.engine.tier_probe import WAIT_S, server_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.engine.engine_harness import Engine

DAY_S = 86_400.0


class Told:
    """Failures counted and seconds passed since a point of a scenario."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = Counter(engine.failures())
        self._ended_s = time.monotonic()

    def fault_ends(self) -> None:
        """From now on the time counts."""
        self._ended_s = time.monotonic()

    def facts(self) -> dict[str, Any]:
        """For the test."""
        failures = Counter(self._engine.failures())
        failures.subtract(self._before)
        seconds = time.monotonic() - self._ended_s
        return {"failures": {k: n for k, n in failures.items() if n}, "recovered_s": seconds}


def ready(engine: Engine) -> str:
    """Wait for the tier; its generation."""
    engine.await_tier()
    # The worker maps the memory with its first step.
    engine.turn(tokens("warm", 100), 2)
    return generation(engine)


def tier_state(engine: Engine) -> str:
    """What the engine knows of the tier, after its hooks have run."""
    engine.half.housekeeping.run(time.monotonic())
    return str(engine.half.tier.state)


@contextlib.contextmanager
def machine(**faults: str) -> Iterator[None]:
    """Put faults of the machine in force: see `site/sitecustomize.py`."""
    files = [Path(os.environ["FAULTS_DIR"]) / name for name in faults]
    for file, text in zip(files, faults.values(), strict=True):
        file.write_text(text)
    try:
        time.sleep(0.1)
        yield
    finally:
        for file in files:
            file.unlink()


@contextlib.contextmanager
def kernel(engine: Engine, direction: str, faulty: Callable[..., int]) -> Iterator[None]:
    """Copy in this direction with another loop, which gets the real one and its arguments."""
    copies = engine.copy_engine
    real = copies._kernel

    def chosen(*args: Any) -> Any:
        return faulty(real, *args) if bool(args[3]) == (direction == "load") else real(*args)

    copies._kernel = chosen
    try:
        yield
    finally:
        copies._kernel = real


def goes_on(engine: Engine, name: str, last: Turn) -> Turn:
    """The program's next turn: what was staged after the fault is loaded."""
    engine.drain()
    engine.evict()
    engine.set_policy(reload="always")
    again = engine.turn(last.then(tokens(f"{name}-again", 50)), program=name)
    assert again.cpu == readable(len(last.prompt) + len(last.tokens) - 1)
    return again


def returns(engine: Engine, name: str, first: Turn) -> Turn:
    """The program's next turn, with nothing in GPU memory; nothing can be loaded."""
    engine.drain()
    engine.evict()
    engine.set_policy(reload="always")
    second = engine.turn(first.then(tokens(f"{name}-2", 60)), program=name)
    assert second.cpu == 0
    return second


# -- copies that lie -------------------------------------------------------------------------------


def store_that_does_nothing(engine: Engine) -> dict[str, Any]:
    engine.await_tier()
    told = Told(engine)
    with kernel(engine, "store", lambda *_: DONE):
        first = engine.staged_turn("lying-store")
    second = returns(engine, "lying-store", first)
    told.fault_ends()
    goes_on(engine, "lying-store", second)
    return told.facts()


def load_of_other_bytes(engine: Engine) -> dict[str, Any]:
    """The loop says that it has copied, and has written something else."""

    def other(real: Any, *args: Any) -> int:
        runs, planes = args[0], args[1]
        outcome = int(real(*args))
        ctypes.memset(int(planes[0, 0] + runs[0, 0] * planes[0, 1]), 0x3F, 64)
        return outcome

    told = Told(engine)
    first = engine.staged_turn("lying-load")
    with kernel(engine, "load", other):
        second = returns(engine, "lying-load", first)
    told.fault_ends()
    goes_on(engine, "lying-load", second)
    return told.facts()


def spoil(engine: Engine) -> None:
    """Write zeros over all that the tier holds."""
    region = engine.half.tier.region
    with (Path("/dev/shm") / region.shm_name.lstrip("/")).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), region.size_bytes)
        memory[:] = bytes(region.size_bytes)
        memory.close()


def spoilt_memory(engine: Engine) -> dict[str, Any]:
    """Somebody else writes to the shared memory."""
    told = Told(engine)
    first = engine.staged_turn("spoilt-memory")
    spoil(engine)
    second = returns(engine, "spoilt-memory", first)
    told.fault_ends()
    goes_on(engine, "spoilt-memory", second)
    return told.facts()


def spoilt_before_a_prefetch(engine: Engine) -> dict[str, Any]:
    told = Told(engine)
    first = paused(engine, "spoilt-early")
    spoil(engine)
    assert ask(engine, "spoilt-early") == ("accepted", "loading")
    engine.drain()
    second, pinned = come_back(engine, "spoilt-early", first)
    assert (pinned, second.cpu) == (0, 0)
    told.fault_ends()
    goes_on(engine, "spoilt-early", second)
    return told.facts()


# -- memory ----------------------------------------------------------------------------------------


def memory_full_at_a_start(engine: Engine) -> dict[str, Any]:
    """The server dies, and there is no room in shared memory for another one."""
    engine.await_tier()
    old, told = generation(engine), Told(engine)
    first = engine.staged_turn("no-room")
    with machine(full=""):
        kill_server()
        lease = engine.connector._lease
        deadline_s = time.monotonic() + WAIT_S
        while "0 MiB free" not in lease.state().detail:
            assert time.monotonic() < deadline_s, lease.state()
            time.sleep(0.05)
        engine.await_tier("away")
        second = returns(engine, "no-room", first)
    told.fault_ends()
    # It is called back after 15 s, then after twice as long each time.
    engine.half.tier._revival_due_s = 0.0
    await_new_server(engine, old)
    engine.drain()
    works_again(engine, "no-room-later")
    del second
    return told.facts()


def memory_full_at_mapping(engine: Engine) -> dict[str, Any]:
    """The server has its memory, but this process cannot map it."""
    engine.await_tier()
    old, told = generation(engine), Told(engine)
    open_region = cpu_pool.SharedRegion.open

    def refuse(name: str, size_bytes: int) -> Any:
        raise cpu_pool.SharedRegionError("/dev/shm has no room (injected)")

    cpu_pool.SharedRegion.open = refuse  # type: ignore[method-assign, assignment]
    try:
        kill_server()
        await_new_server(engine, old)
        first = engine.turn(tokens("unmapped", 700), program="unmapped")
        second = returns(engine, "unmapped", first)
    finally:
        cpu_pool.SharedRegion.open = open_region  # type: ignore[method-assign]
    told.fault_ends()
    # It is tried again after 10 s, then after twice as long each time.
    engine.worker._remap_due_s = 0.0
    engine.turn(second.then([5]), program="unmapped")
    works_again(engine, "unmapped-later")
    return told.facts()


def memory_removed(engine: Engine) -> dict[str, Any]:
    """Somebody removes the file: what is mapped still works, and the server is started anew for the others."""
    engine.await_tier()
    old, told = generation(engine), Told(engine)
    first = engine.staged_turn("removed")
    (Path("/dev/shm") / engine.half.tier.region.shm_name.lstrip("/")).unlink()
    await_new_server(engine, old)
    returns(engine, "removed", first)
    works_again(engine, "removed-later")
    return told.facts()


# -- files and clocks ------------------------------------------------------------------------------


def corrupt_profile(engine: Engine) -> dict[str, Any]:
    """The calibration file is garbage when the engine starts, or starts again."""
    engine.await_tier()
    told, worker = Told(engine), engine.worker
    path = profile_path(worker._profile_dir, worker._model, worker._kv_layout.fingerprint)
    assert load_profile(path) is not None
    for garbage in (b"\x00\xff" * 999, b'{"version": 1, "store": []}'):
        path.write_bytes(garbage)
        # As `register` does.
        found = calibrate(worker._kv_layout, worker._model, path.parent, may_measure=True)
        assert found is not None
        assert found.store[1]
        assert load_profile(path) is not None
    worker._calibration = found
    works_again(engine, "profile")
    return told.facts()


def clock_set_back(engine: Engine) -> dict[str, Any]:
    """The wall clock goes back a day while an agent pauses, and the server dies after it."""
    engine.await_tier()
    old, told = generation(engine), Told(engine)
    first = engine.staged_turn("clock")
    before_s = time.time()
    with machine(clock=str(-DAY_S)):
        assert time.time() < before_s - DAY_S / 2
        # The server looks every second whether its engines live.
        time.sleep(2.5)
        assert tier_state(engine) == "ready"
        second = goes_on(engine, "clock", first)
        engine.drain()
        kill_server()
        await_new_server(engine, old)
        returns(engine, "clock", second)
        works_again(engine, "clock-later")
        facts = told.facts()
    # And forward again.
    time.sleep(2.5)
    assert tier_state(engine) == "ready"
    works_again(engine, "clock-forward")
    return facts


# -- the control server: the test talks to it, the engine works on ---------------------------------


def works(engine: Engine, name: str) -> dict[str, Any]:
    """A program is staged and reloaded."""
    told = Told(engine)
    works_again(engine, name)
    return told.facts()


def run_hooks(engine: Engine, seconds: float) -> bool:
    """As in an engine that has something to do; whether the control server follows it then."""
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        engine.half.housekeeping.run(time.monotonic())
        engine.half.report(time.monotonic())
        time.sleep(0.02)
    return bool(engine.half._link._is_followed)


def call_the_control_server_back(engine: Engine) -> None:
    """Without the half minute for which an engine waits before it starts another one."""
    launch._last_starts_s.clear()
    engine.half._link._next_revive_s = 0.0


# -- a server that the test keeps ------------------------------------------------------------------


_last_generation = ""


def found_another(engine: Engine) -> None:
    """Wait for a server that is not the last one that this has waited for."""
    global _last_generation  # noqa: PLW0603 - as long as the engine
    deadline_s = time.monotonic() + WAIT_S
    while (region := engine.half.tier.region) is None or region.generation == _last_generation:
        assert time.monotonic() < deadline_s
        engine.half.housekeeping.run(time.monotonic())
        time.sleep(0.01)
    _last_generation = ready(engine)


def no_tier(engine: Engine, name: str) -> dict[str, Any]:
    """Two turns without a tier; what the engine knows of it."""
    told = Told(engine)
    first = engine.turn(tokens(name, 700), program=name)
    returns(engine, name, first)
    return {**told.facts(), "tier": tier_state(engine)}


def stage_one(engine: Engine, name: str) -> dict[str, Any]:
    """A staged program; its chunk keys, as the server gets them, its next prompt, and others' namespaces."""
    first = engine.staged_turn(name)
    copies, facts = engine.half.stager.copies, engine.half.facts
    staged = copies._staged[engine.handle(name)]
    prompt = first.then(tokens(f"{name}-2", 50))
    assert facts.namespace() == copies.namespace
    # Of engines that differ from this one in nothing else.
    others = [
        replace(facts, identity=tuple({**dict(facts.identity), part: "other"}.items())).namespace()
        for part in ("weights", "dtype")
    ]
    return {"keys": bytes(staged.chain.keys).hex(), "prompt": prompt, "others": others}


def load_one(engine: Engine, name: str, prompt: list[int]) -> int:
    """A turn with this prompt and nothing in GPU memory; how many tokens were loaded."""
    engine.drain()
    engine.evict()
    engine.set_policy(reload="always")
    return engine.turn(prompt, program=name).cpu


def many(engine: Engine, n_programs: int) -> dict[str, Any]:
    """Programs, of which the newest is always worth most, and each comes back once."""
    engine.await_tier()
    told, tier = Told(engine), engine.half.tier
    reserve = tier.reserve
    tier.reserve = lambda *args: reserve(*args[:-1], 0.001)
    names = [f"many{i}" for i in range(n_programs)]
    firsts = {}
    try:
        for name in names:
            firsts[name] = engine.turn(tokens(name, 700), program=name)
            engine.drain()
        engine.set_policy(reload="always")
        loaded = 0
        for name in reversed(names):
            engine.drain()
            engine.evict()
            loaded += engine.turn(firsts[name].then(tokens(f"{name}-2", 50)), program=name).cpu > 0
    finally:
        del tier.reserve
    return {**told.facts(), "loaded": loaded}


def tier_status(engine: Engine) -> dict[str, int]:
    """The server's own counts."""
    status = server_status(engine.half.tier._config.endpoint)
    names = ("used_bytes", "total_bytes", "programs", "chunks", "locked_chunks", "reservations")
    return {name: getattr(status, name) for name in names}
