"""Admission: order by program, working set, and above all that nobody waits for ever."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.admission import AdmissionController
from kvtier.admission_facts import AdmissionConfig, AdmissionDecision, AdmissionView
from kvtier.identity.program_arrivals import ProgramArrivals, rank_s
from kvtier.shared_blocks import Beginning, beginning
from kvtier.working_set import WorkingSet
from tests.unit.waiting_loop import Loop, Request, random_config, run_randomly

FCFS = AdmissionConfig(mode="program_fcfs")
VIEW = AdmissionView(now_s=100.0, free_blocks=100, total_blocks=100, running_requests=1)


def controller(
    config: AdmissionConfig = FCFS, view: AdmissionView = VIEW
) -> AdmissionController[str]:
    admission: AdmissionController[str] = AdmissionController(config)
    admission.begin_step(view)
    return admission


def arrive(
    admission: AdmissionController[str],
    request_id: str,
    program: str,
    program_arrival_s: float,
    *,
    now_s: float = 100.0,
    blocks: int = 10,
    returning: bool = True,
    priority: int = 0,
    starts_with: Beginning = (),
) -> None:
    admission.on_arrival(
        request_id,
        program,
        program_arrival_s=program_arrival_s,
        returning=returning,
        context_blocks=blocks,
        now_s=now_s,
        priority=priority,
        beginning=starts_with,
    )


def end(
    admission: AdmissionController[str],
    request_id: str,
    *,
    blocks: int = 10,
    goes_on: bool = True,
    now_s: float = 100.0,
) -> None:
    admission.on_turn_ended(
        request_id, context_blocks=blocks, goes_on=goes_on, gap_s=1.0, now_s=now_s
    )


def reason(admission: AdmissionController[str], request_id: str, now_s: float = 100.0) -> str:
    return admission.decide(request_id, 1, now_s).reason


def test_off_admits_all() -> None:
    admission = controller(AdmissionConfig(mode="off"))
    arrive(admission, "old", "A", 0.0)
    arrive(admission, "young", "B", 90.0)
    assert admission.decide("young", 10**9, 100.0) == AdmissionDecision(admit=True, reason="off")


def test_older_programs_come_first() -> None:
    admission = controller()
    arrive(admission, "young", "B", 90.0)
    arrive(admission, "old", "A", 50.0)
    assert reason(admission, "young") == "older_waiting"
    assert reason(admission, "old") == "first_in_order"
    admission.on_started("old")
    assert reason(admission, "young") == "first_in_order"
    assert reason(admission, "never heard of") == "not_waiting"
    assert reason(admission, "old") == "not_waiting"


ROOMY = replace(VIEW, total_blocks=1000, free_blocks=1000, open_places=8, step_blocks=100)


def test_returning_turns_that_could_all_start_at_once_wait_for_nobody() -> None:
    admission = controller(view=ROOMY)
    for number in (3, 1, 2, 0):
        arrive(admission, f"r{number}", f"P{number}", float(number))
    for number in (3, 1, 2, 0):
        assert reason(admission, f"r{number}") == "first_in_order"
        admission.on_started(f"r{number}")


@pytest.mark.parametrize(
    "scarce",
    [
        {"open_places": 2},
        {"step_blocks": 25},
        {"free_blocks": 40, "pinned_blocks": 30},
        {"free_blocks": 0, "pinned_blocks": 70},
    ],
)
def test_of_those_for_whom_there_is_no_room_together_the_first_in_order_start(
    scarce: dict[str, int],
) -> None:
    admission = controller(view=replace(ROOMY, **scarce))
    for number in (3, 1, 2, 0):
        arrive(admission, f"r{number}", f"P{number}", float(number))
    told = {number: reason(admission, f"r{number}") for number in (3, 1, 2, 0)}
    assert told == {
        0: "first_in_order",
        1: "first_in_order",
        2: "older_waiting",
        3: "older_waiting",
    }


def test_who_lacks_room_all_the_same_does_not_shut_out_an_older_one_that_fits() -> None:
    """Pinned blocks that running requests share cannot be had, though the view counts them; vLLM stops at whom it tries."""
    view = replace(ROOMY, free_blocks=100, pinned_blocks=600, step_blocks=1000)
    admission = controller(view=view)
    arrive(admission, "young", "B", 2.0, blocks=200)
    arrive(admission, "old", "A", 1.0, blocks=50)
    assert admission.decide("young", 200, 100.0).admit
    admission.begin_step(replace(view, now_s=100.1))
    verdict = admission.decide("young", 200, 100.1, lacks_room=True)
    assert (verdict.admit, verdict.reason) == (False, "older_waiting")
    assert admission.decide("old", 50, 100.1).admit


@pytest.mark.parametrize(("needed", "told"), [(2, "first_in_order"), (3, "older_waiting")])
def test_what_was_found_in_the_prefix_cache_need_not_be_computed(needed: int, told: str) -> None:
    admission = controller(view=replace(ROOMY, step_blocks=12))
    arrive(admission, "young", "B", 90.0)
    arrive(admission, "old", "A", 50.0)
    assert admission.decide("young", needed, 100.0).reason == told


def test_new_programs_wait_in_line_however_much_room_there_is() -> None:
    admission = controller(replace(FCFS, mode="working_set"), ROOMY)
    arrive(admission, "young", "B", 90.0, returning=False)
    arrive(admission, "old", "A", 50.0, returning=False)
    assert reason(admission, "young") == "older_waiting"
    assert reason(admission, "old") == "first_in_order"


def test_a_new_program_that_comes_first_has_its_room_kept() -> None:
    admission = controller(replace(FCFS, mode="working_set"), ROOMY)
    arrive(admission, "new", "A", 50.0, returning=False, blocks=100)
    arrive(admission, "returning", "B", 90.0)
    assert reason(admission, "returning") == "older_waiting"
    assert reason(admission, "new") == "first_in_order"
    admission.on_started("new")
    assert reason(admission, "returning") == "first_in_order"


def test_who_left_holds_nobody_back() -> None:
    admission = controller()
    arrive(admission, "young", "B", 90.0)
    arrive(admission, "old", "A", 50.0)
    end(admission, "old")
    assert reason(admission, "young") == "first_in_order"
    assert admission.waiting == 1


def test_who_has_waited_for_the_patience_comes_before_older_programs() -> None:
    admission = controller(replace(FCFS, aging_s=60.0))
    arrive(admission, "patient", "C", 99.0, now_s=100.0)
    arrive(admission, "second", "B", 98.0, now_s=101.0)
    arrive(admission, "old", "A", 0.0, now_s=150.0)
    assert reason(admission, "patient", 159.9) == "older_waiting"
    assert reason(admission, "patient", 160.0) == "first_in_order"
    assert reason(admission, "old", 160.0) == "older_waiting"
    assert reason(admission, "second", 162.0) == "older_waiting", "the longest waiting first"
    admission.on_started("patient")
    assert reason(admission, "second", 162.0) == "first_in_order"
    admission.on_started("second")
    assert reason(admission, "old", 162.0) == "first_in_order"


def test_the_more_urgent_comes_first_whatever_waits_longer() -> None:
    """The order of vLLM's queue under its priority policy: less is more urgent."""
    admission = controller(replace(FCFS, aging_s=60.0))
    arrive(admission, "batch", "A", 0.0, now_s=0.0, priority=5)
    arrive(admission, "urgent", "B", 100.0, now_s=100.0, priority=-1)
    arrive(admission, "usual", "C", 50.0, now_s=0.0)
    assert reason(admission, "urgent", 101.0) == "first_in_order"
    admission.on_started("urgent")
    assert reason(admission, "batch", 101.0) == "older_waiting"
    assert reason(admission, "usual", 101.0) == "first_in_order"
    admission.on_started("usual")
    assert reason(admission, "batch", 101.0) == "first_in_order"


