"""vLLM's waiting loop in small, and random work for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvtier.admission_facts import AdmissionConfig, AdmissionView

if TYPE_CHECKING:
    import random

    from kvtier.admission import AdmissionController

TOTAL_BLOCKS = 100
STEP_BLOCKS = 40


@dataclass
class Request:
    request_id: str
    program: str
    blocks: int
    steps_left: int
    askable_from_s: float


@dataclass
class Loop:
    """FCFS queue, skip on deferral, stop at a failed allocation. Asks an `AdmissionController`."""

    admission: AdmissionController[str]
    max_running: int
    step_s: float = 0.5
    now_s: float = 0.0
    queue: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)

    @property
    def free_blocks(self) -> int:
        return TOTAL_BLOCKS - sum(request.blocks for request in self.running)

    def view(self, now_s: float) -> AdmissionView:
        return AdmissionView(
            now_s,
            self.free_blocks,
            TOTAL_BLOCKS,
            len(self.running),
            open_places=self.max_running - len(self.running),
            step_blocks=STEP_BLOCKS,
        )

    def begin(self) -> None:
        self.admission.begin_step(self.view(self.now_s))

    def lacks_room(self, request: Request) -> bool:
        """Its allocation has failed, and would again."""
        return request.request_id in self.failed and request.blocks > self.free_blocks

    def may_start(self, request: Request) -> bool:
        return self.admission.decide(
            request.request_id, request.blocks, self.now_s, lacks_room=self.lacks_room(request)
        ).admit

    def started(self, request_id: str) -> None:
        self.admission.on_started(request_id)

    def finished(self, request_id: str) -> None:
        self.admission.on_turn_ended(
            request_id, context_blocks=1, goes_on=True, gap_s=1.0, now_s=self.now_s
        )

    def step(self) -> None:
        self.begin()
        asked, admitted = 0, 0
        idle = not self.running
        for request in list(self.queue):
            if len(self.running) == self.max_running:
                break
            if request.askable_from_s > self.now_s:
                continue
            asked += 1
            if not self.may_start(request):
                continue
            admitted += 1
            if request.blocks > self.free_blocks:
                self.failed.add(request.request_id)
                break
            self.queue.remove(request)
            self.running.append(request)
            self.started(request.request_id)
        assert not (idle and asked and not admitted), "requests wait, nothing runs, all deferred"
        for request in list(self.running):
            request.steps_left -= 1
            if request.steps_left == 0:
                self.running.remove(request)
                self.finished(request.request_id)
        self.now_s += self.step_s


def random_config(
    rng: random.Random, mode: Literal["program_fcfs", "working_set"]
) -> AdmissionConfig:
    return AdmissionConfig(
        mode=mode,
        aging_s=rng.choice([0.0, 5.0, 30.0]),
        max_defer_s=rng.choice([2.0, 10.0, 40.0]),
        blocked_after_s=rng.choice([0.0, 3.0]),
        stale_scans=rng.choice([1, 4]),
        long_pause_s=rng.choice([0.0, 5.0]),
        backfill_turns=rng.choice([0.0, 1.0, 20.0]),
    )


def run_randomly(loop: Loop, rng: random.Random) -> None:
    """Send random requests, abort and pin some; every one starts in the end, and nothing is left."""
    programs: dict[str, float] = {}
    for i in range(150):
        for _ in range(rng.choice([0, 0, 1, 3])):
            _send(loop, rng, f"r{i}-{rng.random()}", programs)
        if loop.queue and rng.random() < 0.05:
            loop.finished(loop.queue.pop(rng.randrange(len(loop.queue))).request_id)
        if rng.random() < 0.05:
            loop.admission.on_kv_pinned(str(rng.randrange(30)))
        loop.step()
    for _ in range(int(2500 / loop.step_s)):
        if not loop.queue and not loop.running:
            break
        loop.step()
    assert not loop.queue, "a request starved"
    assert loop.admission.waiting == 0
    for program in programs:
        loop.admission.on_program_ended(program)
    assert loop.admission.working_set_blocks == 0


def _send(loop: Loop, rng: random.Random, request_id: str, programs: dict[str, float]) -> None:
    program = str(rng.randrange(30))
    new = program not in programs
    request = Request(
        request_id,
        program,
        blocks=rng.choice([1, 5, 20, 60, 100]),
        steps_left=rng.randint(1, 6),
        askable_from_s=loop.now_s + rng.choice([0.0, 0.0, 0.0, 5.0, 60.0]),
    )
    loop.queue.append(request)
    loop.admission.on_arrival(
        request_id,
        program,
        program_arrival_s=programs.setdefault(program, loop.now_s),
        returning=not new,
        context_blocks=request.blocks,
        now_s=loop.now_s,
    )
