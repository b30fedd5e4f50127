"""Who waits, runs and pauses: what admission goes by, kept up to date by each event of a request's life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

from kvtier.admission_facts import AdmissionConfig, AdmissionView, Key, Waiting
from kvtier.demand_forecast import DemandForecast
from kvtier.waiting_lines import Priorities, WaitingLines
from kvtier.working_set import WorkingSet

if TYPE_CHECKING:
    from kvtier.shared_blocks import Beginning


class ProgramsAtWork(Generic[Key]):
    """Requests and their programs. Each call costs O(log n) amortised in the number of waiting requests.

    Args:
        config: Of admission.
    """

    def __init__(self, config: AdmissionConfig) -> None:
        self.config = config
        self._waiting: dict[str, Waiting[Key]] = {}
        self._started: dict[str, Waiting[Key]] = {}
        self._priorities = Priorities()
        self._lines: WaitingLines[Key] = WaitingLines()
        self._new_blocks = 0
        self._new_requests = 0
        self._sequence = 0
        # Passes over the queue.
        self._scan = 0
        self._view = AdmissionView(now_s=0.0, free_blocks=0, total_blocks=0, running_requests=0)
        # Requests that started less those that ended since the view was taken.
        self._running_since_view = 0
        self._now_s = float("-inf")
        self._working_set: WorkingSet[Key] = WorkingSet(config.long_pause_s)
        self._forecast: DemandForecast[Key] = DemandForecast()
        # Of `_forecast`, until something happens: what was asked, and its answer.
        self._peak_blocks: tuple[int, int, float] | None = None

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting)

    @property
    def working_set_blocks(self) -> int:
        """Blocks that the busy programs are expected to take."""
        return self._working_set.blocks

    @property
    def busy(self) -> tuple[int, int]:
        """Programs that run, pause for a short time or wait to begin, and the blocks of their contexts, each its own."""
        n_programs = len(self._working_set) + self._new_requests
        return n_programs, self._working_set.separate_blocks + self._new_blocks

    def on_arrival(
        self,
        request_id: str,
        program: Key,
        *,
        program_arrival_s: float,
        returning: bool,
        context_blocks: int,
        now_s: float,
        priority: int = 0,
        beginning: Beginning = (),
    ) -> None:
        """Take in a request that begins to wait; known ones are left as they are.

        Args:
            request_id: The request.
            program: Identity of its program (any hashable).
            program_arrival_s: When the program's first turn arrived.
            returning: The program has run a turn before.
            context_blocks: Blocks that its context is expected to take.
            now_s: The time of arrival.
            priority: vLLM's; less is more urgent.
            beginning: What its prompt begins with, see `kvtier.shared_blocks`.
        """
        self._now_s = max(self._now_s, now_s)
        if request_id in self._waiting or request_id in self._started:
            return
        self._sequence += 1
        entry = Waiting(
            program,
            is_new_program=not returning,
            priority=priority,
            context_blocks=context_blocks,
            since_s=now_s,
            order=(priority, program_arrival_s, self._sequence),
            line=(priority, now_s, self._sequence),
            asked_scan=self._scan,
            needed_blocks=context_blocks,
            beginning=beginning,
        )
        self._waiting[request_id] = entry
        if entry.is_new_program:
            self._new_blocks += context_blocks
            self._new_requests += 1
        else:
            self._working_set.wait(program, context_blocks, beginning)
            self._forecast.turn_waits(program, now_s)
            self._peak_blocks = None
        self._lines.put(entry)

    def on_started(self, request_id: str) -> None:
        """Count a request that got its blocks; a preempted one that resumes is known already."""
        entry = self._waiting.pop(request_id, None)
        if entry is None:
            return
        self._leave(entry)
        self._started[request_id] = entry
        self._priorities.add(entry.priority)
        # It may be looked up in its line for a while yet: what is long is not kept for that.
        beginning, entry.beginning = entry.beginning, ()
        self._forecast.turn_starts(entry.program, entry.context_blocks, self._now_s, beginning)
        self._peak_blocks = None
        self._running_since_view += 1
        self._working_set.start(
            entry.program, entry.context_blocks, beginning, waited=not entry.is_new_program
        )

    def on_turn_ended(
        self,
        request_id: str,
        *,
        context_blocks: int,
        goes_on: bool,
        gap_s: float,
        now_s: float,
    ) -> None:
        """Note that a turn is over; its program pauses.

        Args:
            request_id: The request.
            context_blocks: Blocks of its prompt and output.
            goes_on: It has called a tool, so its program comes back with the result.
            gap_s: Mean pause after such turns.
            now_s: The time.
        """
        self._now_s = max(self._now_s, now_s)
        program = self._ends(request_id)
        if program is not None:
            self._forecast.turn_ends(program, context_blocks, now_s, goes_on=goes_on, gap_s=gap_s)
            self._pauses(program)
        else:
            self.on_aborted(request_id)

    def on_aborted(self, request_id: str) -> None:
        """Drop a request that went and left nothing behind."""
        entry = self._waiting.pop(request_id, None)
        if entry is not None:
            self._leave(entry)
            entry.beginning = ()
            if not entry.is_new_program:
                self._working_set.give_up(entry.program, self._now_s)
                self._forecast.turn_vanishes(entry.program, self._now_s, started=False)
                self._peak_blocks = None
            return
        program = self._ends(request_id)
        if program is not None:
            self._forecast.turn_vanishes(program, self._now_s, started=True)
            self._pauses(program)

    def on_kv_pinned(self, program: Key) -> None:
        """Note that a paused program's KV is held in GPU memory: it counts until released."""
        self._working_set.hold(program)

    def on_kv_released(self, program: Key) -> None:
        """Note that a paused program's KV is no longer held in GPU memory."""
        self._working_set.release(program, self._now_s)

    def on_program_ended(self, program: Key) -> None:
        """Stop counting a program that is over or forgotten."""
        self._working_set.end(program)
        self._forecast.program_ends(program)
        self._peak_blocks = None

    def _ends(self, request_id: str) -> Key | None:
        entry = self._started.pop(request_id, None)
        if entry is None:
            return None
        self._priorities.remove(entry.priority)
        return entry.program

    def _pauses(self, program: Key) -> None:
        self._running_since_view -= 1
        # Here too: in shadow mode and off, nobody asks who may start.
        self._working_set.expire(self._now_s)
        self._working_set.pause(program, self._now_s)
        self._peak_blocks = None

    def _leave(self, entry: Waiting[Key]) -> None:
        """Note that a request waits no more."""
        entry.gone = True
        if entry.is_new_program:
            self._new_blocks -= entry.context_blocks
            self._new_requests -= 1
        self._lines.trim(len(self._waiting))
