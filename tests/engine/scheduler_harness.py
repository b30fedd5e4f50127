"""vLLM's real scheduler, KV cache manager and block pool, driven without a model or a GPU.

`Engine` builds them from a tiny configuration, `Drive` runs steps in virtual time: it samples
tokens by a fixed rule, plays the workers' part for the connector, and counts. Works on vLLM 0.30
to 0.33, with the synchronous and the asynchronous scheduler.

Nothing is computed, but the KV cache is tracked symbolically: what a block would hold is a hash
chain over the tokens, so a block that was overwritten while somebody still counts on it is found.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvtier import assembly
from kvtier.scheduler import ProgramScheduler
from tests.engine.copy_worker import CopyWorker
from tests.engine.engine_spec import BLOCK_TOKENS, VOCABULARY, engine_config, kv_cache_config
from tests.engine.symbolic_kv import SymbolicKV

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm.lora.request import LoRARequest

    from kvtier.backend import TierBackend
    from kvtier.control.link import EngineLink
    from kvtier.scheduler_half import SchedulerHalf
    from tests.engine.copy_worker import Fate
    from tests.engine.engine_spec import EngineSpec

STEP_S = 0.02
MAX_STEPS = 3000
Work = tuple[Request, "list[int]", int, int]
"""A request, its blocks, and the tokens [start, end) that a step computes for it."""


@dataclass(slots=True)
class VirtualClock:
    """Seconds that pass only when told to."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Engine:
    """A scheduler with its connector.

    Attributes:
        scheduler: vLLM's `Scheduler` or `AsyncScheduler`, or kvtier's class of either.
        clock: The clock that the connector's scheduler half reads.
    """

    def __init__(
        self, spec: EngineSpec, tier: TierBackend | None = None, link: EngineLink | None = None
    ) -> None:
        self.spec = spec
        self.clock = VirtualClock()
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        config = engine_config(spec)
        with _injected(self.clock, tier, link):
            self.scheduler: Any = _scheduler_class(spec)(
                vllm_config=config,
                kv_cache_config=kv_cache_config(spec),
                structured_output_manager=StructuredOutputManager(config),
                block_size=BLOCK_TOKENS,
                log_stats=True,
            )
        # vLLM refuses to be configured so without Triton, which the scheduler does not need.
        self.scheduler.use_v2_model_runner = spec.runner_v2

    @property
    def connector(self) -> Any:
        """The `KVTierConnector`, None without one."""
        return self.scheduler.connector

    @property
    def half(self) -> SchedulerHalf:
        """kvtier's scheduler half."""
        half: SchedulerHalf | None = self.connector.scheduler_half
        assert half is not None, "kvtier is off in this engine: see the log"
        return half

    @property
    def pool(self) -> Any:
        """vLLM's block pool."""
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def free_blocks(self) -> int:
        """Blocks that an allocation may take."""
        return int(self.pool.get_num_free_blocks())

    @property
    def pinned_keys(self) -> set[str]:
        """Ids of the requests whose turn is pinned."""
        return {pin.key for pin in self.half.pins.pins()}

    def releases(self, cause: str) -> int:
        """Pins that have ended for `cause`."""
        return int(self.half.stats.totals.get(f"pin_releases|{cause}", 0))

    def request(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        session: str | None = None,
        kvtier: dict[str, Any] | None = None,
        hasher: Callable[[Request], list[Any]] | None = None,
        salt: str | None = None,
        adapter: LoRARequest | None = None,
        stop: Sequence[int] = (),
        **fields: Any,
    ) -> Request:
        """A request as vLLM's front end would hand it to the scheduler.

        Args:
            request_id: Unique.
            prompt: Token ids.
            max_tokens: Output tokens; it samples exactly as many.
            session: What the client sends as session id.
            kvtier: Its hints, `kv_transfer_params["kvtier"]`.
            hasher: Returns the hashes of the blocks that are full since the last call; default is
                vLLM's.
            salt: vLLM's `cache_salt`.
            adapter: Whose KV it computes.
            stop: Tokens that end it before `max_tokens`.
            fields: More of vLLM's `Request`: its priority, prompt embeddings...
        """
        params = {"kv_transfer_params": {"kvtier": kvtier}} if kvtier is not None else None
        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            extra_args=params,
            stop_token_ids=list(stop),
        )
        return Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=self.clock.now_s,
            session_id=session,
            block_hasher=hasher or self._hasher,
            **({"cache_salt": salt, "lora_request": adapter} | fields),
        )

    def references(self) -> Counter[int]:
        """Holders of each block that somebody names: requests, deferred frees, pins and holds."""
        named: Counter[int] = Counter()
        for manager in self.scheduler.kv_cache_manager.coordinator.single_type_managers:
            for blocks in manager.req_to_blocks.values():
                named.update(b.block_id for b in blocks if not b.is_null)
        for _, blocks in self.scheduler.deferred_frees:
            named.update(b.block_id for b in blocks if not b.is_null)
        if self.connector is not None and self.connector.scheduler_half is not None:
            for block_ids in self.half.pins.references():
                named.update(block_ids.tolist())
        return named

    def check(self) -> None:
        """Every reference on a block has a holder, and the free count is that of the free blocks."""
        blocks = [b for b in self.pool.blocks if not b.is_null]
        counted = {b.block_id: b.ref_cnt for b in blocks if b.ref_cnt}
        named = self.references()
        assert counted == named, (
            f"references {counted}, but named are {dict(named)}: {_differences(counted, named)}"
        )
        free = len(blocks) - len(counted)
        assert free == self.free_blocks, f"{free} free blocks, the pool says {self.free_blocks}"
        if self.connector is not None and self.connector.scheduler_half is not None:
            pins = self.half.pins
            distinct = {b for pin in pins.pins() for b in pin.block_ids.tolist()}
            told, budget = pins.pinned_blocks, pins.budget_blocks
            assert told == len(distinct) <= budget, f"{told} of {budget} blocks are pinned"