@pytest.mark.parametrize("returning", [True, False])
def test_waiting_for_long_does_not_make_it_more_urgent(returning: bool) -> None:
    """Whether the other one returns or begins: they are looked for in two queues."""
    admission = controller(replace(FCFS, aging_s=60.0))
    arrive(admission, "batch", "A", 0.0, now_s=0.0, priority=10, returning=returning)
    arrive(admission, "urgent", "B", 100.0, now_s=100.0, returning=not returning)
    assert reason(admission, "batch", 101.0) == "older_waiting"
    assert reason(admission, "urgent", 101.0) == "first_in_order"


def test_what_runs_less_urgently_does_not_keep_a_new_program_waiting() -> None:
    config = AdmissionConfig(mode="working_set")
    admission = controller(config)
    arrive(admission, "batch", "A", 0.0, blocks=90, priority=5)
    admission.on_started("batch")
    arrive(admission, "more batch", "B", 1.0, blocks=90, returning=False, priority=5)
    assert reason(admission, "more batch") == "working_set_full"
    arrive(admission, "urgent", "C", 2.0, blocks=90, returning=False)
    assert reason(admission, "urgent") == "first_in_order"
    end(admission, "batch")
    arrive(admission, "other", "D", 3.0, blocks=90, priority=0)
    admission.on_started("other")
    arrive(admission, "as urgent", "E", 4.0, blocks=90, returning=False)
    assert reason(admission, "as urgent") == "older_waiting"
    admission.on_started("urgent")
    assert reason(admission, "as urgent") == "working_set_full"


