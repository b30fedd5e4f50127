"""The loop that puts batches on a stream: what is one batch, when it waits, pauses and stops."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.copies import issue
from kvtier.copies.driver import Driver, DriverError, load_driver
from kvtier.copies.kernel import NO_DEADLINE_NS
from tests.unit.fake_cuda import FakeDriver

STREAM = 77
BUSY = 55


class Loop:
    """The loop over runs of given sizes, which copy zeros onto zeros."""

    def __init__(self, fake: FakeDriver, *, compiled: bool) -> None:
        self.fake = fake
        self.ring = np.array([0, 11, 12], np.int64)
        self.state = np.zeros(issue.STATE_FIELDS, np.int64)
        self.control = np.array([0, NO_DEADLINE_NS, 0, BUSY], np.int64)
        self._memory = np.zeros(1 << 16, np.uint8)
        self._loop = (issue.compiled_loop if compiled else issue.python_loop)(fake.driver)
        self._attributes = np.array([1, 0, 0], np.int64)

    def __call__(
        self, sizes: list[int], *, mode: int = issue.BY_BATCH, most: tuple[int, int] = (100, 4)
    ) -> int:
        at = self._memory.ctypes.data
        ends = np.full(len(sizes), at, np.int64)
        launch = np.zeros(issue.LAUNCH_FIELDS, np.int64)
        return self._loop(
            mode,
            ends,
            ends,
            np.array(sizes, np.int64),
            *most,
            self._attributes.ctypes.data,
            STREAM,
            self.ring,
            launch,
            np.zeros(issue.SCRATCH_FIELDS, np.int64),
            self.state,
            self.control,
        )


@pytest.fixture(params=[True, False], ids=["compiled", "python"])
def loop(request: pytest.FixtureRequest) -> Loop:
    return Loop(FakeDriver(), compiled=request.param)


def test_a_batch_is_bounded_by_bytes_and_by_runs(loop: Loop) -> None:
    assert loop([60, 40, 1, 250, 10, 10, 10, 10, 10]) == issue.ISSUED
    assert [call[1] for call in loop.fake.copies()] == [2, 1, 1, 4, 1]
    assert loop.state[issue.STATE_BYTES] == 401
    assert loop.state[issue.STATE_ISSUE_NS] > 0


def test_nothing_to_copy_issues_nothing(loop: Loop) -> None:
    assert loop([]) == issue.ISSUED
    assert loop.fake.calls == []


def test_it_waits_for_the_oldest_of_its_events(loop: Loop) -> None:
    assert loop([100] * 4) == issue.ISSUED
    events = [c[:2] for c in loop.fake.calls if c[0] in {"record", "synchronize"}]
    assert events == [
        ("record", 11),
        ("record", 12),
        ("synchronize", 11),
        ("record", 11),
        ("synchronize", 12),
        ("record", 12),
    ]


def test_it_pauses_while_the_gpu_computes_and_not_longer(loop: Loop) -> None:
    loop.control[issue.CONTROL_PACE] = 1  # a byte a second
    loop.fake.computing = 3
    assert loop([100, 100]) == issue.ISSUED
    calls = [call[0] for call in loop.fake.calls]
    assert calls == ["batch", "record", *["query"] * 4, "batch", "record"]
    assert {call[1] for call in loop.fake.calls if call[0] == "query"} == {BUSY}


def test_a_stop_ends_a_pause_too(loop: Loop) -> None:
    loop.control[issue.CONTROL_PACE] = 1

    def query(_: int) -> int:
        loop.control[issue.CONTROL_STOP] = 1
        return 600

    loop.fake._cuEventQuery = query  # type: ignore[method-assign]
    assert loop([100, 100]) == issue.STOPPED
    assert loop.state[issue.STATE_BYTES] == 100


def test_a_deadline_that_has_passed_ends_it(loop: Loop) -> None:
    loop.control[issue.CONTROL_DEADLINE_NS] = 1
    assert loop([100]) == issue.LATE
    assert loop.fake.calls == []


@pytest.mark.parametrize("mode", [issue.BY_BATCH, issue.BY_RUN])
def test_an_error_of_the_driver_ends_it(loop: Loop, mode: int) -> None:
    loop.fake.code = 719
    assert loop([100, 100], mode=mode) == issue.FAILED
    assert loop.state[issue.STATE_ERROR] == 719
    assert loop.state[issue.STATE_BYTES] == 0
    assert len(loop.fake.copies()) == 1


def test_a_machine_without_the_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    with pytest.raises(DriverError, match=r"libcuda\.so\.1: cannot open"):
        load_driver()
    assert Driver({}).error_text(700) == "CUDA error 700"
    assert not Driver({}).maps_host_memory(0)
