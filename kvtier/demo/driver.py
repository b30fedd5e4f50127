"""Runs a workload against one vLLM server: an agent client per program.

Each program sends its turns as streamed OpenAI completions of token ids, waits its tool
time after each, and checks that the server saw the recorded prompt and generated the
recorded output. Times are seconds since the run's start, from one monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import httpx

from kvtier.demo.metrics_scrape import (
    EngineCounters,
    FirstToken,
    TokenSources,
    attribute,
    parse_counters,
    parse_gauge,
)
from kvtier.demo.workload import Program, RecordedTurn, Workload, work_digest

MODEL_NAME = "kvtier-demo"
# The first token is always sent alone; after it the time of single tokens is not used,
# and fewer, larger events leave the cores to the engine.
_STREAM_INTERVAL = 8
_WARM_UP_TOKENS = 1100
_READY_TIMEOUT_S = 180.0
_READY_POLL_S = 0.5
# A request may wait for the others' turns; a server that ends is noticed elsewhere.
_NO_TIMEOUT = httpx.Timeout(None)


class WorkError(RuntimeError):
    """A server did other work than recorded, or refused a request."""


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """What happened to one request. Times in seconds since the run's start.

    Attributes:
        request_id: vLLM's name of the request; its logs and kvtier's decisions begin with it.
        queue_s: Time in vLLM's waiting queue, None where the server does not say.
        known_tokens: Prompt tokens whose KV had been computed in an earlier turn of the
            program (its context before the new tool result).
        gpu_tokens: Prompt tokens whose KV was still in GPU memory.
        cpu_tokens: Prompt tokens whose KV came through the connector.
        exact_sources: See :class:`kvtier.demo.metrics_scrape.TokenSources`.
    """

    program: str
    turn: int
    request_id: str
    arrival_s: float
    first_token_s: float
    end_s: float
    queue_s: float | None
    tool: str | None
    gap_s: float
    prompt_tokens: int
    output_tokens: int
    known_tokens: int
    cached_tokens: int
    gpu_tokens: int = 0
    cpu_tokens: int = 0
    exact_sources: bool = True

    @property
    def key(self) -> str:
        """Unique name of the request in its run."""
        return f"{self.program}/{self.turn}"

    @property
    def ttft_s(self) -> float:
        """Time to first token, as the client sees it."""
        return self.first_token_s - self.arrival_s

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the engine computed."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def recomputed_tokens(self) -> int:
        """Prompt tokens that were computed again though an earlier turn had computed them."""
        return max(0, self.known_tokens - self.cached_tokens)


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One arm's run: every turn, the engine's counters over the run, and the work's digest."""

    turns: tuple[TurnRecord, ...]
    counters: EngineCounters
    wall_s: float
    work_digest: str
    started_unix_s: float


@dataclass(slots=True)
class _Collected:
    """What the programs' clients gather while they run."""

    turns: list[TurnRecord] = field(default_factory=list)
    readings: list[EngineCounters] = field(default_factory=list)
    work: list[tuple[str, int, list[int], list[int]]] = field(default_factory=list)


Observer = Callable[[TurnRecord, bool], None]
"""Called after every turn, with True when it was the program's last."""