def test_long_running_programs_keep_their_order() -> None:
    """What aging by a fixed amount would lose: all of these programs are older than it."""
    admission = controller(replace(FCFS, aging_s=60.0))
    arrive(admission, "young", "B", 100.0, now_s=1000.0)
    arrive(admission, "old", "A", 0.0, now_s=1010.0)
    assert reason(admission, "young", 1011.0) == "older_waiting"
    assert reason(admission, "old", 1011.0) == "first_in_order"


@pytest.mark.parametrize(
    ("round_s", "patience_s"), [(0.0, 60.0), (25.0, 25.0), (0.01, 1.0), (1e9, 60.0)]
)
def test_patience_is_a_round_of_computing_everything_anew(
    round_s: float, patience_s: float
) -> None:
    admission = controller(replace(FCFS, aging_s=60.0), replace(VIEW, round_s=round_s))
    assert admission.patience_s == patience_s
    arrive(admission, "young", "B", 90.0)
    arrive(admission, "old", "A", 0.0, now_s=100.0 + patience_s / 2)
    assert reason(admission, "young", 100.0 + patience_s * 0.99) == "older_waiting"
    assert reason(admission, "young", 100.0 + patience_s) == "first_in_order"


def test_busy_programs_run_pause_or_wait_to_begin() -> None:
    admission = controller(AdmissionConfig(long_pause_s=10.0))
    arrive(admission, "a1", "A", 100.0, blocks=50, returning=False)
    arrive(admission, "b1", "B", 100.0, blocks=30, returning=False)
    assert admission.busy == (2, 80)
    admission.on_started("a1")
    assert admission.busy == (2, 80)
    end(admission, "a1")
    end(admission, "b1")
    assert admission.busy == (1, 50)
    admission.begin_step(replace(VIEW, now_s=110.0))
    assert admission.busy == (0, 0)


def test_who_was_admitted_but_found_no_room_gives_way_to_an_older_program() -> None:
    admission = controller()
    arrive(admission, "young", "B", 90.0)
    assert reason(admission, "young") == "first_in_order"
    admission.begin_step(VIEW)
    assert reason(admission, "young") == "retry"
    arrive(admission, "old", "A", 0.0)
    assert reason(admission, "young") == "older_waiting"
    assert reason(admission, "old") == "first_in_order"


def test_without_aging_the_program_alone_counts() -> None:
    admission = controller(AdmissionConfig(aging_s=0.0))
    arrive(admission, "a1", "A", 100.0, blocks=90, returning=False)
    admission.on_started("a1")
    arrive(admission, "b1", "B", 100.0, blocks=90, returning=False)
    assert reason(admission, "b1", 1e6) == "working_set_full"


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0.1, 1e4))
def test_rank_lies_between_the_aged_and_the_real_arrival(
    program_s: float, arrival_s: float, aging_s: float
) -> None:
    assert rank_s(program_s, arrival_s, 0.0) == min(program_s, arrival_s)
    assert arrival_s - aging_s <= rank_s(program_s, arrival_s, aging_s) <= arrival_s


def test_a_request_that_nobody_asks_for_holds_others_back_for_a_few_scans_only() -> None:
    admission = controller(replace(FCFS, stale_scans=3))
    arrive(admission, "grammar", "A", 0.0)
    arrive(admission, "young", "B", 90.0)
    reasons = []
    for _ in range(5):
        reasons.append(reason(admission, "young"))
        admission.begin_step(VIEW)
    assert reasons == ["older_waiting"] * 3 + ["first_in_order", "retry"]
    arrive(admission, "younger", "C", 95.0)
    assert reason(admission, "grammar") == "first_in_order"
    assert reason(admission, "younger") == "older_waiting"


def test_steps_without_questions_make_nobody_stale() -> None:
    admission = controller(replace(FCFS, stale_scans=3))
    arrive(admission, "young", "B", 90.0)
    arrive(admission, "old", "A", 0.0)
    for _ in range(100):
        admission.begin_step(VIEW)
    assert reason(admission, "young") == "older_waiting"


