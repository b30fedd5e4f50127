"""A replay of one policy: vLLM's scheduler, step by step, in virtual time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from kvtier.orders import Calibration
from kvtier.replay.agents import Agents, Chain
from kvtier.replay.link import Link
from kvtier.replay.machine import Scheduled, step_s
from kvtier.replay.virtual_tier import VirtualTier
from kvtier.replay.vllm_engine import EngineOptions, VirtualClock, make_scheduler
from kvtier.replay.worker import VirtualWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.replay.link import Direction
    from kvtier.replay.machine import Machine
    from kvtier.replay.policies import PolicySpec
    from kvtier.replay.workload import Program

MEMORY_INTERVAL_S: Final = 1.0
IDLE_TICK_S: Final = 0.02
"""When nothing can be computed although requests wait, time goes on until the next event, or by this."""
STALL_STEPS: Final = 200_000
"""Steps in a row that computed nothing, after which a replay is given up as stuck: over an hour."""
CHUNK_TOKENS: Final = 256
_PREFILL_POINTS: Final = ((0, 512), (0, 2048), (0, 8192), (8192, 2048), (32768, 2048))


class StuckError(RuntimeError):
    """Requests wait and nothing happens any more: a defect of the policy, with what it looked like."""


@dataclass(slots=True)
class TurnRecord:
    """What became of one request.

    Attributes:
        program: Whose it was.
        chain: Its chain's name: the program's, or a sub-agent's.
        index: Which turn of the chain.
        prompt_tokens: Its prompt.
        arrived_s: When it came.
        first_token_s: When its first token was there.
        ended_s: When it was over.
        gpu_tokens: Prompt tokens found in GPU memory.
        cpu_tokens: Prompt tokens loaded from the CPU tier.
    """

    program: str
    chain: str
    index: int
    prompt_tokens: int
    arrived_s: float
    first_token_s: float = 0.0
    ended_s: float = 0.0
    gpu_tokens: int = 0
    cpu_tokens: int = 0


@dataclass(frozen=True, slots=True)
class MemorySample:
    """GPU memory at one time, in blocks.

    Attributes:
        at_s: When.
        running: Blocks of requests that have been given theirs.
        pinned: Blocks that only pins, or copies, keep.
        cached: Blocks that nobody keeps but that still hold somebody's KV.
        free: The rest.
    """

    at_s: float
    running: int
    pinned: int
    cached: int
    free: int


@dataclass(slots=True)
class Replayed:
    """All that a replay has seen."""

    policy: str
    turns: list[TurnRecord]
    arrived_s: dict[str, float]
    ended_s: dict[str, float]
    steps: int = 0
    preemptions: int = 0
    busy_s: float = 0.0
    virtual_s: float = 0.0
    wall_s: float = 0.0
    link_busy_s: dict[Direction, float] = field(default_factory=dict)
    link_bytes: dict[Direction, int] = field(default_factory=dict)
    decision_us: list[float] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    memory: list[MemorySample] = field(default_factory=list)


class Simulation:
    """One policy on one workload and machine.

    Args:
        spec: The policy.
        machine: What it runs on.
        programs: The workload.
        concurrency: See `Agents`.
        progress: Called now and then with the number of programs that have ended.

    Attributes:
        agents: The workload under way.
        clock: Virtual time, from 0.
        link: To CPU memory.
        scheduler: vLLM's.
        tool_of: The tool that kvtier is told a turn calls.
        ends_with: Whether kvtier is told that a program ends with a turn.
    """

    def __init__(
        self,
        spec: PolicySpec,
        machine: Machine,
        programs: Sequence[Program],
        *,
        concurrency: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.spec = spec
        self.machine = machine
        self.programs = programs
        self.agents = Agents(programs, machine.block_tokens, concurrency)
        self.clock = VirtualClock()
        self.link = Link(machine.link_bytes_per_s, machine.link_latency_s)
        tier = None
        slot_bytes = CHUNK_TOKENS // machine.block_tokens * machine.block_bytes
        if spec.uses_tier and machine.dram_bytes >= slot_bytes:
            tier = VirtualTier(int(machine.dram_bytes // slot_bytes), slot_bytes)
        self.tier = tier
        settings = dict(spec.settings)
        if spec.uses_tier:
            settings["kvtier.chunk_tokens"] = CHUNK_TOKENS
            if tier is None:
                settings["kvtier.tier"] = "off"
        self.scheduler = make_scheduler(
            machine,
            EngineOptions(
                spec.connector,
                spec.connector_module,
                settings,
                spec.scheduler_class,
                spec.by_priority,
                _unbounded_blocks(programs, machine) if spec.unbounded else machine.gpu_blocks,
            ),
            max_context_tokens=_longest(programs) + machine.block_tokens,
            clock=self.clock,
            tier=tier,
        )
        self._worker = VirtualWorker(machine, self.link, _calibration(machine))
        self._progress = progress
        self._chains: dict[str, Chain] = {}
        self._outputs: dict[str, list[int]] = {}
        self._records: dict[str, TurnRecord] = {}
        self.tool_of: Callable[[Chain], str | None] = lambda chain: chain.turn.tool
        self.ends_with: Callable[[Chain], bool] = lambda _: False
        self._next_sample_s = 0.0
        self._result = Replayed(spec.name, [], self.agents.arrived_s, self.agents.ended_s)
        if spec.prepare is not None:
            spec.prepare(self)

    @property
    def half(self) -> Any:
        """The scheduler half of kvtier; None for others."""
        return getattr(self.scheduler.connector, "scheduler_half", None)

    def run(self) -> Replayed:
        """Replay until every program has ended.

        Raises:
            StuckError: Nothing happens any more.
        """
        began_s = time.perf_counter()
        if self.half is not None:
            self._time_decisions()
        idle_steps = told = 0
        while not self.agents.done:
            for at_s, chain in self.agents.due(self.clock.now_s):
                self._submit(chain, at_s)
            if not self.scheduler.has_requests():
                self.clock.now_s = min(self.agents.next_s, self.link.next_end_s)
                if self.clock.now_s == float("inf"):
                    raise StuckError(self._state())
                continue
            idle_steps = 0 if self._step() else idle_steps + 1
            if idle_steps > STALL_STEPS:
                raise StuckError(self._state())
            if self._progress is not None and len(self.agents.ended_s) != told:
                told = len(self.agents.ended_s)
                self._progress(told)
        return self._finish(time.perf_counter() - began_s)

    # -- steps -------------------------------------------------------------------------------------

    def _submit(self, chain: Chain, at_s: float) -> None:
        request_id, turn = chain.request_id, chain.turn
        prompt = chain.text.prompt(chain.index)
        hints: dict[str, object] = {}
        tool = self.tool_of(chain)
        if self.half is not None and tool is not None:
            # What the detector would find in the output.
            hints["tool"] = tool
        if self.ends_with(chain):
            hints["end"] = True
        params = {"kv_transfer_params": {"kvtier": hints}} if hints else None
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                temperature=0, max_tokens=turn.output_tokens, ignore_eos=True, extra_args=params
            ),
            pooling_params=None,
            arrival_time=at_s,
            session_id=chain.program.name,
            block_hasher=chain.text.hasher(chain.index),
        )
        self._chains[request_id] = chain
        self._outputs[request_id] = chain.text.outputs(chain.index)
        record = TurnRecord(chain.program.name, chain.name, chain.index, len(prompt), at_s)
        self._records[request_id] = record
        self.scheduler.add_request(request)

    def _step(self) -> bool:
        """Schedule and compute one step; False where it computed nothing."""
        scheduled = self.scheduler.schedule()
        self._result.steps += 1
        self._result.preemptions += len(scheduled.preempted_req_ids or ())
        if self.clock.now_s >= self._next_sample_s:
            self._sample_memory()
        self._worker.submit(scheduled.kv_connector_metadata, self.clock.now_s)
        ids, parts, sampled = self._computed(scheduled)
        if ids:
            seconds = step_s(self.machine, parts)
            self._result.busy_s += seconds
            self.clock.now_s += seconds
        else:
            next_s = min(self.agents.next_s, self.link.next_end_s)
            waited_s = max(next_s - self.clock.now_s, 1e-6)
            self.clock.now_s += min(waited_s, IDLE_TICK_S)
        output, copies = self._worker.collect(self.clock.now_s)
        connector = self.scheduler.connector
        if copies and connector is not None:
            connector.copies_ended(copies)
        outputs = self.scheduler.update_from_output(
            scheduled,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
                sampled_token_ids=sampled,
                kv_connector_output=output if connector is not None else None,
            ),
        )
        for engine_outputs in outputs.values():
            for one in engine_outputs.outputs:
                self._note(one)
        return bool(ids)

    def _sample_memory(self) -> None:
        manager = self.scheduler.kv_cache_manager
        pool, tables = manager.block_pool, manager.coordinator.single_type_managers[0].req_to_blocks
        total = pool.num_gpu_blocks - 1
        # Blocks that requests share are counted once: a table's are as many as the pool says at most.
        used = total - pool.get_num_free_blocks()
        running = min(used, sum(len(blocks) for blocks in tables.values()))
        cached = min(total - used, max(0, len(pool.cached_block_hash_to_block) - used))
        self._result.memory.append(
            MemorySample(self.clock.now_s, running, used - running, cached, total - used - cached)
        )
        self._next_sample_s = self.clock.now_s + MEMORY_INTERVAL_S

    def _computed(self, scheduled: Any) -> tuple[list[str], list[Scheduled], list[list[int]]]:
        """The step's requests, their parts of it, and the tokens that it samples."""
        cached = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        known = scheduled.scheduled_cached_reqs
        cached.update(zip(known.req_ids, known.num_computed_tokens, strict=True))
        ids: list[str] = []
        parts: list[Scheduled] = []
        sampled: list[list[int]] = []
        for request_id, n_tokens in scheduled.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            ids.append(request_id)
            parts.append(Scheduled(cached[request_id], n_tokens))
            if cached[request_id] + n_tokens < request.num_tokens:
                sampled.append([])
            else:
                sampled.append([self._outputs[request_id][request.num_output_tokens]])
        return ids, parts, sampled

    def _note(self, output: Any) -> None:
        record = self._records[output.request_id]
        if output.new_token_ids and not record.first_token_s:
            record.first_token_s = self.clock.now_s
        if output.prefill_stats is not None:
            stats = output.prefill_stats
            record.cpu_tokens = stats.num_external_cached_tokens
            record.gpu_tokens = stats.num_local_cached_tokens
        if output.finished:
            record.ended_s = self.clock.now_s
            self._result.turns.append(self._records.pop(output.request_id))
            del self._outputs[output.request_id]
            self.agents.turn_ended(self._chains.pop(output.request_id), self.clock.now_s)

    # -- the end -----------------------------------------------------------------------------------

    def _finish(self, wall_s: float) -> Replayed:
        result = self._result
        result.wall_s, result.virtual_s = wall_s, self.clock.now_s
        result.link_busy_s = dict(self.link.busy_s)
        result.link_bytes = dict(self.link.moved_bytes)
        if self.half is not None:
            result.counters = dict(self.half.stats.totals)
        if self.scheduler.connector is not None:
            self.scheduler.connector.shutdown()
        return result

    def _time_decisions(self) -> None:
        """Measure how long kvtier thinks: the one thing that takes real time here."""
        half, spent_us = self.half, self._result.decision_us

        def timed(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                began_s = time.perf_counter()
                try:
                    return method(*args, **kwargs)
                finally:
                    spent_us.append((time.perf_counter() - began_s) * 1e6)

            return call

        half.finished = timed(half.finished)

    def _state(self) -> str:
        waiting = [str(request_id) for request_id in list(self._records)[:5]]
        return (
            f"{self.spec.name} is stuck at {self.clock.now_s:.1f} s: {len(self._records)} requests wait "
            f"({', '.join(waiting)}...), {self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()} "
            f"blocks are free"
        )


def _longest(programs: Sequence[Program]) -> int:
    return max(
        turn.prompt_tokens + turn.output_tokens
        for program in programs
        for turn in program.all_turns()
    )


def _unbounded_blocks(programs: Sequence[Program], machine: Machine) -> int:
    """Blocks for every turn's context, as if nothing were shared."""
    tokens = sum(
        turn.prompt_tokens + turn.output_tokens
        for program in programs
        for turn in program.turns[-1:]
    )
    branches = sum(
        child.turns[-1].prompt_tokens + child.turns[-1].output_tokens
        for program in programs
        for turn in program.all_turns()
        for child in turn.children
    )
    n_turns = sum(len(program.all_turns()) for program in programs)
    compacted = sum(
        turn.prompt_tokens + turn.output_tokens
        for program in programs
        for turn, after in zip(program.turns, program.turns[1:], strict=False)
        if after.prompt_tokens < turn.prompt_tokens
    )
    return (tokens + branches + compacted) // machine.block_tokens + 4 * n_turns + 1024


def _calibration(machine: Machine) -> Calibration:
    """What `kvtier` measures at start on such a machine."""
    curve = ((machine.block_bytes, machine.link_bytes_per_s),)
    prefill = tuple(
        (cached, new, step_s(machine, [Scheduled(cached, new)])) for cached, new in _PREFILL_POINTS
    )
    link = (machine.link_latency_s, curve)
    return Calibration(link, link, prefill, "")
