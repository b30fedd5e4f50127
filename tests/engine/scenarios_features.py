"""What vLLM can do besides greedy text, on a healthy tier: adapters, drafts, grammars, siblings, pauses."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.engine.engine_harness import BLOCK_TOKENS, readable, tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.engine.engine_harness import Engine, Turn

FOREVER_S = 600.0
DIGITS = range(3, 13)


def ready(engine: Engine) -> str:
    """Wait for the tier; its generation."""
    engine.await_tier()
    return str(engine.half.tier.region.generation)


def _recomputed(engine: Engine, prompt: list[int], n_tokens: int = 12, **options: Any) -> Turn:
    """The turn as this engine computes it from nothing."""
    engine.evict()
    engine.set_policy(reload="never")
    turn = engine.turn(prompt, n_tokens, pin=False, stage=False, **options)
    assert (turn.cpu, turn.cached) == (0, 0)
    engine.evict()
    engine.set_policy(reload="always")
    return turn


def adapters(engine: Engine, paths: dict[str, str]) -> None:
    """Two LoRA adapters and the model without one: the same prompt, and nobody reads another's KV."""
    from vllm.lora.request import LoRARequest  # noqa: PLC0415

    engine.set_policy(reload="always")
    loras = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(paths.items(), 1)}
    first = engine.staged_turn("lora", lora=loras["a"])
    prompt = first.then(tokens("lora2", 50))
    wanted = {n: _recomputed(engine, prompt, lora=loras.get(n)).tokens for n in ("a", "b", "")}
    assert len({tuple(produced) for produced in wanted.values()}) == 3, "adapters change nothing"
    for name in ("b", ""):
        other = engine.turn(prompt, program="lora", lora=loras.get(name), pin=False, stage=False)
        assert (other.cpu, other.cached) == (0, 0)
        assert other.tokens == wanted[name]
    own = engine.turn(prompt, program="lora", lora=loras["a"])
    assert own.cpu == readable(711)
    assert own.tokens == wanted["a"]


@contextmanager
def _draft_tokens(engine: Engine) -> Iterator[Counter[str]]:
    """Count, while the block runs, the steps that decode and the draft tokens in them."""
    seen: Counter[str] = Counter()
    schedule = engine.scheduler.schedule

    def watched(*args: Any) -> Any:
        output = schedule(*args)
        seen["steps"] += bool(output.total_num_scheduled_tokens)
        seen["drafts"] += sum(map(len, output.scheduled_spec_decode_tokens.values()))
        return output

    engine.scheduler.schedule = watched
    try:
        yield seen
    finally:
        engine.scheduler.schedule = schedule


def drafts(engine: Engine) -> None:
    """Speculative decoding by n-grams, after a pin and after a reload: most drafts are refused."""
    engine.set_policy(reload="always")
    engine.await_tier()
    with _draft_tokens(engine) as seen:
        first = engine.turn(tokens("drafts", 700), 60, program="drafts", ttl_s=FOREVER_S)
        n_reusable = len(engine.pins_of("drafts")[0].block_ids)
        # The last token sampled has no KV, and drafts that were refused leave none that counts.
        assert n_reusable == (700 + 60 - 1) // BLOCK_TOKENS
        prompt = first.then(tokens("drafts2", 50))
        second = engine.turn(prompt, 60, program="drafts", ttl_s=FOREVER_S)
        assert second.cached == n_reusable * BLOCK_TOKENS
        engine.evict()
        third = engine.turn(second.then(tokens("drafts3", 50)), 60, program="drafts")
        assert third.cpu == readable(len(second.prompt) + len(second.tokens))
    assert seen["drafts"]


def grammar(engine: Engine) -> None:
    """Structured output: only digits may be said, drafts of them are taken, on KV that was reloaded."""
    from vllm.sampling_params import StructuredOutputsParams  # noqa: PLC0415

    def digits() -> dict[str, Any]:
        return {"structured_outputs": StructuredOutputsParams(regex="[0-9]{100}")}

    first = engine.staged_turn("grammar", sampling=digits())
    assert set(first.tokens) <= set(DIGITS)
    prompt = first.then(tokens("grammar2", 50))
    wanted = _recomputed(engine, prompt, n_tokens=80, sampling=digits())
    with _draft_tokens(engine) as seen:
        second = engine.turn(prompt, 80, program="grammar", sampling=digits(), ttl_s=FOREVER_S)
    assert second.cpu == readable(711)
    assert second.tokens == wanted.tokens
    assert set(second.tokens) <= set(DIGITS)
    assert seen["drafts"]
    assert seen["steps"] < 80, "no draft was taken"


def siblings(engine: Engine) -> None:
    """`n=3`: three texts for one prompt, of which one goes on."""
    chance = {"n": 3, "temperature": 1.0, "seed": 7}
    first = engine.turn(tokens("n", 400), program="n", sampling=chance, ttl_s=FOREVER_S)
    assert len(engine.pins_of("n")) == 3
    engine.flood()
    second = engine.turn(first.then(tokens("n2", 50)), program="n")
    assert second.cached == 411 // BLOCK_TOKENS * BLOCK_TOKENS


def pause_and_resume(engine: Engine) -> None:
    """`pause_generation` with and without clearing caches, while one program is pinned and one runs."""
    engine.set_policy(reload="always")
    core = engine.core.engine_core.engine_core
    first = engine.staged_turn("paused", ttl_s=FOREVER_S)
    request_id = engine.start(tokens("runs", 200), 20, program="runs")
    engine.step_until(lambda: engine.produced(request_id), "first token")
    core.pause_scheduler("keep", clear_cache=False)
    assert not engine.scheduler.has_unfinished_requests()
    assert engine.pins_of("paused")
    core.resume_scheduler()
    engine.finish(request_id)
    engine.drain()
    # With its caches cleared the engine may have other weights: what was kept is not read any more.
    core.pause_scheduler("abort", clear_cache=True)
    assert not engine.pins_of("paused")
    assert engine.block_pool.get_num_free_blocks() == engine.free_blocks
    core.resume_scheduler()
    second = engine.turn(first.then(tokens("paused2", 50)), program="paused")
    assert (second.cpu, second.cached) == (0, 0)
