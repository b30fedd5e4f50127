"""Schedulers of vLLM's that order requests otherwise than by arrival. They need vLLM's priority policy."""

from __future__ import annotations

import heapq
import time
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.request_queue import PriorityRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable


class ProgramFcfsScheduler(Scheduler):  # type: ignore[misc] # vLLM's classes are Any to mypy
    """First come, first served among programs: a request has the arrival time of its program.

    Under vLLM's priority policy that is its place among those that wait, and who has come last is preempted
    first. Nothing ages.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._program_arrival_s: dict[str, float] = {}

    def add_request(self, request: Any) -> None:
        """Queue a request under its program's arrival time."""
        program = request.session_id or request.request_id
        request.arrival_time = self._program_arrival_s.setdefault(program, request.arrival_time)
        super().add_request(request)


class _RankedQueue(PriorityRequestQueue):  # type: ignore[misc] # see above
    """A priority queue whose priorities may change."""

    def rank(self, priority: Callable[[Any], int]) -> None:
        """Set every request's priority anew."""
        changed = False
        for request in self._heap:
            now = priority(request)
            changed |= now != request.priority
            request.priority = now
        if changed:
            heapq.heapify(self._heap)


class RankedScheduler(Scheduler):  # type: ignore[misc] # see above
    """First come, first served within ranks that a policy gives anew before each step.

    Attributes:
        before_step: Called first.
        rank_waiting: Of a waiting request; the lowest goes first.
        rank_running: Of a running one; the highest is preempted first, of several who came last.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waiting = _RankedQueue()
        self.before_step: Callable[[], None] = _nothing
        self.rank_waiting: Callable[[Any], int] = _same
        self.rank_running: Callable[[Any], int] = _same

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Rank, and schedule a step."""
        self.before_step()
        self.rank()
        return super().schedule(throttle_prefills)

    def rank(self) -> None:
        """Set the priorities of all requests that wait or run."""
        self.waiting.rank(self.rank_waiting)
        for request in self.running:
            request.priority = self.rank_running(request)

    def preempt(self, request: Any) -> None:
        """Take a running request's blocks; it waits again."""
        self.running.remove(request)
        self._preempt_request(request, time.monotonic())


class RankedProgramScheduler(RankedScheduler, ProgramFcfsScheduler):
    """First come, first served among programs, within ranks."""


def _same(_request: Any) -> int:
    return 0


def _nothing() -> None:
    return
