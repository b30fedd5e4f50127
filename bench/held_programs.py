"""Agent programs that one engine holds for as long as one likes, in virtual time: when one ends, the next begins."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.engine.engine_spec import BLOCK_TOKENS, EngineSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.scheduler_harness import Engine

N_TOOLS = 5


@dataclass(frozen=True)
class HeldLoad:
    """The workload of an engine that holds so many programs.

    All programs are alike whatever their number, and the engine computes as fast as they need; what grows with them is
    how many turns come in a second, and the memory, in proportion.

    Attributes:
        programs: Held at a time.
        first_tokens: Prompt of a program's first turn.
        turn_tokens: Tokens that each pause adds to the prompt.
        output_tokens: Output of each turn.
        turns: Turns of a program, which says that it ends with the last.
        gap_s: Mean pause between turns; pauses are exponential.
        gpu_share: Part of all programs' contexts that fits in GPU memory.
        tier_share: Likewise, in the CPU tier.
        step_tokens: Most tokens of a step.
        batch: Most running requests.
        seed: Of the pauses.
    """

    programs: int
    first_tokens: int = 1600
    turn_tokens: int = 64
    output_tokens: int = 8
    turns: int = 12
    gap_s: float = 180.0
    gpu_share: float = 0.25
    tier_share: float = 0.75
    step_tokens: int = 16_384
    batch: int = 512
    seed: int = 1

    @property
    def longest_tokens(self) -> int:
        """Tokens of a program's last turn."""
        return self.first_tokens + self.turns * (self.turn_tokens + self.output_tokens)

    @property
    def context_tokens(self) -> int:
        """Tokens of a program in the mean."""
        return (self.first_tokens + self.longest_tokens) // 2

    @property
    def turns_per_s(self) -> float:
        """Turns that come in a second, less what they take themselves."""
        return self.programs / self.gap_s

    def spec(self, chunk_tokens: int) -> EngineSpec:
        """The engine."""
        blocks = int(self.programs * self.gpu_share * self.context_tokens) // BLOCK_TOKENS
        return EngineSpec(
            is_async=True,
            blocks=max(blocks, 2 * self.longest_tokens // BLOCK_TOKENS),
            settings={"kvtier.chunk_tokens": chunk_tokens},
            max_context=self.longest_tokens + BLOCK_TOKENS,
            max_batch=self.batch,
            batch_tokens=self.step_tokens,
        )


@dataclass(slots=True)
class _Program:
    number: int
    turn: int = 0
    generation: int = 0
    tokens: int = 0

    @property
    def name(self) -> str:
        return f"p{self.number}.{self.generation}"


class HeldPrograms:
    """Sends the programs' turns.

    Args:
        engine: Where to.
        load: The workload.

    Attributes:
        finished: Turns that have ended.
    """

    def __init__(self, engine: Engine, load: HeldLoad) -> None:
        self._engine = engine
        self._load = load
        self._random = random.Random(load.seed)  # noqa: S311 - pauses, not secrets
        self._open: dict[str, tuple[_Program, Any]] = {}
        now_s = engine.clock.now_s
        # The first turns come as fast as turns come later.
        self._due = [
            (now_s + self._random.random() * load.gap_s, i, _Program(i))
            for i in range(load.programs)
        ]
        heapq.heapify(self._due)
        self.finished = 0

    @property
    def next_s(self) -> float:
        """When the next turn comes."""
        return self._due[0][0] if self._due else float("inf")

    def requests_due(self) -> list[Any]:
        """Turns whose time has come."""
        requests = []
        while self._due and self._due[0][0] <= self._engine.clock.now_s:
            _, _, program = heapq.heappop(self._due)
            requests.append(self._request(program))
        return requests

    def collect(self, outputs: dict[str, list[int]]) -> None:
        """Let the programs of ended turns pause, or the next begin."""
        load = self._load
        for request_id in [name for name, (_, one) in self._open.items() if one.is_finished()]:
            program, request = self._open.pop(request_id)
            outputs.pop(request_id, None)
            self.finished += 1
            program.tokens = request.num_tokens
            program.turn += 1
            if program.turn == load.turns:
                program.turn = program.tokens = 0
                program.generation += 1
            gap_s = self._random.expovariate(1 / load.gap_s)
            due_s = self._engine.clock.now_s + gap_s
            heapq.heappush(self._due, (due_s, program.number, program))

    def _request(self, program: _Program) -> Any:
        load = self._load
        added = load.turn_tokens if program.turn else load.first_tokens
        hints: dict[str, Any] = {"tool": f"tool{program.number % N_TOOLS}"}
        if program.turn + 1 == load.turns:
            hints = {"end": True}
        request = self._engine.request(
            f"{program.name}-{program.turn}",
            [50 + program.number % 900] * (program.tokens + added),
            load.output_tokens,
            session=program.name,
            kvtier=hints,
            hasher=_synthetic_hasher(program),
        )
        self._open[request.request_id] = (program, request)
        return request


def _synthetic_hasher(program: _Program) -> Callable[[Any], list[Any]]:
    """Block hashes that are as unique as real ones: a program's text only ever grows."""
    head = program.number.to_bytes(12, "big") + program.generation.to_bytes(12, "big")

    def new_hashes(request: Any) -> list[Any]:
        known, full = len(request.block_hashes), request.num_tokens // BLOCK_TOKENS
        return [head + i.to_bytes(8, "big") for i in range(known, full)]

    return new_hashes
