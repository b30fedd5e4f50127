"""autellix: programs that have been served least go first, and others are preempted for them.

Autellix (arXiv 2502.13965; NSDI 2026 as Agentix); no public code. The queues are in `plas`. Within a queue: first
come, first served among calls. With each step, running calls of the lowest queues are preempted where the first
that waits is of a higher queue and does not fit.

The CPU tier is what the paper's swap kernel is there for: here blocks are stored as they are computed, and a preempted
call loads what it had. Departures: K, the bounds and beta are not published (see `plas`); rescheduling is with each
step where the paper takes several at a time; ATLAS, its variant for programs of many threads, is not there
but for how parallel calls add up, and neither is routing to several engines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtier.replay.baselines.hooks import BaselinePolicy
from kvtier.replay.baselines.plas import BETA, BOUNDS_S, Call, ProgramService

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtier.replay.baselines.hooks import Surroundings


class AutellixPolicy(BaselinePolicy):
    """See the module's docstring."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._scheduler = around.scheduler
        self._programs: dict[str, ProgramService] = {}
        self._calls: dict[str, Call] = {}
        # The step under way: when it began, and whose it is.
        self._step_s = 0.0
        self._in_step: set[str] = set()
        self._scheduler.before_step = self._before_step
        self._scheduler.rank_waiting = self._rank_waiting
        self._scheduler.rank_running = self._rank_running

    # -- service -----------------------------------------------------------------------------------

    def arrived(self, request: Any) -> None:
        """The call inherits what its program has attained."""
        name = self._around.facts[request.request_id].program
        program = self._programs.setdefault(name, ProgramService())
        self._calls[request.request_id] = Call(program, program.attained_s, self._around.clock())

    def stepped(self, output: Any) -> None:
        """Note who is served now."""
        self._step_s = self._around.clock()
        self._in_step = set(output.num_scheduled_tokens)

    def finished(self, request: Any, blocks: Sequence[Any]) -> None:  # noqa: ARG002
        """The program has attained more."""
        self._charge(request.request_id)
        self._calls.pop(request.request_id).end(self._around.clock())

    def _charge(self, request_id: str) -> None:
        """Count the step that has just been computed, once."""
        if request_id in self._in_step:
            self._in_step.discard(request_id)
            self._calls[request_id].served_s += self._around.clock() - self._step_s

    # -- order -------------------------------------------------------------------------------------

    def _rank_waiting(self, request: Any) -> int:
        call, now_s = self._calls[request.request_id], self._around.clock()
        level = call.level(BOUNDS_S)
        if level and call.starves(now_s, BETA):
            call.promote(now_s)
            level = 0
        return level

    def _rank_running(self, request: Any) -> int:
        return self._calls[request.request_id].level(BOUNDS_S)

    def _before_step(self) -> None:
        """Count the step before, and preempt for the first that waits."""
        for request_id in list(self._in_step):
            self._charge(request_id)
        scheduler = self._scheduler
        scheduler.rank()
        if not scheduler.waiting:
            return
        first = scheduler.waiting.peek_request()
        victims = [one for one in scheduler.running if one.priority > first.priority]
        victims.sort(key=lambda one: (one.priority, one.arrival_time, one.request_id))
        manager, pool = scheduler.kv_cache_manager, self._around.pool
        need = -(-first.num_tokens // self._around.machine.block_tokens)
        free = pool.get_num_free_blocks()
        gain = sum(len(manager.get_block_ids(one.request_id)[0]) for one in victims)
        if free + gain < need:
            # It would not fit even then.
            return
        most = scheduler.max_num_running_reqs
        while victims and (pool.get_num_free_blocks() < need or len(scheduler.running) >= most):
            scheduler.preempt(victims.pop())
