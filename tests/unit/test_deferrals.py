"""Remembered deferrals: asked again only when something could have changed, and never for too long."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.admission import AdmissionController
from kvtier.admission_facts import AdmissionConfig, AdmissionView
from kvtier.stats import Stats
from kvtier.turns.deferrals import RECHECK_S, Deferrals
from tests.unit.waiting_loop import Loop, Request, random_config, run_randomly


class Rig:
    """Requests `r0`, `r1`... of programs as old as their number is small."""

    def __init__(self, mode: Any = "program_fcfs", n_requests: int = 3, blocks: int = 10) -> None:
        self.admission: AdmissionController[str] = AdmissionController(AdmissionConfig(mode=mode))
        self.stats = Stats()
        self.views = 0
        self.running = 1
        self.deferrals = Deferrals(self.admission, self.view, self.stats)
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
    rig = Rig()
    rig.pass_over(100.0)
    assert rig.pass_over(100.0 + RECHECK_S) == ["yes", "stands", "stands"]
    assert rig.pass_over(100.0 + RECHECK_S) == ["yes", "no", "no"]


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


def test_each_deferral_is_counted() -> None:
    rig = Rig()
    for step in range(5):
        rig.pass_over(100.0 + 0.02 * step)
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
        self.deferrals = Deferrals(self.admission, self.view, Stats())

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