class Drive:
    """Runs an engine's steps and counts.

    Args:
        engine: The engine.
        fate: Called with each of the connector's copy orders, in the order of their submission;
            default is done at once, successfully. Ends may come in any order.
        track_kv: False saves time: blocks' contents are then not checked.
        late: A step computes when its output is due, not when it is scheduled: copies overtake it.

    Attributes:
        kv: What every block would hold.
        steps: Calls of `schedule()`.
        preemptions: Preempted requests, counted once for each time.
        output: Tokens sampled, by request.
        cached_tokens: Prompt tokens found in the prefix cache (or loaded), by request.
        first_step: Step in which a request was first scheduled.
        preempted_beside_pins: Preemptions after which pins still kept blocks that nobody else held.
        step_s: How long a step takes.
        worst_idle_run: Longest run of steps that scheduled nothing although requests waited, while
            no step and no copy was under way whose end they might have waited for.
    """

    def __init__(
        self,
        engine: Engine,
        fate: Callable[[Any], Fate] | None = None,
        *,
        track_kv: bool = True,
        late: bool = False,
    ) -> None:
        self.engine = engine
        # A sliding window gives blocks back that its requests have not lost.
        self._track_kv = track_kv and engine.spec.sliding_window is None
        self.kv = SymbolicKV(BLOCK_TOKENS, token_at)
        self.steps = 0
        self.preemptions = 0
        self.preempted_beside_pins = 0
        self.output: dict[str, list[int]] = {}
        self.cached_tokens: dict[str, int] = {}
        self.first_step: dict[str, int] = {}
        self.step_s = STEP_S
        self.worst_idle_run = 0
        self.worker = CopyWorker(self.kv if self._track_kv else None, fate or (lambda _: (0, True)))
        self._idle_run = 0
        self._late = late
        # Steps whose output is due, and what they are still to compute.
        self._in_flight: deque[tuple[Any, Any, list[Work]]] = deque()
        self._depth = 2 if engine.spec.is_async else 1

    # -- steps -------------------------------------------------------------------------------------

    def step(self) -> None:
        """Schedule one step, and take the output of the step that is then due."""
        scheduler = self.engine.scheduler
        if scheduler.has_requests():
            scheduled = scheduler.schedule()
            self.steps += 1
            self._note_preemptions(len(scheduled.preempted_req_ids or ()))
            self._note_idle(scheduled)
            output, work = self._execute(scheduled)
            if not self._late:
                self._compute(work)
                work = []
            self._in_flight.append((scheduled, output, work))
            if len(self._in_flight) < self._depth and scheduler.has_unfinished_requests():
                return
        self.engine.clock.now_s += self.step_s
        if self._in_flight:
            self._take_output(*self._in_flight.popleft())

    def run(self, *requests: Request, max_steps: int = MAX_STEPS) -> Drive:
        """Add requests and run until nothing is left to do.

        Raises:
            AssertionError: Requests are unfinished after `max_steps` steps.
        """
        for request in requests:
            self.engine.scheduler.add_request(request)
        for _ in range(max_steps):
            if not self.busy:
                return self
            self.step()
        raise AssertionError(f"unfinished after {max_steps} steps: {self._waiting_ids()}")

    def drain(self) -> None:
        """Take the outputs of all steps in flight."""
        while self._in_flight:
            self._take_output(*self._in_flight.popleft())

    def abort(self, request_id: str) -> None:
        """The client has gone away."""
        self.engine.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    @property
    def busy(self) -> bool:
        """Whether requests are unfinished, steps in flight, or the connector wants steps."""
        scheduler = self.engine.scheduler
        return bool(scheduler.has_requests() or self._in_flight)

    def text(self, request: Request) -> list[int]:
        """Prompt and output of a finished request."""
        return [*request.prompt_token_ids, *self.output[request.request_id]]

    def forget(self, request_id: str) -> None:
        """Remember nothing of a finished request."""
        for told in (self.output, self.cached_tokens, self.first_step):
            told.pop(request_id, None)
        self.kv.forget(request_id)

    # -- internals ---------------------------------------------------------------------------------

    def computes(self, request_id: str) -> bool:
        """Whether a step of this name is under way: vLLM would take its output for a new request's."""
        return any(request_id in step.num_scheduled_tokens for step, *_ in self._in_flight)

    def _execute(self, scheduled: Any) -> tuple[Any, list[Work]]:
        """What the workers would do in this step: its output, and what is to be computed."""
        computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        known = scheduled.scheduled_cached_reqs
        computed.update(zip(known.req_ids, known.num_computed_tokens, strict=True))
        metadata = scheduled.kv_connector_metadata
        self.worker.submit(metadata)
        ids = list(scheduled.num_scheduled_tokens)
        sampled, work = [], []
        for request_id in ids:
            self.first_step.setdefault(request_id, self.steps)
            request = self.engine.scheduler.requests[request_id]
            end = computed[request_id] + scheduled.num_scheduled_tokens[request_id]
            if self._track_kv:
                blocks = self.engine.scheduler.kv_cache_manager.get_block_ids(request_id)[0]
                work.append((request, blocks, computed[request_id], end))
            sampled.append([] if request.is_prefill_chunk else [token_at(request_id, end)])
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=self.worker.collect(),
        )
        return output, work

    def _compute(self, work: list[Work]) -> None:
        for request, blocks, start, end in work:
            self.kv.compute(request, blocks, start, end)

    def _take_output(self, scheduled: Any, output: Any, work: list[Work]) -> None:
        self._compute(work)
        for outputs in self.engine.scheduler.update_from_output(scheduled, output).values():
            for one in outputs.outputs:
                self.output.setdefault(one.request_id, []).extend(one.new_token_ids)
                if one.prefill_stats is not None:
                    self.cached_tokens[one.request_id] = one.prefill_stats.num_cached_tokens

    def _note_preemptions(self, n_preempted: int) -> None:
        if not n_preempted:
            return
        self.preemptions += n_preempted
        if self.engine.connector is not None:
            pins = self.engine.half.pins
            if pins.reclaimable_blocks():
                self.preempted_beside_pins += n_preempted

    def _note_idle(self, scheduled: Any) -> None:
        waits = self.engine.scheduler.has_unfinished_requests()
        computing = any(before.total_num_scheduled_tokens for before, *_ in self._in_flight)
        if scheduled.total_num_scheduled_tokens or computing or self.worker.busy or not waits:
            self._idle_run = 0
            return
        self._idle_run += 1
        self.worst_idle_run = max(self.worst_idle_run, self._idle_run)

    def _waiting_ids(self) -> dict[str, str]:
        requests = self.engine.scheduler.requests
        return {request_id: str(request.status) for request_id, request in requests.items()}


def _scheduler_class(spec: EngineSpec) -> type[Scheduler]:
    if spec.by_program:
        return ProgramScheduler
    return AsyncScheduler if spec.is_async else Scheduler


def _differences(counted: dict[int, int], named: dict[int, int]) -> dict[int, int]:
    both = counted.keys() | named.keys()
    found = {block: counted.get(block, 0) - named.get(block, 0) for block in both}
    return {block: more for block, more in found.items() if more}


def token_at(request_id: str, position: int) -> int:
    """The token that a request samples at a position; the same after a preemption."""
    return zlib.crc32(f"{request_id}:{position}".encode()) % (VOCABULARY - 100) + 50


@contextlib.contextmanager
def _injected(
    clock: VirtualClock, tier: TierBackend | None, link: EngineLink | None
) -> Iterator[None]:
    """Give kvtier's scheduler half the virtual clock, and tier and link if there are any."""
    build = functools.partial(assembly.build_scheduler_half, clock=clock, tier=tier, link=link)
    with mock.patch.object(assembly, "build_scheduler_half", build):
        yield