def test_a_request_without_room_stops_holding_others_back() -> None:
    admission = controller(replace(FCFS, blocked_after_s=5.0))
    arrive(admission, "huge", "A", 0.0)
    arrive(admission, "young", "B", 90.0)
    for now_s, expected in (
        (100.0, "older_waiting"),
        (104.9, "older_waiting"),
        (105.0, "first_in_order"),
    ):
        admission.begin_step(replace(VIEW, now_s=now_s))
        assert reason(admission, "huge", now_s) == ("first_in_order" if now_s == 100.0 else "retry")
        assert reason(admission, "young", now_s) == expected


def test_deferral_ends_after_its_limit() -> None:
    admission = controller(replace(FCFS, max_defer_s=20.0, blocked_after_s=1e6))
    arrive(admission, "old", "A", 0.0)
    arrive(admission, "young", "B", 90.0)
    for now_s, expected in (
        (100.0, "older_waiting"),
        (119.0, "older_waiting"),
        (120.0, "deferred_long_enough"),
    ):
        admission.begin_step(replace(VIEW, now_s=now_s))
        assert reason(admission, "old", now_s) in ("first_in_order", "retry")
        assert reason(admission, "young", now_s) == expected


def test_with_nothing_running_the_first_of_those_asked_for_is_let_through() -> None:
    idle = replace(VIEW, running_requests=0)
    admission = controller(FCFS, idle)
    arrive(admission, "grammar", "A", 0.0)
    arrive(admission, "young", "B", 90.0)
    assert reason(admission, "young") == "nothing_running"
    busy = controller()
    for request_id, at in (("c", 95.0), ("b", 90.0), ("a", 80.0)):
        arrive(busy, request_id, request_id, at)
    arrive(busy, "running", "R", 0.0)
    assert reason(busy, "running") == "first_in_order"
    for request_id in "cba":
        assert reason(busy, request_id) == "older_waiting"
    busy.on_started("running")
    busy.begin_step(VIEW)
    end(busy, "running")
    assert [reason(busy, request_id) for request_id in "cba"] == [
        "older_waiting",
        "older_waiting",
        "nothing_running",
    ]


def test_new_programs_wait_until_the_working_set_fits() -> None:
    admission = controller(AdmissionConfig(headroom_fraction=0.1, long_pause_s=10.0))
    arrive(admission, "a1", "A", 100.0, blocks=50, returning=False)
    arrive(admission, "b1", "B", 100.0, blocks=60, returning=False)
    assert reason(admission, "a1") == "first_in_order"
    admission.on_started("a1")
    assert admission.working_set_blocks == 50
    assert reason(admission, "b1") == "working_set_full"
    arrive(admission, "c1", "C", 100.0, blocks=10, returning=False)
    assert reason(admission, "c1") == "older_waiting"
    arrive(admission, "d7", "D", 100.5, blocks=20, now_s=101.0)
    assert reason(admission, "d7") == "first_in_order"
    assert admission.working_set_blocks == 70, "who waits to go on counts, too"
    end(admission, "a1")
    assert reason(admission, "b1") == "working_set_full"
    admission.begin_step(replace(VIEW, now_s=112.0))
    assert admission.working_set_blocks == 20
    assert reason(admission, "d7", 112.0) == "older_waiting"
    assert reason(admission, "b1", 112.0) == "first_in_order"


def test_with_a_cpu_tier_pauses_take_no_room_on_the_gpu() -> None:
    config = AdmissionConfig(headroom_fraction=0.0)
    for tier_blocks, told in (
        (0, "working_set_full"),
        (40, "working_set_full"),
        (50, "first_in_order"),
    ):
        admission = controller(config, replace(VIEW, tier_blocks=tier_blocks))
        arrive(admission, "a1", "A", 100.0, blocks=60, returning=False)
        admission.on_started("a1")
        end(admission, "a1")
        arrive(admission, "b1", "B", 100.0, blocks=90, returning=False)
        admission.begin_step(replace(VIEW, tier_blocks=tier_blocks))
        assert reason(admission, "b1") == told


def test_a_program_that_gives_up_waiting_pauses_again() -> None:
    admission = controller(AdmissionConfig(long_pause_s=10.0))
    arrive(admission, "a1", "A", 100.0, blocks=50)
    assert admission.working_set_blocks == 50
    end(admission, "a1")
    admission.begin_step(replace(VIEW, now_s=109.0))
    assert admission.working_set_blocks == 50
    admission.begin_step(replace(VIEW, now_s=110.0))
    assert admission.working_set_blocks == 0


def test_a_long_pause_counts_while_its_kv_is_resident() -> None:
    admission = controller(AdmissionConfig(long_pause_s=10.0))
    arrive(admission, "a1", "A", 100.0, blocks=50, returning=False)
    admission.on_started("a1")
    end(admission, "a1")
    admission.on_kv_pinned("A")
    admission.begin_step(replace(VIEW, now_s=500.0))
    assert admission.working_set_blocks == 50
    admission.on_kv_released("A")
    assert admission.working_set_blocks == 0


