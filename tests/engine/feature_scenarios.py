"""vLLM's features beside kvtier, on vLLM's real scheduler: facts for `test_features` to judge."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.engine.engine_spec import EngineSpec
from tests.engine.pin_scenarios import KEEP, PASSING, PIN_ONLY, Tokens
from tests.engine.scheduler_harness import Drive, Engine
from tests.engine.tier_scenarios import STAGE_ONLY, TIER
from tests.engine.virtual_tier import VirtualTier

if TYPE_CHECKING:
    from vllm.v1.request import Request

Facts = dict[str, Any]

MANY_STEPS = 400
"""What takes more does not end."""


def _clean(engine: Engine, drive: Drive, tier: VirtualTier | None = None) -> Facts:
    """What must not be left when all is over."""
    drive.run()
    engine.check()
    gave_up = engine.connector.scheduler_half is None
    failures = 0 if gave_up else engine.half.stats.totals.get("failures|internal", 0)
    engine.connector.shutdown()
    engine.check()
    return {
        "gave_up": gave_up,
        "internal_failures": failures,
        "lost_blocks": engine.spec.blocks - engine.free_blocks,
        "locked_chunks": tier.locked_chunks if tier is not None else 0,
        "open_reservations": tier.open_reservations if tier is not None else 0,
    }


def _evict(engine: Engine, drive: Drive, tokens: Tokens) -> None:
    for i in range(8):
        drive.run(engine.request(f"x{drive.steps}-{i}", tokens(200), 3, kvtier=PASSING))


# -- whose KV --------------------------------------------------------------------------------------


def _strangers(first: Facts, second: Facts, *, is_async: bool) -> Facts:
    """Two that send the same prompt but may not share KV; then the first one sends it again."""
    tier = VirtualTier()
    engine = Engine(EngineSpec(is_async=is_async, blocks=30, settings=TIER), tier)
    drive, tokens = Drive(engine), Tokens()
    prompt = tokens(150)
    facts: Facts = {}
    for name, who in (("first", first), ("second", second), ("again", first)):
        drive.run(engine.request(name, prompt, 5, session="s", kvtier=STAGE_ONLY, **who))
        facts[f"{name}_cached"] = drive.cached_tokens[name]
        facts[f"{name}_staged"] = tier.resident_chunks
        _evict(engine, drive, tokens)
    return {**facts, **_clean(engine, drive, tier)}


def tenants(*, is_async: bool) -> Facts:
    """Two values of `cache_salt`."""
    return _strangers({"cache_salt": "a"}, {"cache_salt": "b"}, is_async=is_async)


def adapters(*, is_async: bool) -> Facts:
    """Two LoRA adapters."""
    with tempfile.TemporaryDirectory() as directory:
        who = []
        for number, name in enumerate("ab", 1):
            path = Path(directory) / name
            path.mkdir()
            (path / "adapter_config.json").write_text("{}")
            lora = SimpleNamespace(lora_name=name, lora_path=str(path), lora_int_id=number)
            who.append({"lora_request": lora})
        return _strangers(*who, is_async=is_async)


def embeddings(*, is_async: bool) -> Facts:
    """Prompts of token ids, some of whose positions are embeddings: the ids there say nothing."""
    is_token = [False] * 32 + [True] * 118
    who = [
        {"prompt_embeds": torch.full((150, 2), value), "prompt_is_token_ids": is_token}
        for value in (1.0, 2.0)
    ]
    return _strangers(*who, is_async=is_async)


# -- streaming sessions ----------------------------------------------------------------------------


def _session(engine: Engine, prompt: list[int], n_tokens: int, *, goes_on: bool = True) -> Request:
    return engine.request("session", prompt, n_tokens, session="S", kvtier=KEEP, resumable=goes_on)


def streaming(*, is_async: bool) -> Facts:
    """A session gets its input in three pieces, and other programs that need memory come between them."""
    tier = VirtualTier()
    engine = Engine(EngineSpec(is_async=is_async, blocks=30, settings={}), tier)
    drive, tokens = Drive(engine), Tokens()
    drive.run(engine.request("before", tokens(100), 20, session="B", kvtier=KEEP))
    session = _session(engine, tokens(60), 10)
    engine.scheduler.add_request(session)
    lengths = []
    for piece in range(3):
        for _ in range(MANY_STEPS):
            if session.status is RequestStatus.WAITING_FOR_STREAMING_REQ:
                break
            drive.step()
        drive.drain()
        lengths.append(session.num_tokens)
        engine.check()
        # The session waits for its client; nobody waits for the session.
        drive.run(engine.request(f"other{piece}", tokens(150), 30, session=f"o{piece}"))
        if piece < 2:
            engine.scheduler.add_request(_session(engine, tokens(40), 10))
    idle = not drive.busy
    engine.scheduler.add_request(_session(engine, [], 1, goes_on=False))
    outputs = {name: len(drive.output[name]) for name in ("other0", "other1", "other2")}
    return {
        "lengths": lengths,
        "idle_while_it_waits": idle,
        "finished": session.is_finished(),
        "outputs": sorted(set(outputs.values())),
        **_clean(engine, drive, tier),
    }


# -- pause, sleep, new weights ---------------------------------------------------------------------


def _pause(engine: Engine, drive: Drive, mode: str) -> int:
    """What vLLM's engine does for `pause_generation(mode, clear_cache=True)`; steps until it is paused."""
    scheduler = engine.scheduler
    if mode == "abort":
        scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    scheduler.set_pause_state(PauseState.PAUSED_ALL if mode == "keep" else PauseState.PAUSED_NEW)
    for step in range(MANY_STEPS):
        if not drive.busy:
            return step
        drive.step()
    return MANY_STEPS


