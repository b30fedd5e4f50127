"""Remembered deferrals: asked again only when something could have changed, and never for too long."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.admission import AdmissionController
from kvtier.admission_facts import AdmissionConfig, AdmissionView
from kvtier.stats import Stats
from kvtier.turns.deferrals import COUNT_INTERVAL_S, RECHECK_S, Deferrals
from tests.unit.waiting_loop import Loop, Request, random_config, run_randomly


@dataclass
class Memory:
    """In place of `Room`: who has not fitted, and blocks for them."""

    most_blocks: int = 0
    needs: dict[str, int] = field(default_factory=dict)

    def lacks(self, request_id: str, _need_blocks: int) -> bool:
        return self.needs.get(request_id, 0) > self.most_blocks


class Rig:
    """Requests `r0`, `r1`... of programs as old as their number is small."""

    def __init__(self, mode: Any = "program_fcfs", n_requests: int = 3, blocks: int = 10) -> None:
        self.admission: AdmissionController[str] = AdmissionController(
            AdmissionConfig(mode=mode, backfill_turns=1.0)
        )
        self.stats = Stats()
        self.views = 0
        self.running = 1
        self.room = Memory()
        self.deferrals = Deferrals(self.admission, self.view, self.stats, lambda: self.room)
        for i in range(n_requests):
            self.admission.on_arrival(
                f"r{i}",
                f"p{i}",
                program_arrival_s=float(i),
                returning=mode == "program_fcfs",
                context_blocks=blocks,
                now_s=100.0,
            )
        self.deferrals.step_ended(100.0, 1)

    def view(self, now_s: float) -> AdmissionView:
        self.views += 1
        return AdmissionView(now_s, 100, 100, self.running)

    def ask(self, request_id: str, now_s: float = 100.0) -> str:
        """As the connector does."""
        if self.deferrals.stands(request_id):
            return "stands"
        return "yes" if self.deferrals.decide(request_id, 1, now_s) else "no"

    def take_turns(self, turn_s: float) -> None:
        """So much it has taken so far."""
        self.admission._forecast._turn_s.add(turn_s)

    def pass_over(self, now_s: float = 100.0, n_requests: int = 3) -> list[str]:
        """One step in which nobody starts."""
        answers = [self.ask(f"r{i}", now_s) for i in range(n_requests)]
        self.deferrals.step_ended(now_s, self.running)
        return answers


def test_who_is_deferred_is_not_judged_again_in_the_next_step() -> None:
    rig = Rig()
    assert rig.pass_over() == ["yes", "no", "no"]
    assert rig.pass_over(100.02) == ["yes", "stands", "stands"]


def test_a_start_ends_deferrals_within_the_same_step() -> None:
    rig = Rig()
    rig.pass_over()
    rig.admission.on_started("r0")
    rig.deferrals.started()
    assert rig.ask("r1", 100.02) == "yes"


def test_deferrals_end_with_the_last_running_request() -> None:
    rig = Rig()
    rig.pass_over()
    rig.running = 0
    rig.deferrals.finished("whoever ran")
    assert rig.pass_over(100.02) == ["yes", "no", "no"]
    assert rig.pass_over(100.04) == ["yes", "no", "no"], "nothing runs: nothing is remembered"


def test_all_are_judged_again_after_a_while() -> None:
    rig = Rig("working_set", n_requests=2, blocks=80)
    rig.pass_over(n_requests=1)
    rig.admission.on_started("r0")
    rig.deferrals.started()
    assert rig.ask("r1") == "no", "80 of 95 blocks are taken"
    rig.deferrals.step_ended(100.02, 1)
    assert rig.ask("r1", 100.04) == "stands"
    rig.deferrals.step_ended(100.0 + RECHECK_S, 1)
    assert rig.ask("r1", 100.0 + RECHECK_S) == "no"


def test_a_smaller_working_set_ends_deferrals() -> None:
    rig = Rig("working_set", blocks=80)
    assert rig.pass_over() == ["yes", "no", "no"]
    rig.admission.on_started("r0")
    rig.deferrals.started()
    assert [rig.ask("r1"), rig.ask("r2")] == ["no", "no"], "80 of 95 blocks are taken"
    rig.deferrals.step_ended(100.02, 1)
    assert rig.ask("r1", 100.04) == "stands"
    rig.admission.on_turn_ended("r0", context_blocks=1, goes_on=True, gap_s=1.0, now_s=0.0)
    rig.admission.on_program_ended("p0")
    rig.deferrals.step_ended(100.04, 1)
    assert rig.ask("r1", 100.06) == "yes"


def test_the_state_is_read_once_a_step_and_only_where_somebody_is_judged() -> None:
    rig = Rig()
    rig.pass_over()
    assert rig.views == 1
    rig.deferrals.step_ended(100.02, 1)
    assert [rig.ask("r1"), rig.ask("r2")] == ["stands", "stands"]
    assert rig.views == 1


def test_one_that_does_not_fit_lets_those_pass_that_were_held_back_for_its_sake() -> None:
    rig = Rig()
    rig.take_turns(8.0)
    assert rig.pass_over() == ["yes", "no", "no"]
    rig.room.needs = {"r0": 50}
    assert rig.pass_over(100.02) == ["no", "yes", "no"]
    assert rig.stats.totals["deferrals|lets_pass"] == 1
    assert rig.pass_over(100.04) == ["stands", "yes", "stands"], "nothing has become free"


def test_one_that_lets_others_pass_is_asked_again_when_memory_becomes_free() -> None:
    rig = Rig()
    rig.take_turns(8.0)
    rig.running = 2
    rig.room.needs = {"r0": 50}
    assert rig.pass_over() == ["no", "yes", "no"]
    rig.room.most_blocks = 10
    assert rig.pass_over(100.02)[0] == "stands"
    assert rig.pass_over(100.04)[0] == "no", "more than in the step before"
    assert rig.pass_over(100.06)[0] == "stands"
    rig.deferrals.finished("one that runs")
    assert rig.pass_over(100.08)[0] == "no"
    rig.room.most_blocks = 50
    rig.deferrals.finished("one that runs")
    assert rig.pass_over(100.10)[0] == "yes"


def test_nobody_passes_one_that_does_not_fit_for_longer_than_a_turn_takes() -> None:
    rig = Rig()
    rig.take_turns(8.0)
    rig.room.needs = {"r0": 50}
    assert [rig.pass_over(100.0 + s)[0] for s in (0.0, 4.0)] == ["no", "stands"]
    assert rig.pass_over(107.9) == ["no", "yes", "yes"]
    rig.pass_over(107.9 + RECHECK_S)
    assert rig.pass_over(108.5) == ["yes", "no", "no"], "it is tried, and first in line again"


def test_while_nothing_runs_one_that_does_not_fit_is_tried() -> None:
    rig = Rig()
    rig.take_turns(8.0)
    rig.room.needs = {"r0": 50}
    assert rig.pass_over()[0] == "no"
    rig.running = 0
    rig.deferrals.finished("whoever ran")
    assert rig.pass_over(100.02) == ["yes", "no", "no"]


def test_who_lets_others_pass_is_forgotten_when_it_is_over() -> None:
    rig = Rig()
    rig.take_turns(8.0)
    rig.room.needs = {"r0": 50}
    rig.pass_over()
    rig.admission.on_aborted("r0")
    rig.deferrals.finished("r0")
    assert rig.deferrals._passed == {}


def test_each_deferral_is_counted() -> None:
    rig = Rig()
    for step in range(5):
        rig.pass_over(100.0 + 0.02 * step)
    # Those that stood are counted twice a second, whatever happens to them meanwhile.
    assert rig.stats.totals == {"deferrals|older_waiting": 2}
    rig.deferrals.started()
    rig.deferrals.step_ended(100.0 + COUNT_INTERVAL_S, 1)
    assert rig.stats.totals == {"deferrals|older_waiting": 10}


def test_those_not_judged_again_do_not_become_stale() -> None:
    """Admission forgets who is not asked for; who is remembered as deferred is asked for all the same."""
    rig = Rig()
    for step in range(40):
        # r0 is admitted each time, in vain: there is no room for it.
        assert rig.pass_over(100.0 + 0.01 * step)[0] == "yes"
    rig.deferrals.started()
    rig.admission.on_started("r0")
    assert rig.ask("r2", 100.41) == "no", "r1 waits, and is older"


@dataclass
class RememberingLoop(Loop):
    """Asks through `Deferrals`, in short steps."""

    step_s: float = 0.05
    deferrals: Deferrals = field(init=False)

    def __post_init__(self) -> None:
        self.deferrals = Deferrals(self.admission, self.view, Stats(), lambda: self)

    @property
    def most_blocks(self) -> int:
        return self.free_blocks

    def lacks(self, request_id: str, need_blocks: int) -> bool:
        return request_id in self.failed and need_blocks > self.free_blocks

    def begin(self) -> None:
        pass

    def may_start(self, request: Request) -> bool:
        if self.deferrals.stands(request.request_id):
            return False
        return self.deferrals.decide(request.request_id, request.blocks, self.now_s)

    def started(self, request_id: str) -> None:
        super().started(request_id)
        self.deferrals.started()

    def finished(self, request_id: str) -> None:
        super().finished(request_id)
        self.deferrals.finished(request_id)

    def step(self) -> None:
        super().step()
        self.deferrals.step_ended(self.now_s, len(self.running))


@pytest.mark.parametrize("mode", ["program_fcfs", "working_set"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_request_starves_and_no_step_is_wasted(mode: Any, seed: int) -> None:
    rng = random.Random(seed)
    admission: AdmissionController[str] = AdmissionController(random_config(rng, mode))
    run_randomly(RememberingLoop(admission, rng.choice([1, 4, 16])), rng)


class CheckedController(AdmissionController[str]):
    """Asks `decide` of a copy of itself, now and then, when `still_waits` has spared the question."""

    spared = 0
    every = 1

    def still_waits(self, request_id: str) -> bool:
        is_checked = self.spared % self.every == 0
        decided = copy.deepcopy(self) if is_checked else self
        if not super().still_waits(request_id):
            return False
        type(self).spared += 1
        if not is_checked:
            return True
        mine, theirs = self._waiting[request_id], decided._waiting[request_id]
        # What it needed when it was asked for: with less it may be one of those that wait for nobody.
        verdict = decided.decide(
            request_id, theirs.needed_blocks, self._now_s, lacks_room=theirs.lacks_room
        )
        assert verdict.reason == "older_waiting"
        assert (mine.asked, mine.asked_scan) == (theirs.asked, theirs.asked_scan)
        assert mine.in_heaps == theirs.in_heaps
        return True


@pytest.mark.parametrize("mode", ["program_fcfs", "working_set"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_is_not_decided_anew_would_be_decided_in_the_same_way(mode: Any, seed: int) -> None:
    rng = random.Random(seed)
    CheckedController.spared, CheckedController.every = rng.randrange(41), 41
    admission = CheckedController(random_config(rng, mode))
    run_randomly(RememberingLoop(admission, rng.choice([1, 4, 16])), rng)


def test_those_behind_the_one_that_is_next_are_not_judged_again_when_one_starts() -> None:
    rig = Rig(n_requests=6)
    CheckedController.spared, CheckedController.every = 0, 1
    rig.admission.__class__ = CheckedController
    rig.pass_over(n_requests=6)
    rig.admission.on_started("r0")
    rig.deferrals.started()
    assert [rig.ask(f"r{i}") for i in (2, 3, 4, 5)] == ["no", "stands", "stands", "stands"]
    assert CheckedController.spared == 3
    assert rig.ask("r1") == "yes"
