"""Loads go before other threads where the system lets them, stores never, and nothing depends on it."""

from __future__ import annotations

import errno
import logging
import os
import threading
from typing import TYPE_CHECKING

import pytest

from kvtier.copies import urgency
from kvtier.copies.kernel import load_kernel
from kvtier.copies.urgency import LEAST_NICENESS, URGENT, Urgency
from kvtier.copy_engine import CpuCopyEngine
from tests.unit.copy_cases import make_case

if TYPE_CHECKING:
    from kvtier.copy_engine import Direction

WAIT_S = 30.0


class Priorities:
    """Niceness by thread, as the system keeps it."""

    def __init__(self, usual: int = 0, error: OSError | None = None) -> None:
        self.usual, self.error = usual, error
        self.by_thread: dict[int, int] = {}
        self.asked: list[int] = []

    def get(self, which: int, thread: int) -> int:
        assert which == os.PRIO_PROCESS
        return self.by_thread.get(thread, self.usual)

    def set(self, which: int, thread: int, niceness: int) -> None:
        assert which == os.PRIO_PROCESS
        self.asked.append(niceness)
        if self.error is not None:
            raise self.error
        self.by_thread[thread] = niceness

    def mine(self) -> int:
        return self.get(os.PRIO_PROCESS, threading.get_native_id())


def given(monkeypatch: pytest.MonkeyPatch, priorities: Priorities) -> Priorities:
    monkeypatch.setattr(os, "getpriority", priorities.get)
    monkeypatch.setattr(os, "setpriority", priorities.set)
    return priorities


def refused() -> PermissionError:
    return PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("direction", ["load", "store"])
def test_only_loads_are_urgent(monkeypatch: pytest.MonkeyPatch, direction: Direction) -> None:
    priorities = given(monkeypatch, Priorities())
    found: list[int] = []
    copy = load_kernel()

    def kernel(*told: object) -> int:
        found.append(priorities.mine())
        return copy(*told)  # type: ignore[arg-type]

    case = make_case()
    with CpuCopyEngine(case.layout, case.region, kernel=kernel) as engine:
        for _ in range(2):
            engine.submit(case.order(direction), 0.0)
            assert engine.drain(WAIT_S)
        assert all(result.ok for result in engine.poll())
    assert found == [URGENT if direction == "load" else 0] * 2
    assert set(priorities.by_thread.values()) <= {0}


def test_a_thread_is_as_nice_again_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    priorities = given(monkeypatch, Priorities(usual=4))
    mine = Urgency()
    found: list[int] = []

    def copy() -> None:
        with mine.raised():
            found.append(priorities.mine())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        copy()
    assert found == [4 + URGENT]
    assert priorities.mine() == 4


def test_niceness_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    priorities = given(monkeypatch, Priorities(usual=-18))
    with Urgency().raised():
        assert priorities.mine() == LEAST_NICENESS


def test_who_may_not_asks_once_and_copies_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    priorities = given(monkeypatch, Priorities(error=refused()))
    case = make_case()
    with (
        caplog.at_level(logging.INFO, logger=urgency.__name__),
        CpuCopyEngine(case.layout, case.region) as engine,
    ):
        for _ in range(3):
            engine.submit(case.order("load"), 0.0)
            assert engine.drain(WAIT_S)
        assert [result.ok for result in engine.poll()] == [True] * 3
    assert priorities.asked == [URGENT]
    assert caplog.text.count("share their core") == 1


def test_who_may_not_even_ask_copies_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(which: int, thread: int) -> int:
        raise refused()

    monkeypatch.setattr(os, "getpriority", asked)
    with Urgency().raised():
        pass
    case = make_case()
    with CpuCopyEngine(case.layout, case.region) as engine:
        engine.submit(case.order("load"), 0.0)
        assert engine.drain(WAIT_S)
        assert [result.ok for result in engine.poll()] == [True]


def test_priority_is_of_one_thread_alone() -> None:
    # To be nicer is allowed to everybody, and for good: in a thread that ends.
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found: list[int] = []

    def nicer() -> None:
        mine = Urgency()
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(before + 2, 19))
        found.append(os.getpriority(os.PRIO_PROCESS, mine._thread))

    thread = threading.Thread(target=nicer)
    thread.start()
    thread.join()
    assert found == [min(before + 2, 19)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