def _asleep(mode: str, *, is_async: bool) -> Facts:
    """An engine with a pin, a turn that is being staged and a running request goes to sleep and wakes up."""
    tier = VirtualTier()
    engine = Engine(EngineSpec(is_async=is_async, blocks=40, settings={}), tier)
    drive, tokens = Drive(engine, lambda _: (6, True)), Tokens()
    pinned = engine.request("pinned", tokens(100), 20, session="P", kvtier=KEEP)
    drive.run(pinned)
    staged_before = tier.resident_chunks
    running = engine.request("running", tokens(60), 40, session="R", kvtier=KEEP)
    engine.scheduler.add_request(running)
    engine.scheduler.add_request(
        engine.request("short", tokens(80), 3, session="T", kvtier=STAGE_ONLY)
    )
    while not drive.worker.busy:
        drive.step()
    steps = _pause(engine, drive, mode)
    succeeded = engine.scheduler.reset_prefix_cache(
        reset_running_requests=True, reset_connector=True
    )
    free_asleep = engine.free_blocks
    # Memory is given up: what comes back holds nothing.
    drive.kv._blocks.clear()
    engine.scheduler.add_request(engine.request("meanwhile", tokens(60), 5, session="M"))
    engine.clock.now_s += 100.0
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    prompt = [*drive.text(pinned), *tokens(20)]
    drive.run(engine.request("back", prompt, 5, session="P", kvtier=KEEP))
    return {
        "staged_before": staged_before,
        "steps_to_pause": steps,
        "succeeded": succeeded,
        "held_asleep": engine.spec.blocks - free_asleep,
        "cached_after": drive.cached_tokens["back"],
        "output_tokens": {k: len(drive.output[k]) for k in ("running", "meanwhile", "back")},
        **_clean(engine, drive, tier),
    }


def sleep_abort(*, is_async: bool) -> Facts:
    """Running requests are aborted."""
    return _asleep("abort", is_async=is_async)


def sleep_wait(*, is_async: bool) -> Facts:
    """Running requests are awaited."""
    return _asleep("wait", is_async=is_async)


def sleep_keep(*, is_async: bool) -> Facts:
    """Running requests stay and are computed anew afterwards."""
    return _asleep("keep", is_async=is_async)


def new_weights(*, is_async: bool) -> Facts:
    """The cache is reset with and without the connector's: after new weights, nothing of before is read."""
    facts: Facts = {}
    for with_connector in (False, True):
        tier = VirtualTier()
        engine = Engine(EngineSpec(is_async=is_async, blocks=40, settings=TIER), tier)
        drive, tokens = Drive(engine), Tokens()
        first = engine.request("a1", tokens(100), 61, session="A", kvtier=STAGE_ONLY)
        drive.run(first)
        succeeded = engine.scheduler.reset_prefix_cache(reset_connector=with_connector)
        prompt = [*drive.text(first), *tokens(30)]
        drive.run(engine.request("a2", prompt, 2, session="A", kvtier=STAGE_ONLY))
        name = "all" if with_connector else "gpu_only"
        facts[name] = {
            "succeeded": succeeded,
            "cached": drive.cached_tokens["a2"],
            **_clean(engine, drive, tier),
        }
    return facts


# -- what kvtier does not do -----------------------------------------------------------------------


