"""Data parallel engines as `vllm serve --data-parallel-size` runs them: each rank a process, one front end."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY

from tests.engine.engine_harness import Turn, engine_arguments
from tests.engine.tier_probe import WAIT_S, await_clean, server_status

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path


START_WAIT_S = 240.0
"""For the LMCache server beside several engines that start, on a busy machine."""


class Replicas:
    """Ranks behind vLLM's `AsyncLLM`, which runs while something is asked of it.

    Args:
        model: Directory with the model.
        extra: kvtier's settings.
        n_ranks: Data parallel ranks.
    """

    def __init__(self, model: Path, extra: dict[str, Any], n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self.endpoint = f"ipc://{os.environ['KVTIER_RUN_DIR']}/kvtier.kvtier.sock"
        self.records: list[dict[str, Any]] = []
        self._n_requests = 0
        self._loop = asyncio.new_event_loop()
        self._llm = self._run(self._start(model, extra))

    async def _start(self, model: Path, extra: dict[str, Any]) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(model), data_parallel_size=self.n_ranks, **engine_arguments(extra)
            )
        )

    def turn(
        self,
        prompt: list[int],
        n_tokens: int = 12,
        *,
        rank: int,
        salt: str | None = None,
        **hints: Any,
    ) -> Turn:
        """A request to one rank, from start to end."""
        return self._run(self._turn(prompt, n_tokens, rank, salt, {"tool": "bash", **hints}))

    async def _turn(
        self, prompt: list[int], n_tokens: int, rank: int, salt: str | None, hints: dict[str, Any]
    ) -> Turn:
        from vllm import SamplingParams  # noqa: PLC0415

        self._n_requests += 1
        before = self.loaded_tokens(rank)
        sampling = SamplingParams(
            temperature=0,
            max_tokens=n_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            extra_args={"kv_transfer_params": {"kvtier": hints}},
        )
        inputs: dict[str, Any] = {"prompt_token_ids": prompt}
        if salt is not None:
            inputs["cache_salt"] = salt
        stream = self._llm.generate(
            inputs, sampling, f"r{self._n_requests}", data_parallel_rank=rank
        )
        output = [output async for output in stream][-1]
        one = output.outputs[0]
        logprobs = [step[t].logprob for t, step in zip(one.token_ids, one.logprobs, strict=True)]
        produced = list(one.token_ids)
        self.records.append({"prompt": prompt, "tokens": produced, "logprobs": logprobs})
        cached = output.num_cached_tokens or 0
        told = (output.kv_transfer_params or {}).get("kvtier", {})
        return Turn(prompt, produced, cached, int(self.loaded_tokens(rank) - before), told)

    def metric(self, name: str, rank: int, **labels: str) -> float:
        """A rank's value of one of kvtier's metrics; 0 where it has none yet."""
        wanted = {"engine": str(rank), **labels}
        return sum(
            sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name == f"vllm:kvtier_{name}" and wanted.items() <= sample.labels.items()
        )

    def loaded_tokens(self, rank: int) -> float:
        """Prompt tokens that a rank has loaded from the CPU tier."""
        return self.metric("prompt_tokens_total", rank, source="cpu")

    def await_tier(self, rank: int) -> None:
        """Send a rank short requests until it says that its CPU tier is ready."""
        deadline_s = time.monotonic() + START_WAIT_S
        while not self.metric("tier_ready", rank):
            assert time.monotonic() < deadline_s, f"rank {rank} has no CPU tier"
            self.turn([5, 6, 7], 2, rank=rank, pin=False, stage=False)
            # Ranks that never rest leave a server that starts beside them no processor.
            time.sleep(0.5)

    def chunks(self) -> int:
        """Chunks in the server, of all ranks' engines."""
        return server_status(self.endpoint).chunks

    def await_chunks(self, n_chunks: int) -> None:
        """Wait until the server holds so many chunks."""
        deadline_s = time.monotonic() + WAIT_S
        while (held := self.chunks()) != n_chunks:
            assert time.monotonic() < deadline_s, f"the server holds {held} chunks, not {n_chunks}"
            time.sleep(0.1)
        await_clean(self.endpoint)

    def evict(self) -> None:
        """Lose everything that is in the ranks' GPU memory."""
        assert self._run(self._llm.reset_prefix_cache())

    def settle(self) -> None:
        """Check that nothing is left in the server."""
        await_clean(self.endpoint)

    def close(self) -> None:
        """End the ranks in good order."""
        self._llm.shutdown()
        self._loop.close()

    def _run(self, what: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(what)
