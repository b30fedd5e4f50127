"""A small tier, and what happens when its server dies, hangs or comes back."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvtier.server.files import ServerFiles
from tests.engine.engine_harness import BLOCK_TOKENS, CHUNK_TOKENS, readable, tokens
from tests.engine.patience import TIMEOUT_S, short_deadline, short_timeout
from tests.engine.tier_probe import WAIT_S, await_stopped, knock, server_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.engine.engine_harness import Engine, Turn


def ready(engine: Engine) -> str:
    """Wait for the tier; its generation."""
    engine.await_tier()
    return str(engine.half.tier.region.generation)


def failures(engine: Engine) -> dict[str, float]:
    """What was counted so far."""
    return engine.failures()


def server_pid() -> int:
    record = ServerFiles(Path(os.environ["KVTIER_RUN_DIR"]), "kvtier").read_record()
    assert record is not None
    assert record.server is not None
    return record.server.pid


@contextmanager
def stopped_server() -> Iterator[None]:
    """The server stands still."""
    pid = server_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        await_stopped(pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def kill_server() -> None:
    os.kill(server_pid(), signal.SIGKILL)


def generation(engine: Engine) -> str:
    return str(engine.half.tier.region.generation)


def await_new_server(engine: Engine, old_generation: str) -> None:
    """The guardian starts another server; the engine finds it without a restart."""
    deadline_s = time.monotonic() + WAIT_S
    while generation(engine) == old_generation or str(engine.half.tier.state) != "ready":
        assert time.monotonic() < deadline_s, engine.half.tier.state
        engine.step()
        engine.half.housekeeping.run(time.monotonic())
        time.sleep(0.01)


def first_turn(engine: Engine, name: str, n_tokens: int = 700) -> Turn:
    turn = engine.turn(tokens(name, n_tokens), program=name)
    engine.drain()
    return turn


def n_staged(engine: Engine, name: str) -> int:
    staged = engine.half.stager.copies._staged.get(engine.handle(name))
    return staged.n_chunks if staged is not None else 0


def works_again(engine: Engine, name: str) -> None:
    """A program is staged and reloaded."""
    first = first_turn(engine, name)
    assert n_staged(engine, name) == 711 // BLOCK_TOKENS * BLOCK_TOKENS // CHUNK_TOKENS
    engine.evict()
    engine.set_policy(reload="always")
    second = engine.turn(first.then(tokens(f"{name}-2", 50)), program=name)
    assert second.cpu == readable(711)


def strangers(engine: Engine) -> None:
    """Whoever talks nonsense to the server is told so, and disturbs nobody."""
    first = engine.staged_turn("strangers", 400)
    empty, garbage, far = knock(engine.half.tier._config.endpoint)
    assert {empty.reason, garbage.reason} == {"malformed"}  # type: ignore[union-attr]
    assert far.reason == "not_on_this_host"  # type: ignore[union-attr]
    engine.evict()
    prompt = first.then(tokens("strangers2", 50))
    assert engine.turn(prompt, program="strangers").cpu > 0
    works_again(engine, "strangers-later")


def guardian_killed(engine: Engine) -> None:
    """The server dies with its guardian; the engine, which lives on, has both started again."""
    old = generation(engine)
    record = ServerFiles(Path(os.environ["KVTIER_RUN_DIR"]), "kvtier").read_record()
    assert record is not None
    os.kill(record.guardian.pid, signal.SIGKILL)
    engine.await_tier("away")
    engine.half.tier._revival_due_s = 0.0
    await_new_server(engine, old)
    works_again(engine, "after-guardian")


def full_of_equals(engine: Engine) -> None:
    """L1 full of leased programs of no less value: the next one is refused, counted, and recomputed."""
    engine.await_tier()
    names = [f"equal{i}" for i in range(10)]
    before = engine.failures().get("stage_l1_full", 0)
    evicted = server_status(engine.half.tier._config.endpoint).evicted_chunks
    policy = engine.half.policy
    # Each worth half of the one before: on a slow machine equals would not be, as worth falls with time.
    value_s, shares = policy.staged_value_s, iter(0.5**i for i in range(len(names)))
    policy.staged_value_s = lambda *asked: next(shares) * value_s(*asked)
    try:
        turns = {name: first_turn(engine, name) for name in names}
    finally:
        del policy.staged_value_s
    assert engine.failures()["stage_l1_full"] - before > 0
    refused = [name for name in names if n_staged(engine, name) == 0]
    assert refused
    assert server_status(engine.half.tier._config.endpoint).evicted_chunks == evicted
    engine.evict()
    engine.set_policy(reload="always")
    for name in (names[0], refused[0]):
        again = engine.turn(turns[name].then(tokens(f"{name}-2", 50)), program=name)
        assert (again.cpu > 0) == (name == names[0])


def room_by_value(engine: Engine) -> None:
    """L1 is full; something of more value comes: cheaper KV goes, and that program recomputes."""
    engine.await_tier()
    turns = {name: first_turn(engine, name) for name in (f"cheap{i}" for i in range(8))}
    before = server_status(engine.half.tier._config.endpoint).evicted_chunks
    policy = engine.half.policy
    model = policy.prefill.model()
    policy.prefill.model = lambda: model.__class__(*(10 * c for c in model.coefficients))
    try:
        dear = first_turn(engine, "dear", 1300)
    finally:
        del policy.prefill.model
    assert server_status(engine.half.tier._config.endpoint).evicted_chunks > before
    assert n_staged(engine, "dear") == 1311 // BLOCK_TOKENS * BLOCK_TOKENS // CHUNK_TOKENS
    engine.evict()
    engine.set_policy(reload="always")
    for name, first in turns.items():
        engine.turn(first.then(tokens(f"{name}-2", 50)), program=name)
    again = engine.turn(dear.then(tokens("dear2", 50)), program="dear")
    assert again.cpu == readable(1311)


def room_by_expired_lease(engine: Engine) -> None:
    """KV whose lease has ended goes first, whatever it was worth."""
    engine.await_tier()
    tier = engine.half.tier
    reserve = tier.reserve
    tier.reserve = lambda *args: reserve(*args[:-1], 0.001)
    try:
        for i in range(8):
            first_turn(engine, f"expired{i}")
    finally:
        del tier.reserve
    before = engine.failures().get("stage_l1_full", 0)
    first_turn(engine, "fresh")
    assert engine.failures().get("stage_l1_full", 0) == before
    assert n_staged(engine, "fresh") > 0, engine.failures()
    works_again(engine, "fresh-later")


def killed_before_store(engine: Engine) -> None:
    engine.await_tier()
    old = generation(engine)
    kill_server()
    first = first_turn(engine, "k-before")
    assert n_staged(engine, "k-before") == 0
    engine.evict()
    second = engine.turn(first.then(tokens("k-before2", 50)), program="k-before")
    assert second.cpu == 0
    await_new_server(engine, old)
    works_again(engine, "k-before-later")


def killed_during_store(engine: Engine) -> None:
    """The copy ends, but nobody is left to confirm it."""
    engine.await_tier()
    # The worker maps the tier's memory with its first copy, and has none to hold back before.
    first_turn(engine, "k-store-before")
    old = generation(engine)
    with engine.held_copies("store") as go:
        first = engine.turn(tokens("k-store", 700), program="k-store")
        engine.step_until(lambda: engine.half.stager._by_order, "store")
        go.await_begun()
        kill_server()
        go.set()
        engine.drain()
    assert n_staged(engine, "k-store") == 0
    engine.evict()
    assert engine.turn(first.then(tokens("k-store2", 50)), program="k-store").cpu == 0
    await_new_server(engine, old)
    works_again(engine, "k-store-later")


def killed_between(engine: Engine) -> None:
    """Between store and load: everything staged is gone, and is known to be gone."""
    engine.await_tier()
    old = generation(engine)
    first = first_turn(engine, "k-between")
    assert n_staged(engine, "k-between") > 0
    engine.evict()
    engine.set_policy(reload="always")
    kill_server()
    second = engine.turn(first.then(tokens("k-between2", 50)), program="k-between")
    assert second.cpu == 0
    await_new_server(engine, old)
    assert n_staged(engine, "k-between") == 0
    third = engine.turn(second.then(tokens("k-between3", 50)), program="k-between")
    engine.drain()
    engine.evict()
    fourth = engine.turn(third.then(tokens("k-between4", 50)), program="k-between")
    assert fourth.cpu > 0


def killed_during_load(engine: Engine) -> None:
    """The server dies while the copy runs: the memory is still mapped, the copy ends well."""
    engine.await_tier()
    old = generation(engine)
    engine.set_policy(reload="always")
    first = first_turn(engine, "k-load")
    engine.evict()
    with engine.held_copies("load") as go:
        request_id = engine.start(first.then(tokens("k-load2", 50)), program="k-load")
        engine.step_until(lambda: engine.half.reader.n_loads == 1, "load")
        kill_server()
        engine.step_until(lambda: str(engine.half.tier.state) == "away", "end of the server")
        go.set()
        assert engine.finish(request_id).cpu == readable(711)
    await_new_server(engine, old)
    works_again(engine, "k-load-later")


def hung(engine: Engine) -> None:
    """The server stops answering: requests go on without it, and after the time-out it is given up."""
    engine.await_tier()
    engine.set_policy(reload="always")
    first = first_turn(engine, "hung")
    engine.evict()
    prompt = first.then(tokens("hung2", 50))
    with stopped_server():
        with short_deadline():
            second = engine.turn(prompt, program="hung")
        # The request has gone on before the server is given up.
        assert str(engine.half.tier.state) == "ready"
        assert second.cpu == 0
        with short_timeout(engine.half):
            engine.await_tier("away")
        # Away is away: nobody waits for it again.
        late = engine.failures()["lookup_late"]
        engine.turn(second.then(tokens("hung3", 50)), program="hung")
        assert engine.failures()["lookup_late"] == late
    engine.await_tier()
    engine.evict()
    assert engine.turn(prompt, program="hung").cpu == readable(711)
    works_again(engine, "hung-later")


def hung_during_load(engine: Engine) -> None:
    """The server hangs while a copy runs: the copy needs no server."""
    engine.await_tier()
    engine.set_policy(reload="always")
    first = first_turn(engine, "hung-load")
    engine.evict()
    with engine.held_copies("load") as go:
        request_id = engine.start(first.then(tokens("hung-load2", 50)), program="hung-load")
        engine.step_until(lambda: engine.half.reader.n_loads == 1, "load")
        with stopped_server():
            go.set()
            with short_timeout(engine.half):
                assert engine.finish(request_id).cpu == readable(711)
                # Another program is to be staged: that is not answered.
                engine.turn(tokens("hung-other", 700), program="hung-other")
                engine.step_until(lambda: str(engine.half.tier.state) == "away", "time-out")
    engine.await_tier()
    works_again(engine, "hung-load-later")


def answered(engine: Engine) -> None:
    """Wait until the server has answered all that was asked, without looking at the time-out."""
    tier, deadline_s = engine.half.tier, time.monotonic() + WAIT_S
    tier._take_frames()
    while tier._pending:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
        tier._take_frames()


def step_longer_than_the_timeout(engine: Engine) -> None:
    """The server is not blamed for an engine whose steps are long."""
    engine.await_tier()
    before = engine.failures().get("tier_lost", 0)
    half = engine.half
    on_worker = half.on_worker

    def slowly(report: object) -> None:
        # Nothing is left unanswered but what is asked from here on.
        answered(engine)
        time.sleep(1.5 * TIMEOUT_S)
        on_worker(report)
        # As the next step does, before the server can have answered.
        half.housekeeping.run(time.monotonic())

    half.on_worker = slowly
    try:
        with short_timeout(engine.half):
            first = first_turn(engine, "slow-step")
    finally:
        half.on_worker = on_worker
    assert engine.failures().get("tier_lost", 0) == before
    assert n_staged(engine, "slow-step") > 0
    engine.evict()
    engine.set_policy(reload="always")
    second = engine.turn(first.then(tokens("slow-step2", 50)), program="slow-step")
    assert second.cpu == readable(711)


def gone_while_idle(engine: Engine) -> None:
    """The server ends while nothing is asked of it: noticed without an operation that fails."""
    engine.await_tier()
    old = generation(engine)
    kill_server()
    deadline_s = time.monotonic() + WAIT_S
    while str(engine.half.tier.state) == "ready":
        assert time.monotonic() < deadline_s
        engine.half.housekeeping.run(time.monotonic())
    await_new_server(engine, old)