def test_a_new_program_does_not_ask_for_blocks_that_are_not_there() -> None:
    view = replace(VIEW, free_blocks=5, pinned_blocks=5)
    admission = controller(AdmissionConfig(), view)
    arrive(admission, "a", "A", 100.0, returning=False)
    assert admission.decide("a", 11, 100.0).reason == "no_free_blocks"
    assert admission.decide("a", 10, 100.0).reason == "first_in_order"


def test_an_aged_new_program_is_held_back_by_order_only() -> None:
    admission = controller(AdmissionConfig(aging_s=60.0))
    arrive(admission, "a1", "A", 100.0, blocks=90, returning=False)
    admission.on_started("a1")
    arrive(admission, "b1", "B", 100.0, blocks=90, returning=False)
    assert reason(admission, "b1", 159.0) == "working_set_full"
    assert reason(admission, "b1", 160.0) == "first_in_order"


def test_ended_programs_do_not_count() -> None:
    admission = controller(AdmissionConfig())
    for name in ("a", "b"):
        arrive(admission, name, name, 100.0, blocks=20, returning=False)
        admission.on_started(name)
    end(admission, "a")
    admission.on_program_ended("a")
    admission.on_program_ended("b")
    assert admission.working_set_blocks == 20
    end(admission, "b")
    assert admission.working_set_blocks == 0
    admission.on_program_ended("unknown")


def test_settings_that_could_wait_for_ever_are_refused() -> None:
    for changed in (
        {"max_defer_s": float("inf")},
        {"backfill_turns": -1.0},
        {"backfill_turns": float("inf")},
        {"aging_s": float("nan")},
        {"blocked_after_s": -1.0},
        {"stale_scans": 0},
        {"headroom_fraction": 1.0},
    ):
        with pytest.raises(ValueError, match="must be"):
            replace(FCFS, **changed)


def test_heaps_stay_in_proportion_to_the_waiting_requests() -> None:
    admission = controller()
    arrive(admission, "first", "F", 0.0)
    for i in range(10_000):
        arrive(admission, f"r{i}", f"p{i}", 1.0 + i / 1e6)
        admission.on_started(f"r{i}")
        end(admission, f"r{i}")
    assert sum(map(len, admission._lines._heaps)) < 200
    assert not admission._started
    admission.begin_step(replace(VIEW, now_s=1e6))
    assert len(admission._working_set) == 1, "the first one still waits"
    assert not admission._working_set._pauses


def test_pauses_are_forgotten_where_nobody_asks_who_may_start() -> None:
    # As in shadow mode, and while kvtier is off.
    admission = controller()
    for i in range(1000):
        now_s = 100.0 + i
        arrive(admission, f"r{i}", "p", 0.0, now_s=now_s)
        admission.on_started(f"r{i}")
        end(admission, f"r{i}", now_s=now_s)
    assert len(admission._working_set._pauses) <= FCFS.long_pause_s + 1


def test_a_question_costs_a_few_heap_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    admission = controller()
    n = 2000
    for i in range(n):
        arrive(admission, f"r{i}", f"p{i}", 100.0 - i / n)
    looks = 0
    competes = admission._competes

    def count(*args: Any, **kwargs: Any) -> bool:
        nonlocal looks
        looks += 1
        return competes(*args, **kwargs)

    monkeypatch.setattr(admission, "_competes", count)
    for _ in range(3):
        admission.begin_step(VIEW)
        for i in range(n):
            admission.decide(f"r{i}", 1, 100.0)
    assert looks <= 3 * n * 2


def test_busy_programs_are_counted_once() -> None:
    busy: WorkingSet[str] = WorkingSet(long_pause_s=10.0)
    busy.start("a", 10)
    busy.start("a", 30)
    assert (busy.blocks, busy.active_blocks) == (30, 30)
    assert busy.fits("a", 50, 50, 50)
    assert not busy.fits("b", 30, 50, 100)
    busy.pause("a", 0.0)
    busy.expire(100.0)
    assert (busy.blocks, busy.active_blocks) == (30, 30)
    busy.pause("a", 100.0)
    assert (busy.blocks, busy.active_blocks) == (30, 0)
    assert busy.fits("b", 30, 50, 60)
    assert not busy.fits("b", 30, 50, 59)
    busy.wait("a", 40)
    assert (busy.blocks, busy.active_blocks) == (40, 40)
    busy.start("a", 5, waited=True)
    busy.pause("a", 105.0)
    busy.expire(110.0)
    assert (busy.blocks, busy.active_blocks) == (40, 0)
    busy.expire(115.0)
    assert (busy.blocks, busy.active_blocks, len(busy)) == (0, 0, 0)