class Driver:
    """Runs one workload on one server."""

    def __init__(
        self,
        base_url: str,
        workload: Workload,
        on_turn: Observer,
        *,
        ready_gauge: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Set up.

        Args:
            base_url: The server's, without ``/v1``.
            workload: What to run.
            on_turn: Called after every turn.
            ready_gauge: Metric that must be 1 before the programs start, if any.
            transport: How requests are sent; default is HTTP.
        """
        self._transport = transport
        self._ready_gauge = ready_gauge
        self._base_url = base_url
        self._workload = workload
        self._on_turn = on_turn
        self._collected = _Collected()
        self._reading = asyncio.Lock()
        self._origin_s = 0.0
        self._baseline = EngineCounters()

    async def run(self) -> ArmRun:
        """Warm the server up, run all programs, and return what was measured.

        Raises:
            WorkError: the server refused a request or did other work than recorded.
            httpx.HTTPError: the connection failed.
        """
        # A connection for each request: vLLM closes an idle one after 5 s, and a request that is sent
        # at that moment would be lost.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self._base_url,
            timeout=_NO_TIMEOUT,
            limits=limits,
            trust_env=False,
            transport=self._transport,
        ) as client:
            await self._warm_up(client)
            self._baseline = await _read_counters(client)
            started_unix_s = time.time()
            self._origin_s = time.monotonic()
            try:
                async with asyncio.TaskGroup() as group:
                    for program in self._workload.programs:
                        group.create_task(self._run_program(client, program, group))
            except ExceptionGroup as failed:
                # One failure ends the run, and cancels the other programs.
                raise failed.exceptions[0] from failed
            wall_s = self._now_s()
            counters = await _read_counters(client) - self._baseline
        collected = self._collected
        return ArmRun(
            turns=_with_sources(collected.turns, [*collected.readings, counters]),
            counters=counters,
            wall_s=wall_s,
            work_digest=work_digest(collected.work),
            started_unix_s=started_unix_s,
        )

    def _now_s(self) -> float:
        return time.monotonic() - self._origin_s

    async def _warm_up(self, client: httpx.AsyncClient) -> None:
        """A prompt of a full prefill step, the same in every arm; then wait for the CPU tier."""
        await _complete(client, [17 + step % 251 for step in range(_WARM_UP_TOKENS)])
        if self._ready_gauge is None:
            return
        deadline_s = time.monotonic() + _READY_TIMEOUT_S
        while not await self._is_ready(client):
            if time.monotonic() > deadline_s:
                message = f"{self._ready_gauge} was not 1 within {_READY_TIMEOUT_S:.0f} s"
                raise WorkError(message)
            # An idle engine runs no connector hook, so it reports only what it saw at work.
            await asyncio.sleep(_READY_POLL_S)
            await _complete(client, [17, 18, 19])

    async def _is_ready(self, client: httpx.AsyncClient) -> bool:
        response = await client.get("/metrics")
        response.raise_for_status()
        return parse_gauge(response.text, str(self._ready_gauge)) == 1

    async def _run_program(
        self, client: httpx.AsyncClient, program: Program, group: asyncio.TaskGroup
    ) -> None:
        await asyncio.sleep(program.start_s - self._now_s())
        known_tokens = 0
        for index, (prompt, turn) in enumerate(program.requests()):
            record = await self._run_turn(
                client, program.name, index, list(prompt), turn, known_tokens, group
            )
            known_tokens = len(prompt) + len(turn.output_ids)
            self._collected.turns.append(record)
            self._on_turn(record, index == len(program.turns) - 1)
            await asyncio.sleep(turn.gap_s)

    async def _run_turn(
        self,
        client: httpx.AsyncClient,
        program: str,
        index: int,
        prompt: list[int],
        turn: RecordedTurn,
        known_tokens: int,
        group: asyncio.TaskGroup,
    ) -> TurnRecord:
        body = {
            "model": MODEL_NAME,
            "prompt": prompt,
            "max_tokens": len(turn.output_ids),
            "temperature": 0,
            "stream": True,
            "stream_interval": _STREAM_INTERVAL,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "skip_special_tokens": False,
            "vllm_xargs": {"forced_token_ids": list(turn.output_ids)},
        }
        arrival_s = self._now_s()
        stream = _Stream()
        first_token_s = arrival_s
        async with client.stream(
            "POST", "/v1/completions", json=body, headers={"X-Session-ID": program}
        ) as response:
            if response.is_error:
                text = (await response.aread()).decode(errors="replace")
                message = f"{program} turn {index}: HTTP {response.status_code}: {text[:500]}"
                raise WorkError(message)
            async for line in response.aiter_lines():
                if stream.feed(line):
                    first_token_s = self._now_s()
                    group.create_task(self._take_reading(client))
        end_s = self._now_s()
        if stream.prompt_ids != prompt or tuple(stream.output_ids) != turn.output_ids:
            message = f"{program} turn {index}: the server did other work than recorded"
            raise WorkError(message)
        self._collected.work.append((program, index, stream.prompt_ids, stream.output_ids))
        return TurnRecord(
            program=program,
            turn=index,
            request_id=stream.request_id,
            arrival_s=arrival_s,
            first_token_s=first_token_s,
            end_s=end_s,
            queue_s=stream.queue_s,
            tool=turn.tool,
            gap_s=turn.gap_s,
            prompt_tokens=len(prompt),
            output_tokens=len(stream.output_ids),
            known_tokens=known_tokens,
            cached_tokens=stream.cached_tokens,
        )

    async def _take_reading(self, client: httpx.AsyncClient) -> None:
        async with self._reading:
            self._collected.readings.append(await _read_counters(client) - self._baseline)


class _Stream:
    """Takes a streamed completion apart."""

    def __init__(self) -> None:
        self.request_id = ""
        self.prompt_ids: list[int] = []
        self.output_ids: list[int] = []
        self.cached_tokens = 0
        self.queue_s: float | None = None

    def feed(self, line: str) -> bool:
        """Take one line of the event stream; True when it brought the first token."""
        if not line.startswith("data: ") or line == "data: [DONE]":
            return False
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            message = f"the server failed: {event['error']}"
            raise WorkError(message)
        self.request_id = event["id"]
        had_tokens = bool(self.output_ids)
        for choice in event["choices"]:
            self.prompt_ids += choice.get("prompt_token_ids") or []
            self.output_ids += choice.get("token_ids") or []
        usage = event.get("usage")
        if usage:
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        queue_ms = (event.get("metrics") or {}).get("queue_time_ms")
        if queue_ms is not None:
            self.queue_s = queue_ms / 1e3
        return bool(self.output_ids) and not had_tokens


async def _complete(client: httpx.AsyncClient, prompt: list[int]) -> None:
    """Send a request of the warm-up, marked as the end of its program."""
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": 4,
        "temperature": 0,
        "kv_transfer_params": {"kvtier": {"end": True}},
    }
    response = await client.post("/v1/completions", json=body)
    if response.is_error:
        message = f"the warm-up request failed: {response.text[:500]}"
        raise WorkError(message)


async def _read_counters(client: httpx.AsyncClient) -> EngineCounters:
    response = await client.get("/metrics")
    response.raise_for_status()
    return parse_counters(response.text)


def _with_sources(
    turns: list[TurnRecord], readings: list[EngineCounters]
) -> tuple[TurnRecord, ...]:
    first_tokens = [
        FirstToken(turn.key, turn.prompt_tokens, turn.cached_tokens)
        for turn in sorted(turns, key=lambda turn: turn.first_token_s)
    ]
    sources: dict[str, TokenSources] = attribute(first_tokens, readings)
    return tuple(
        replace(
            turn,
            gpu_tokens=sources[turn.key].gpu_tokens,
            cpu_tokens=sources[turn.key].external_tokens,
            exact_sources=sources[turn.key].exact,
        )
        for turn in sorted(turns, key=lambda turn: (turn.program, turn.turn))
    )
