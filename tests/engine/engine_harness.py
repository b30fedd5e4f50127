"""A real vLLM engine on CPU in this process, with or without kvtier, and what tests look at in it."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.engine.held_copies import HeldCopies
from tests.engine.patience import be_patient
from tests.engine.tier_probe import WAIT_S, await_clean
from tests.engine.tiny_model import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

BLOCK_TOKENS = 32
CHUNK_TOKENS = 64
BATCH_TOKENS = 512
MAX_MODEL_TOKENS = 2048


def prepare_process() -> None:
    """Set what vLLM reads from the environment; call it before vLLM is imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
    )
    logging.basicConfig(level=logging.INFO)


def engine_arguments(
    extra: dict[str, Any] | None, *, dtype: str = "float32", n_blocks: int = 140
) -> dict[str, Any]:
    """vLLM's arguments of an engine with these settings of kvtier; None for plain vLLM."""
    from vllm.config import KVTransferConfig  # noqa: PLC0415

    transfer = None
    if extra is not None:
        transfer = KVTransferConfig(
            kv_connector="KVTierConnector",
            kv_connector_module_path="kvtier.connector",
            kv_role="kv_both",
            kv_connector_extra_config={f"kvtier.{k}": v for k, v in extra.items()},
        )
    return {
        "dtype": dtype,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": MAX_MODEL_TOKENS,
        "block_size": BLOCK_TOKENS,
        # Plain vLLM computes every prompt from nothing: it is the truth that kvtier is held to.
        "enable_prefix_caching": extra is not None,
        "max_num_batched_tokens": BATCH_TOKENS,
        "num_gpu_blocks_override": n_blocks,
        "max_num_seqs": 8,
        "disable_hybrid_kv_cache_manager": False,
        "kv_transfer_config": transfer,
    }


def tokens(seed: str, n: int) -> list[int]:
    """`n` random token ids, the same for the same seed."""
    chance = random.Random(seed)
    return [chance.randrange(3, VOCABULARY) for _ in range(n)]


def readable(n_prompt_tokens: int) -> int:
    """Tokens that can be loaded for a prompt of this length: its last token is always computed."""
    return (n_prompt_tokens - 1) // CHUNK_TOKENS * CHUNK_TOKENS


@dataclass(frozen=True)
class Turn:
    """A request that ended; `cpu` and `recomputed` count prompt tokens by where their KV came from."""

    prompt: list[int]
    tokens: list[int]
    cached: int
    cpu: int
    told: dict[str, Any]

    def then(self, more: Sequence[int]) -> list[int]:
        """The prompt of the program's next turn."""
        return [*self.prompt, *self.tokens, *more]