INSTRUCTIONS = [b"%d" % i for i in range(50)]


def begins(program: str) -> Beginning:
    """50 blocks of instructions, and 10 of its own."""
    return beginning([*INSTRUCTIONS, *(b"%d %s" % (i, program.encode()) for i in range(10))])


def test_what_busy_programs_share_is_counted_once() -> None:
    busy: WorkingSet[str] = WorkingSet(long_pause_s=10.0)
    n_shared = 0
    for n_programs, program in enumerate("abc", 1):
        before = busy.blocks
        assert busy.fits(program, 60, before + 60, before + 60, begins(program))
        busy.start(program, 60, begins(program))
        n_shared = n_shared or 60 * n_programs - busy.blocks  # 0 while there is one
        assert busy.blocks == busy.active_blocks == 60 * n_programs - n_shared * (n_programs - 1)
    assert 45 <= n_shared <= 50
    own = 60 - n_shared
    assert busy.fits("d", 60, busy.blocks + own, busy.blocks + own, begins("d"))
    assert not busy.fits("d", 60, busy.blocks + own - 1, busy.blocks + own, begins("d"))
    busy.pause("a", 0.0)
    busy.pause("b", 0.0)
    # Two that pause share with one that runs; active is that one alone, with all that it has.
    assert (busy.blocks, busy.active_blocks) == (60 + 2 * own, 60)
    busy.expire(20.0)
    assert (busy.blocks, busy.active_blocks) == (60, 60)
    busy.pause("c", 20.0)
    busy.expire(40.0)
    assert (busy.blocks, busy.active_blocks, len(busy._shared)) == (0, 0, 0)


def test_a_new_program_needs_room_only_for_what_others_do_not_have() -> None:
    # Nothing is known of growth here, and much is expected.
    config = AdmissionConfig(mode="working_set", overcommit=3.0)
    for shared, expected in ((True, "first_in_order"), (False, "working_set_full")):
        admission = controller(config)
        for number, program in enumerate("abc"):
            starts_with = begins(program) if shared else ()
            arrived_s = float(number)
            arrive(
                admission,
                program,
                program,
                arrived_s,
                blocks=60,
                returning=False,
                starts_with=starts_with,
            )
        admission.on_started("a")
        assert reason(admission, "b") == expected


def test_patience_goes_by_contexts_as_if_nothing_were_kept() -> None:
    for shared in (True, False):
        admission = controller()
        for number, program in enumerate("abc"):
            starts_with = begins(program) if shared else ()
            arrive(admission, program, program, float(number), blocks=60, starts_with=starts_with)
        assert admission.busy == (3, 180)