def unsupported(*, is_async: bool) -> Facts:
    """Engines without anything to keep: kvtier stays out of them, or where a tier is required they do not start."""
    facts: Facts = {}
    for name, more in (("caching", {"caching": False}), ("window", {"sliding_window": 64})):
        spec = EngineSpec(is_async=is_async, blocks=40, settings={}, **more)
        engine = Engine(spec, VirtualTier())
        drive = Drive(engine)
        drive.run(engine.request("a", Tokens()(100), 20, session="A", kvtier=KEEP))
        try:
            Engine(replace(spec, settings={"kvtier.tier": "require"}), VirtualTier())
            refusal = ""
        except RuntimeError as error:
            refusal = str(error)
        facts[name] = {
            "is_passive": engine.connector.scheduler_half is None,
            "output_tokens": len(drive.output["a"]),
            "lost_blocks": engine.spec.blocks - engine.free_blocks,
            "refusal": refusal,
        }
    return facts


# -- order -----------------------------------------------------------------------------------------


def priorities(*, is_async: bool) -> Facts:
    """Programs of low priority fill the engine and its queue; then an urgent one comes."""
    facts: Facts = {}
    for name, settings in (("with", {"kvtier.tier": "off"}), ("without", None)):
        spec = EngineSpec(
            is_async=is_async, blocks=40, settings=settings, policy="priority", max_batch=3
        )
        engine = Engine(spec)
        drive, tokens = Drive(engine), Tokens()
        for i in range(6):
            request = engine.request(f"batch{i}", tokens(150), 20, session=f"b{i}", priority=5)
            engine.scheduler.add_request(request)
        for _ in range(5):
            drive.step()
        drive.run(engine.request("urgent", tokens(150), 5, session="u", priority=0))
        started = sorted(drive.first_step, key=lambda known: drive.first_step[known])
        facts[f"{name}_place"] = started.index("urgent")
        facts[f"{name}_done"] = sorted({len(out) for out in drive.output.values()})
        if settings is not None:
            facts |= _clean(engine, drive)
    return facts


def siblings(*, is_async: bool) -> Facts:
    """`n=3`: vLLM makes three requests of one. Each may be the one whose text goes on."""
    engine = Engine(EngineSpec(is_async=is_async, blocks=60, settings=PIN_ONLY))
    drive, tokens = Drive(engine), Tokens()
    prompt = tokens(100)
    made = [engine.request(f"{i}_r", prompt, 40, session="S", kvtier=KEEP) for i in range(3)]
    drive.run(*made)
    pinned = len(engine.pinned_keys)
    prompt = [*drive.text(made[1]), *tokens(20)]
    drive.run(engine.request("next", prompt, 2, session="S", kvtier=KEEP))
    return {
        "pinned": pinned,
        "cached": drive.cached_tokens["next"],
        "handoffs": engine.releases("handoff"),
        **_clean(engine, drive),
    }


def shared_instructions(*, is_async: bool) -> Facts:
    """Four new programs wait for one that runs; all five begin alike."""
    facts: Facts = {}
    for name, settings in (("with", {"kvtier.tier": "off"}), ("without", None)):
        engine = Engine(EngineSpec(is_async=is_async, blocks=20, settings=settings))
        drive, tokens = Drive(engine), Tokens()
        instructions = tokens(160)
        lookups = _count_lookups(engine)
        drive.run(engine.request("before", instructions, 2))
        for i, n_tokens in enumerate((60, 5, 5, 5, 5)):
            prompt = [*instructions, *tokens(60)]
            request = engine.request(f"p{i}", prompt, n_tokens, session=f"S{i}")
            engine.scheduler.add_request(request)
        drive.step()
        lookups.clear()
        for _ in range(40):
            drive.step()
        facts[f"{name}_lookups"] = len(lookups)
        facts[f"{name}_running_and_waiting"] = engine.scheduler.get_request_counts()
        drive.run()
        facts[f"{name}_cached"] = [drive.cached_tokens[f"p{i}"] for i in range(5)]
        facts[f"{name}_output"] = [drive.output[f"p{i}"] for i in range(5)]
        if settings is not None:
            facts |= _clean(engine, drive)
    return facts


def _count_lookups(engine: Engine) -> list[Any]:
    """What vLLM looks up in its prefix cache from now on."""
    coordinator: Any = engine.scheduler.kv_cache_manager.coordinator
    look_up, seen = coordinator.find_longest_cache_hit, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return look_up(*args, **kwargs)

    coordinator.find_longest_cache_hit = counted
    return seen


ALL = [
    tenants,
    adapters,
    embeddings,
    streaming,
    sleep_abort,
    sleep_wait,
    sleep_keep,
    new_weights,
    unsupported,
    priorities,
    siblings,
    shared_instructions,
]
