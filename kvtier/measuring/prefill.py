"""Prefill times through a temporary engine: seconds for new tokens after cached ones, alone.

The engine is vLLM in this process, with the user's flags and `measuring.probe` as its connector.
"""

from __future__ import annotations

import importlib
import itertools
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvtier.calibration import CalibrationError, PrefillSample
from kvtier.measuring.probe import PASSIVE, REPORT_OPTION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

NEW_TOKENS: Final = tuple(64 << i for i in range(11))  # 64 to 65,536
CACHED_PARTS: Final = (0.0, 0.125, 0.5)
"""Of the longest context that fits."""
_ROUNDS: Final = 3
_MOST_CONTEXT_TOKENS: Final = 131_072


@dataclass(frozen=True)
class EngineLimits:
    """What the temporary engine can take.

    Attributes:
        context_tokens: of one request: the model's limit, or what the KV cache holds.
        step_tokens: of one step. A prefill within it is one step, as the cost model sees it.
        block_tokens: of one KV block.
        vocabulary: token ids.
    """

    context_tokens: int
    step_tokens: int
    block_tokens: int
    vocabulary: int


def grid(limits: EngineLimits) -> list[tuple[int, int]]:
    """Pairs of cached and new tokens, the cheapest first."""
    longest = min(limits.context_tokens, _MOST_CONTEXT_TOKENS) - limits.block_tokens
    pairs = set()
    for part, new in itertools.product(CACHED_PARTS, NEW_TOKENS):
        cached = int(longest * part) // limits.block_tokens * limits.block_tokens
        if new <= limits.step_tokens and cached + new <= longest:
            pairs.add((cached, new))
    return sorted(pairs, key=lambda pair: pair[1] * (pair[0] + pair[1]))


class TemporaryEngine:
    """vLLM with the user's flags; one at a time in a process.

    Attributes:
        profile: file of the profile that its worker measured and saved.
        limits: see `EngineLimits`.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Start it with the flags of ``vllm serve``; those of the server alone are ignored.

        Raises:
            CalibrationError: the flags are wrong, or kvtier cannot copy this model's KV.
        """
        arguments = importlib.import_module("vllm.engine.arg_utils")
        parsers = importlib.import_module("vllm.utils.argparse_utils")
        parser = arguments.EngineArgs.add_cli_args(parsers.FlexibleArgumentParser())
        with tempfile.TemporaryDirectory(prefix="kvtier-") as directory:
            report = Path(directory) / "report.json"
            transfer = {
                "kv_connector": "ProbeConnector",
                "kv_connector_module_path": "kvtier.measuring.probe",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {**PASSIVE, REPORT_OPTION: str(report)},
            }
            try:
                parsed, _ = parser.parse_known_args(
                    [*words, "--kv-transfer-config", json.dumps(transfer)]
                )
            except SystemExit as error:
                raise CalibrationError("vLLM does not accept these flags") from error
            options = arguments.EngineArgs.from_cli_args(parsed)
            options.async_scheduling = False
            options.disable_log_stats = True
            vllm = importlib.import_module("vllm")
            self._engine = vllm.LLMEngine.from_engine_args(options)
            self._one_token = vllm.SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
            if not report.is_file():
                raise CalibrationError(
                    "the engine measured no link: prefix caching is off, or kvtier cannot copy this "
                    "model's KV; the lines above say which"
                )
            self.profile = Path(json.loads(report.read_text(encoding="utf-8"))["profile"])
        self.limits = _limits(self._engine.vllm_config)
        self._count = 0

    def prefill_s(self, prompt: Sequence[int]) -> tuple[float, int]:
        """Seconds until the first token of a prompt, and how many of its tokens were cached."""
        self._count += 1
        engine, request = self._engine, {"prompt_token_ids": list(prompt)}
        engine.add_request(f"calibration-{self._count}", request, self._one_token)
        cached = 0
        started_s = time.perf_counter()
        while engine.has_unfinished_requests():
            for output in engine.step():
                cached = output.num_cached_tokens or 0
        return time.perf_counter() - started_s, cached


def _limits(config: Any) -> EngineLimits:
    cache, model = config.cache_config, config.model_config
    # One block is vLLM's own, one is left for the token that is sampled.
    held = (int(cache.num_gpu_blocks) - 2) * int(cache.block_size)
    return EngineLimits(
        context_tokens=min(int(model.max_model_len) - 1, held),
        step_tokens=int(config.scheduler_config.max_num_batched_tokens),
        block_tokens=int(cache.block_size),
        vocabulary=int(model.get_vocab_size()),
    )


def measure_prefill(
    limits: EngineLimits,
    prefill_s: Callable[[Sequence[int]], tuple[float, int]],
    *,
    budget_s: float,
    told: Callable[[int, int, float | None], None] = lambda *_: None,
) -> list[PrefillSample]:
    """Measure the pairs of `grid`, cheapest first, as long as the budget lasts.

    Args:
        limits: of the engine.
        prefill_s: see `TemporaryEngine.prefill_s`.
        budget_s: seconds; what would exceed them, by what was measured so far, is left out.
        told: called with cached tokens, new tokens and seconds, which are None before the measurement.
    """
    tokens = _tokens(limits.vocabulary)
    started_s = time.perf_counter()
    prefill_s(list(itertools.islice(tokens, limits.block_tokens)))  # the first request warms up
    samples: list[PrefillSample] = []
    per_product_s = 0.0
    for cached, new in grid(limits):
        # Filling the cache costs a prefill of its own.
        products = _ROUNDS * new * (cached + new) + cached * cached
        if time.perf_counter() - started_s + products * per_product_s > budget_s:
            break
        told(cached, new, None)
        prefix = list(itertools.islice(tokens, cached))
        if cached:
            prefill_s(prefix)
        times = []
        for _ in range(_ROUNDS):
            seconds, hit = prefill_s([*prefix, *itertools.islice(tokens, new)])
            if hit == cached:
                times.append(seconds)
        if times:
            seconds = statistics.median(times)
            samples.append(PrefillSample(cached, new, seconds))
            # Long prefills grow with the product, short ones cost less than it says.
            per_product_s = seconds / (new * (cached + new))
            told(cached, new, seconds)
    return samples


def _tokens(vocabulary: int) -> Iterator[int]:
    """Token ids that never repeat for long, the same in every run."""
    chance = random.Random(0)  # noqa: S311 - prompts, not secrets
    while True:
        yield chance.randrange(vocabulary // 10, vocabulary)