class Engine:
    """An engine and its kvtier halves.

    Args:
        model: Directory with the model.
        extra: kvtier's settings; None for plain vLLM.
        n_blocks: GPU blocks.
        dtype: Of weights and KV.
        options: More arguments of vLLM's `LLM`.
    """

    def __init__(
        self,
        model: Path,
        extra: dict[str, Any] | None,
        *,
        n_blocks: int = 140,
        dtype: str = "float32",
        options: dict[str, Any] | None = None,
    ) -> None:
        from vllm import LLM  # noqa: PLC0415

        arguments = engine_arguments(extra, dtype=dtype, n_blocks=n_blocks)
        self.llm = LLM(str(model), **arguments | (options or {}))
        self.core = self.llm.llm_engine
        self.scheduler = self.core.engine_core.engine_core.scheduler
        self.block_pool = self.scheduler.kv_cache_manager.block_pool
        self.free_blocks = self.block_pool.get_num_free_blocks()
        self.records: list[dict[str, Any]] = []
        self.outputs: dict[str, Any] = {}
        self._prompts: dict[str, list[int]] = {}
        self._unlike_plain: set[str] = set()
        self._n_requests = 0
        if extra is not None:
            self.connector = self.scheduler.connector
            self.half = self.connector.scheduler_half
            assert self.half is not None, "kvtier is passive"
            self._config = self.half.policy.config
            self._admission = self.half.admission.config
            self.make_recompute_dear(self.half)
            be_patient(self.half)

    @staticmethod
    def make_recompute_dear(half: Any) -> None:
        """Let the cost model believe in a large model, so that it pins, stages and reloads this one."""
        from kvtier.costs.estimators import PrefillEstimator, PrefillModel  # noqa: PLC0415

        facts = half.facts
        slow = PrefillModel.from_flops(10**9, facts.n_layers, facts.attention_width, 1e10)
        half.policy.prefill = PrefillEstimator(slow)
        half.policy.prefill.observe = lambda *_: None

    def close(self) -> None:
        """End the engine in good order."""
        self.core.engine_core.shutdown()

    # -- requests ----------------------------------------------------------------------------------

    def start(
        self,
        prompt: list[int],
        n_tokens: int = 12,
        *,
        program: str | None = None,
        salt: str | None = None,
        params: Any = None,
        sampling: dict[str, Any] | None = None,
        lora: Any = None,
        **hints: Any,
    ) -> str:
        """Add a request; returns its id.

        Args:
            prompt: Token ids.
            n_tokens: Output tokens; it samples exactly as many.
            program: Hint of the program's name.
            salt: Its tenant.
            params: Replaces the whole of kv_transfer_params.
            sampling: More of vLLM's `SamplingParams`. Not compared with plain vLLM if they change tokens.
            lora: vLLM's `LoRARequest`; likewise.
            hints: More hints to kvtier.
        """
        from vllm import SamplingParams  # noqa: PLC0415

        if params is None and (program is not None or hints):
            params = {"kvtier": {"program": program, "tool": "bash", **hints}}
        self._n_requests += 1
        request_id = f"r{self._n_requests}"
        self._prompts[request_id] = prompt
        chosen: dict[str, Any] = {
            "temperature": 0,
            "max_tokens": n_tokens,
            "ignore_eos": True,
            "detokenize": False,
            "logprobs": 0,
            "extra_args": None if params is None else {"kv_transfer_params": params},
        }
        inputs: dict[str, Any] = {"prompt_token_ids": prompt}
        if salt is not None:
            inputs["cache_salt"] = salt
        parameters = SamplingParams(**chosen | (sampling or {}))
        if lora is not None or parameters.structured_outputs or parameters.temperature:
            self._unlike_plain.add(request_id)
        self.core.add_request(request_id, inputs, parameters, lora_request=lora)
        return request_id

    def step(self) -> None:
        """One engine step; keeps what it produced."""
        for output in self.core.step():
            self.outputs[output.request_id] = output

    def step_until(self, condition: Callable[[], Any], what: str) -> None:
        """Step until `condition()` holds."""
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s, f"{what}: not within {WAIT_S:g} s"
            self.step()

    def finish(self, request_id: str) -> Turn:
        """Step until the request has ended; its tokens will be compared with plain vLLM's."""
        before = self.count("prompt_tokens|cpu")
        self.step_until(lambda: self.ended(request_id), f"end of {request_id}")
        output = self.outputs.pop(request_id)
        prompt = self._prompts.pop(request_id)
        for one in () if request_id in self._unlike_plain else output.outputs:
            logprobs = [
                step[t].logprob for t, step in zip(one.token_ids, one.logprobs, strict=True)
            ]
            record = {"prompt": prompt, "tokens": list(one.token_ids), "logprobs": logprobs}
            self.records.append(record)
        produced = list(output.outputs[0].token_ids)
        told = (output.kv_transfer_params or {}).get("kvtier", {})
        cpu = int(self.count("prompt_tokens|cpu") - before)
        return Turn(prompt, produced, output.num_cached_tokens or 0, cpu, told)

    def ended(self, request_id: str) -> bool:
        """Whether the request's last output is there."""
        return request_id in self.outputs and self.outputs[request_id].finished

    def produced(self, request_id: str) -> int:
        """Tokens that the request has generated so far."""
        output = self.outputs.get(request_id)
        return len(output.outputs[0].token_ids) if output is not None else 0

    def request(self, request_id: str) -> Any:
        """vLLM's request object, whose id carries a suffix."""
        return next(
            r
            for k, r in self.scheduler.requests.items()
            if k == request_id or k.startswith(f"{request_id}-")
        )

    def staged_turn(self, name: str, n_tokens: int = 700, **options: Any) -> Turn:
        """The first turn of program `name`, confirmed by the tier as far as it can be staged."""
        self.await_tier()
        turn = self.turn(tokens(name, n_tokens), program=name, **options)
        self.drain()
        handle = self.handle(name, options.get("salt"))
        reusable = (n_tokens + len(turn.tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert self.half.stager.copies._staged[handle].n_chunks == reusable // CHUNK_TOKENS
        return turn

    def turn(self, prompt: list[int], n_tokens: int = 12, **options: Any) -> Turn:
        """A request from start to end, alone."""
        return self.finish(self.start(prompt, n_tokens, **options))

    def abort(self, request_id: str) -> None:
        """The client goes away."""
        self.core.abort_request([request_id])
        self._prompts.pop(request_id, None)
        self.outputs.pop(request_id, None)

    # -- state -------------------------------------------------------------------------------------

    def count(self, key: str) -> float:
        """A counter's total; labels joined by `|`."""
        if not hasattr(self, "half"):
            return 0.0
        return float(self.half.stats.totals.get(key, 0))

    def failures(self) -> dict[str, float]:
        """Failures counted so far, by kind."""
        totals = self.half.stats.totals
        return {k.partition("|")[2]: v for k, v in totals.items() if k.startswith("failures|")}

    def handle(self, program: str, tenant: str | None = None) -> str:
        """kvtier's internal name of a named program."""
        from kvtier.programs import ProgramId  # noqa: PLC0415

        return str(self.half.facts.program_handle(ProgramId(tenant, "named", program)))

    def pins_of(self, program: str) -> list[Any]:
        """The program's pins."""
        return list(self.half.pins.of_program(self.handle(program)))

    def drain(self) -> None:
        """Step until nothing is being staged."""
        self.step_until(lambda: not self.half.has_work(), "staging")

    def evict(self) -> None:
        """Lose everything that is in GPU memory."""
        self.drain()
        assert self.scheduler.reset_prefix_cache()

    def flood(self, n: int = 6) -> None:
        """Other traffic that uses all GPU memory and keeps nothing."""
        for i in range(n):
            self.turn(tokens(f"flood{self._n_requests}-{i}", 900), 2, pin=False, stage=False)

    def set_policy(self, **changes: Any) -> None:
        """Change the operator's settings of the running policy; `settle` restores them."""
        self.half.policy.config = dataclasses.replace(self.half.policy.config, **changes)

    def admit_all(self) -> None:
        """Hold nobody back for the sake of earlier scenarios' programs; `settle` ends that."""
        self.half.admission.config = dataclasses.replace(self._admission, mode="off")

    @contextmanager
    def patient_lookups(self) -> Iterator[None]:
        """Wait within the step for the tier's answer, as long as a busy machine takes for it."""
        wait_s, self.half._lookup_wait_s = self.half._lookup_wait_s, WAIT_S
        try:
            yield
        finally:
            self.half._lookup_wait_s = wait_s

    @contextmanager
    def squeezed(self, n_free: int) -> Iterator[None]:
        """Leave `n_free` free blocks: as if other requests held the rest."""
        n_taken = self.block_pool.get_num_free_blocks() - n_free
        assert n_taken >= 0
        taken = self.block_pool.get_new_blocks(n_taken)
        try:
            yield
        finally:
            self.block_pool.free_blocks(taken)

    # -- tier --------------------------------------------------------------------------------------

    @property
    def worker(self) -> Any:
        """kvtier's worker half."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: PLC0415

        return get_kv_transfer_group().worker_half

    @property
    def copy_engine(self) -> Any:
        """The worker's copy engine, without what checks its copies."""
        engine = self.worker._pool._attached.engine
        return getattr(engine, "inner", engine)

    def await_tier(self, state: str = "ready") -> None:
        """Wait for the tier's state; hooks run as in an engine that is stepping."""
        deadline_s = time.monotonic() + WAIT_S
        while str(self.half.tier.state) != state:
            assert time.monotonic() < deadline_s, f"tier is {self.half.tier.state}, not {state}"
            self.half.housekeeping.run(time.monotonic())
            time.sleep(0.05)
        self.half.housekeeping.run(time.monotonic())

    @contextmanager
    def copies(self, direction: str, behaviour: Callable[[], None]) -> Iterator[None]:
        """Run `behaviour` in the copy thread before each copy in this direction."""
        engine = self.copy_engine
        kernel = engine._kernel

        def changed(*args: Any) -> Any:
            if bool(args[3]) == (direction == "load"):
                behaviour()
            return kernel(*args)

        engine._kernel = changed
        try:
            yield
        finally:
            engine._kernel = kernel

    @contextmanager
    def held_copies(self, direction: str) -> Iterator[HeldCopies]:
        """Copies in this direction wait until they are let go, at the latest when the block ends."""
        held = HeldCopies()
        with self.copies(direction, held.hold):
            try:
                yield held
            finally:
                held.set()

    def settle(self) -> None:
        """Check that nothing is left of a scenario: blocks, locks, reservations; then forget all."""
        self.half.policy.config = self._config
        self.half.admission.config = self._admission
        self.step_until(lambda: not self.core.has_unfinished_requests(), "unfinished requests")
        self.step_until(lambda: not self.half.has_work() and not self.half.reader.n_loads, "copies")
        assert self.connector.scheduler_half is self.half, "kvtier gave up"
        assert "internal" not in self.failures()
        assert not self.half._turns
        assert not self.half.reader._reads
        assert not self.half._waiting_tokens
        self.half.before_reset()
        assert self.half.pins.held_blocks == 0
        assert self.block_pool.get_num_free_blocks() == self.free_blocks
        assert self.scheduler.reset_prefix_cache()
        self.outputs.clear()
        if str(self.half.tier.state) == "ready":
            for program in list(self.half.stager.copies._staged):
                self.half.tier.drop(self.half.stager.copies.namespace, program)
                self.half.stager.forget(program)
            await_clean(self.half.tier._config.endpoint)
