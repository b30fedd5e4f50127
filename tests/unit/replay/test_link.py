"""The virtual link: one queue each way."""

from __future__ import annotations

import pytest

from kvtier.replay.link import Link


def test_copies_of_a_direction_wait_for_each_other_and_not_for_the_other_way() -> None:
    link = Link(100.0, 0.5)
    assert link.start("store", 100, 10.0, "a") == pytest.approx(11.5)
    assert link.start("store", 50, 10.0, "b") == pytest.approx(12.5)
    assert link.start("load", 100, 11.0, "c") == pytest.approx(12.5)
    assert link.next_end_s == pytest.approx(11.5)
    assert [t.what for t in link.ended(12.0)] == ["a"]
    done = link.ended(12.5)
    assert [(t.what, t.seconds) for t in done] == [("b", 1.0), ("c", 1.5)]
    assert link.next_end_s == float("inf")
    assert link.busy_s == {"store": 2.5, "load": 1.5}
    assert link.moved_bytes == {"store": 150, "load": 100}
