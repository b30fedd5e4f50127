"""thunderagent: a proxy before the engine lets as many programs be active as GPU memory has room for.

ThunderAgent (arXiv 2602.13692); its rule is in `utilisation`. A paused program's requests stay with the proxy, for 30
minutes at most. The engine serves what it gets first come, first served, here with the CPU tier that all
baselines have.

Departures. Sub-agents belong to their program: its tokens are those of all its chains, where the code keeps the number
of its last request; to gate each on its own would lock up a parent and its children. A program
is released when its client has ended, as by the code's `/programs/release`. Token counts are exact, where the code
estimates them from characters until the engine has answered. With a single engine there is nothing to place.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.core.sched.scheduler import Scheduler

from kvtier.replay.baselines.hooks import BaselinePolicy
from kvtier.replay.baselines.utilisation import ProgramState, may_begin, to_pause, to_resume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtier.replay.baselines.hooks import Surroundings

INTERVAL_S: Final = 5.0
LONGEST_WAIT_S: Final = 1800.0


class GatedScheduler(Scheduler):  # type: ignore[misc] # vLLM's classes are Any to mypy
    """An engine behind a proxy that may hold requests back.

    Attributes:
        proxy: Set before the first request.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.proxy: ThunderAgentPolicy | None = None

    def add_request(self, request: Any) -> None:
        """Hand a request to the proxy."""
        assert self.proxy is not None
        self.proxy.received(request)

    def send(self, request: Any) -> None:
        """Queue a request."""
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Let the proxy do what is due, and schedule a step."""
        assert self.proxy is not None
        self.proxy.tick()
        return super().schedule(throttle_prefills)

    def has_requests(self) -> bool:
        """Also while the proxy holds some."""
        return super().has_requests() or (self.proxy is not None and self.proxy.n_held > 0)


class ThunderAgentPolicy(BaselinePolicy):
    """See the module's docstring."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._capacity_tokens = around.pool.num_gpu_blocks - 1
        self._capacity_tokens *= around.machine.block_tokens
        self._programs: dict[str, ProgramState] = {}
        self._held: dict[str, deque[Any]] = {}
        # By program and chain: the last request, of which `num_tokens` grows while it runs.
        self._last: dict[str, dict[str, Any]] = {}
        self._next_check_s = INTERVAL_S
        around.scheduler.proxy = self

    @property
    def n_held(self) -> int:
        """Requests that are held back."""
        return sum(map(len, self._held.values()))

    def received(self, request: Any) -> None:
        """Send a request to the engine, or hold it back."""
        facts, now_s = self._around.facts[request.request_id], self._around.clock()
        is_new = facts.program not in self._programs
        program = self._programs.setdefault(facts.program, ProgramState(facts.program))
        program.n_turns += 1
        program.n_requests += 1
        self._last.setdefault(facts.program, {})[facts.chain] = request
        self._count(program)
        if is_new:
            others = [one for one in self._programs.values() if one is not program]
            program.is_paused = not may_begin(self._capacity_tokens, program, others)
        if program.is_paused:
            program.waits_since_s = min(program.waits_since_s, now_s)
            self._held.setdefault(facts.program, deque()).append(request)
        else:
            self._around.scheduler.send(request)

    def finished(self, request: Any, blocks: Sequence[Any]) -> None:  # noqa: ARG002
        """Pause a program that is marked."""
        facts = self._around.facts[request.request_id]
        program = self._programs[facts.program]
        program.n_requests -= 1
        if facts.ends_chain and facts.chain != facts.program:
            del self._last[facts.program][facts.chain]
        if facts.ends_program:
            self._release(facts.program)
        elif program.is_marked and not program.n_requests:
            program.is_marked, program.is_paused = False, True

    def tick(self) -> None:
        """Every 5 s, resume and pause."""
        now_s = self._around.clock()
        if now_s < self._next_check_s:
            return
        self._next_check_s += INTERVAL_S * (1 + (now_s - self._next_check_s) // INTERVAL_S)
        for name in [name for name in self._programs if name in self._around.agents.ended_s]:
            self._release(name)
        programs = list(self._programs.values())
        for program in programs:
            self._count(program)
        chosen = to_resume(self._capacity_tokens, programs)
        for program in programs:
            # A program that has waited too long goes on whatever there is room for.
            if program in chosen or now_s - program.waits_since_s >= LONGEST_WAIT_S:
                self._resume(program)
        for program in to_pause(self._capacity_tokens, programs):
            program.is_marked = program.n_requests > 0
            program.is_paused = not program.is_marked

    # -- internals ---------------------------------------------------------------------------------

    def _count(self, program: ProgramState) -> None:
        last = self._last.get(program.name, {})
        program.tokens = sum(request.num_tokens for request in last.values())

    def _resume(self, program: ProgramState) -> None:
        program.is_paused, program.waits_since_s = False, float("inf")
        for request in self._held.pop(program.name, ()):
            self._around.scheduler.send(request)

    def _release(self, name: str) -> None:
        self._programs.pop(name)
        self._last.pop(name, None)