def test_arrivals_are_remembered_for_the_last_active_programs() -> None:
    arrivals = ProgramArrivals(max_programs=2)
    assert arrivals.first_arrival_s("a", 1.0) == 1.0
    assert arrivals.first_arrival_s("b", 2.0) == 2.0
    assert arrivals.first_arrival_s("a", 3.0) == 1.0
    assert arrivals.first_arrival_s("c", 4.0) == 4.0
    assert arrivals.first_arrival_s("b", 5.0) == 5.0
    assert len(arrivals) == 2


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["program_fcfs", "working_set"]))
def test_every_request_is_admitted_in_time_and_no_step_is_wasted(seed: int, mode: Any) -> None:
    rng = random.Random(seed)
    loop = Loop(AdmissionController(random_config(rng, mode)), rng.choice([1, 4, 16]))
    run_randomly(loop, rng)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_nobody_is_deferred_beyond_the_limit(seed: int) -> None:
    rng = random.Random(seed)
    config = AdmissionConfig(max_defer_s=7.0, aging_s=1000.0, blocked_after_s=1000.0)
    admission: AdmissionController[int] = AdmissionController(config)
    first_no: dict[str, float] = {}
    for step in range(100):
        now_s = step * 0.5
        admission.begin_step(AdmissionView(now_s, 0, 100, running_requests=1))
        admission.on_arrival(
            f"r{step}",
            step,
            program_arrival_s=now_s - rng.random() * 900,
            returning=rng.random() < 0.5,
            context_blocks=50,
            now_s=now_s,
        )
        for request_id in [f"r{i}" for i in range(step + 1)]:
            if not admission.decide(request_id, 10, now_s).admit:
                assert now_s - first_no.setdefault(request_id, now_s) < 7.0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_others_pass_one_that_does_not_fit_for_a_bounded_time(seed: int) -> None:
    """From then on memory is left for it: a stream of small turns without end does not starve it."""
    rng = random.Random(seed)
    turns = rng.choice([0.0, 0.5, 1.0, 4.0])
    config = AdmissionConfig(
        aging_s=rng.choice([0.0, 600.0]), blocked_after_s=5.0, backfill_turns=turns
    )
    admission: AdmissionController[str] = AdmissionController(config)
    loop = Loop(admission, max_running=100)
    longest_turn_s, first_failed_s, limit_s = 20 * loop.step_s, None, 0.0
    names = iter(range(10**6))

    def send(program: str, program_arrival_s: float, blocks: int, steps: int) -> None:
        name = f"r{next(names)}"
        loop.queue.append(Request(name, program, blocks, steps, loop.now_s))
        arrive(admission, name, program, program_arrival_s, now_s=loop.now_s, blocks=blocks)

    for step in range(300):
        if step == 50:
            send("big", 0.0, rng.randint(30, 100), 1)
            big = loop.queue.pop()
            loop.queue.insert(0, big)
        while len(loop.queue) < 8:
            send(f"s{step}", 1.0 + step, rng.randint(1, 30), rng.randint(1, 20))
        queued = list(loop.queue)
        loop.step()
        if step >= 50:
            limit_s = max(limit_s, turns * admission._forecast.turn_s)
            if first_failed_s is None and big.request_id in loop.failed:
                first_failed_s = loop.now_s
            if big not in loop.queue:
                break
            passed = [r for r in queued[queued.index(big) :] if r not in loop.queue]
            if first_failed_s is not None and loop.now_s > first_failed_s + limit_s + loop.step_s:
                assert not passed
    assert big not in loop.queue
    waited_s = 0.0 if first_failed_s is None else loop.now_s - first_failed_s
    assert waited_s <= limit_s + longest_turn_s + 3 * loop.step_s


def test_a_request_that_has_aged_lets_nobody_pass() -> None:
    admission = controller(AdmissionConfig(aging_s=4.0, backfill_turns=1.0))
    admission._forecast._turn_s.add(10.0)
    arrive(admission, "big", "A", 0.0, blocks=90)
    assert admission.decide("big", 90, 101.0, lacks_room=True).reason == "lets_pass"
    assert admission.decide("big", 90, 104.0, lacks_room=True).admit


def test_a_new_program_may_pass_one_that_does_not_fit() -> None:
    admission = controller(AdmissionConfig(backfill_turns=1.0), replace(VIEW, total_blocks=1000))
    admission._forecast._turn_s.add(10.0)
    arrive(admission, "big", "A", 0.0, blocks=150)
    arrive(admission, "new", "N", 99.0, blocks=5, returning=False)
    assert reason(admission, "big") == "first_in_order"
    assert reason(admission, "new") == "older_waiting"
    assert admission.decide("big", 150, 101.0, lacks_room=True).reason == "lets_pass"
    assert reason(admission, "new", 101.0) == "first_in_order"


def test_new_programs_pass_one_that_the_working_set_has_no_room_for_but_not_for_long() -> None:
    admission = controller(AdmissionConfig(backfill_turns=1.0))
    admission._forecast._turn_s.add(10.0)
    arrive(admission, "runs", "R", 0.0, blocks=80)
    admission.on_started("runs")
    arrive(admission, "big", "B", 90.0, blocks=50, returning=False)
    arrive(admission, "small", "S", 99.0, blocks=5, returning=False)
    assert reason(admission, "small") == "older_waiting"
    assert reason(admission, "big") == "working_set_full"
    assert reason(admission, "small") == "first_in_order"
    admission.on_started("small")
    arrive(admission, "late", "L", 109.0, blocks=5, returning=False, now_s=109.0)
    admission.begin_step(replace(VIEW, now_s=110.0))
    assert admission.decide("big", 50, 110.0) == AdmissionDecision(
        admit=False, reason="working_set_full"
    )
    assert reason(admission, "late", 110.0) == "older_waiting"


def test_nobody_is_let_pass_beyond_the_longest_deferral() -> None:
    admission = controller(AdmissionConfig(max_defer_s=3.0, backfill_turns=1.0))
    admission._forecast._turn_s.add(10.0)
    arrive(admission, "big", "A", 0.0, blocks=90)
    assert admission.decide("big", 90, 100.0, lacks_room=True).reason == "lets_pass"
    late = admission.decide("big", 90, 103.0, lacks_room=True)
    assert late == AdmissionDecision(admit=True, reason="deferred_long_enough")


