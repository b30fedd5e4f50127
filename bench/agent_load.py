"""Agent programs of long contexts, sent to vLLM's scheduler in virtual time."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.engine.engine_spec import BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.scheduler_harness import Engine

MEAN_GAP_S = 2.0
"""Tool time of coding agents (SWE-bench runs: a second or two; recorded Bash calls: 2.5 s median)."""
ARRIVAL_SPACING_S = 0.2


@dataclass(frozen=True)
class Load:
    """The workload.

    Attributes:
        programs: Agent programs, each a chain of turns with pauses.
        turns: Turns of each program.
        context_tokens: Prompt of the first turn.
        shared_tokens: Its beginning, which all programs have in common.
        turn_tokens: Tokens that each pause adds to the prompt.
        output_tokens: Output of each turn. This and `turn_tokens` are the means over 7,100 turns of
            recorded Claude Code sessions, which have 64 turns each.
        gpu_blocks: KV blocks of 16 tokens.
        batch: Most running requests.
        step_tokens: Most tokens of a step.
        is_async: Whether the scheduler is the asynchronous one.
        seed: Of the gaps.
    """

    programs: int = 200
    turns: int = 6
    context_tokens: int = 100_000
    shared_tokens: int = 0
    turn_tokens: int = 1700
    output_tokens: int = 434
    gpu_blocks: int = 150_000
    batch: int = 16
    step_tokens: int = 8192
    is_async: bool = True
    seed: int = 1


class Agents:
    """Sends the programs' turns in virtual time.

    Args:
        engine: Where to.
        load: The workload.
    """

    def __init__(self, engine: Engine, load: Load) -> None:
        self._engine = engine
        self._load = load
        self._random = random.Random(load.seed)  # noqa: S311 - gaps, not secrets
        self._texts: dict[int, list[int]] = {}
        self._open: dict[str, tuple[int, int, Any]] = {}
        self._due: list[tuple[float, int, int]] = [
            (engine.clock.now_s + i * ARRIVAL_SPACING_S, i, 0) for i in range(load.programs)
        ]
        self.finished = 0

    @property
    def done(self) -> bool:
        """Whether every turn of every program has ended."""
        return not self._due and not self._open

    def requests_due(self) -> list[Any]:
        """Turns whose time has come; skips time where the engine has nothing else to do."""
        clock = self._engine.clock
        if self._due and not self._open:
            clock.now_s = max(clock.now_s, self._due[0][0])
        requests = []
        while self._due and self._due[0][0] <= clock.now_s:
            _, program, turn = heapq.heappop(self._due)
            requests.append(self._request(program, turn))
        return requests

    def collect(self, outputs: dict[str, list[int]]) -> None:
        """Let the programs of ended turns pause."""
        for request_id in [i for i, (_, _, r) in self._open.items() if r.is_finished()]:
            program, turn, request = self._open.pop(request_id)
            self.finished += 1
            if turn + 1 < self._load.turns:
                self._texts[program] = [*request.prompt_token_ids, *outputs.pop(request_id)]
                gap_s = self._random.expovariate(1 / MEAN_GAP_S)
                heapq.heappush(self._due, (self._engine.clock.now_s + gap_s, program, turn + 1))
            else:
                self._texts.pop(program, None)

    def _request(self, program: int, turn: int) -> Any:
        load = self._load
        added = load.context_tokens if turn == 0 else load.turn_tokens
        own = [50 + program % 900] * added
        if turn == 0:
            own[: load.shared_tokens] = [950] * load.shared_tokens
        prompt = [*self._texts.pop(program, ()), *own]
        request_id = f"p{program}-{turn}"
        request = self._engine.request(
            request_id,
            prompt,
            load.output_tokens,
            session=f"program-{program}",
            hasher=_synthetic_hasher(program, load.shared_tokens // BLOCK_TOKENS),
        )
        self._open[request_id] = (program, turn, request)
        return request


def _synthetic_hasher(program: int, shared_blocks: int) -> Callable[[Any], list[Any]]:
    """Block hashes that are as unique as real ones: a program's text only ever grows."""
    head, common = (program + 1).to_bytes(24, "big"), bytes(24)

    def new_hashes(request: Any) -> list[Any]:
        known, full = len(request.block_hashes), request.num_tokens // BLOCK_TOKENS
        return [
            (common if i < shared_blocks else head) + i.to_bytes(8, "big")
            for i in range(known, full)
        ]

    return new_hashes