@pytest.mark.parametrize("tried", [False, True])
def test_while_nothing_runs_one_that_does_not_fit_is_tried(tried: bool) -> None:
    admission = controller(AdmissionConfig(backfill_turns=1.0))
    admission._forecast._turn_s.add(10.0)
    arrive(admission, "big", "A", 0.0, blocks=90)
    if tried:
        assert admission.decide("big", 90, 100.0).admit
        assert admission.decide("big", 90, 100.0, lacks_room=True).reason == "lets_pass"
    admission.begin_step(replace(VIEW, now_s=101.0, running_requests=0))
    assert admission.decide("big", 90, 101.0, lacks_room=True).reason == "nothing_running"


def test_before_a_turn_has_ended_nobody_passes() -> None:
    admission = controller(replace(FCFS, backfill_turns=1.0))
    arrive(admission, "big", "A", 0.0, blocks=90)
    assert admission.decide("big", 90, 101.0, lacks_room=True).admit


def test_a_new_program_waits_where_those_at_work_are_expected_to_grow() -> None:
    admission = controller(AdmissionConfig(), replace(VIEW, total_blocks=800, free_blocks=700))
    for turn in range(4):
        arrive(admission, f"a{turn}", "A", 0.0, blocks=20 + 80 * turn, returning=turn > 0)
        admission.on_started(f"a{turn}")
        end(admission, f"a{turn}", blocks=100 + 80 * turn)
    # Two contexts of 340 blocks fit, but not when they have grown.
    arrive(admission, "a4", "A", 0.0, blocks=340)
    admission.on_started("a4")
    arrive(admission, "new", "N", 100.0, blocks=340, returning=False)
    assert reason(admission, "new") == "working_set_full"
    generous = controller(
        AdmissionConfig(overcommit=3.0), replace(VIEW, total_blocks=800, free_blocks=700)
    )
    generous._forecast = admission._forecast
    arrive(generous, "new", "N", 100.0, blocks=340, returning=False)
    assert reason(generous, "new") == "first_in_order"
    # When A has given its answer, nothing is expected of it.
    end(admission, "a4", blocks=420, goes_on=False)
    arrive(admission, "other", "O", 0.0, blocks=5)
    admission.on_started("other")
    admission.begin_step(replace(VIEW, now_s=110.0, total_blocks=1000, free_blocks=700))
    assert reason(admission, "new", 110.0) == "first_in_order"


def test_a_new_program_has_more_patience_than_a_returning_turn() -> None:
    # A round takes 20 s; new programs are patient for 600 s.
    view = replace(VIEW, round_s=20.0)
    admission = controller(AdmissionConfig(), view)
    arrive(admission, "big", "A", 0.0, blocks=95)
    admission.on_started("big")
    arrive(admission, "new", "N", 100.0, blocks=50, returning=False)
    for now_s in (110.0, 690.0):
        admission.begin_step(replace(view, now_s=now_s))
        assert reason(admission, "new", now_s) == "working_set_full"
    arrive(admission, "back", "B", 50.0, blocks=1, now_s=695.0)
    admission.begin_step(replace(view, now_s=701.0))
    # Now it comes before a returning turn of an older program, too, that waits for a shorter time.
    assert reason(admission, "back", 701.0) == "older_waiting"
    assert reason(admission, "new", 701.0) == "first_in_order"


def test_a_turn_that_has_aged_comes_before_those_that_have_not_whoever_came_first() -> None:
    view = replace(VIEW, total_blocks=1000, free_blocks=600, round_s=20.0)
    admission = controller(AdmissionConfig(), view)
    arrive(admission, "runs", "R", 0.0, blocks=400)
    admission.on_started("runs")
    arrive(admission, "big", "B", 100.0, blocks=900, now_s=101.0, returning=False)
    arrive(admission, "small", "S", 102.0, blocks=50, now_s=102.0, returning=False)
    arrive(admission, "back", "A", 120.0, blocks=50, now_s=130.0)
    admission.begin_step(replace(view, now_s=131.0))
    assert reason(admission, "small", 131.0) == "older_waiting"
    admission.begin_step(replace(view, now_s=151.0))
    assert reason(admission, "small", 151.0) == "older_waiting"
    assert reason(admission, "back", 151.0) == "first_in_order"


def test_without_aging_no_turn_ever_ages() -> None:
    admission = controller(AdmissionConfig(aging_s=0.0), replace(VIEW, round_s=20.0))
    assert admission.patience_s == float("inf")
