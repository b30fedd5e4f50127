"""Who loses KV first, of many: found without a look at all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.server.eviction_order import DISPLACE_MARGIN, EvictionOrder, StoredProgram

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

NS = "model"
N_PROGRAMS = 10_000


def stored(
    order: EvictionOrder, programs: dict[tuple[str, str], StoredProgram], *, lease_s: float
) -> None:
    for i in range(N_PROGRAMS):
        ref = NS, f"p{i}"
        programs[ref] = StoredProgram([b"k"], float(i), lease_s)
        order.place(ref, 0.0)


def names(refs: Iterable[tuple[str, str]], n_names: int) -> list[str]:
    return [name for (_, name), _ in zip(refs, range(n_names), strict=False)]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times for which programs were valued, one entry a time."""
    asked: list[float] = []
    worth = StoredProgram.worth

    def counts(self: StoredProgram, now_s: float) -> float:
        asked.append(now_s)
        return worth(self, now_s)

    monkeypatch.setattr(StoredProgram, "worth", counts)
    return asked


def test_room_is_made_again_and_again_without_valuing_all(monkeypatch: pytest.MonkeyPatch) -> None:
    programs: dict[tuple[str, str], StoredProgram] = {}
    order = EvictionOrder(programs)
    stored(order, programs, lease_s=0.0)
    asked = counted(monkeypatch)
    assert names(order.victims(1e9, 5.0), 2) == ["p0", "p1"]
    asked.clear()
    for i in range(100):
        assert names(order.victims(1e9, 5.5), 1) == [f"p{i}"]
        order.remove((NS, f"p{i}"))
        del programs[NS, f"p{i}"]
    assert len(asked) < 100 * 50


def test_where_nothing_may_go_that_is_found_without_valuing_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    programs: dict[tuple[str, str], StoredProgram] = {}
    order = EvictionOrder(programs)
    stored(order, programs, lease_s=100.0)
    cheapest = programs[NS, "p1"]
    assert names(order.victims(cheapest.worth(5.0) * DISPLACE_MARGIN, 5.0), 5) == ["p0"]
    asked = counted(monkeypatch)
    for _ in range(100):
        assert names(order.victims(-1.0, 5.5), 5) == []
    assert len(asked) < 100 * 50


def test_a_lease_that_has_ended_protects_nobody() -> None:
    programs: dict[tuple[str, str], StoredProgram] = {}
    order = EvictionOrder(programs)
    stored(order, programs, lease_s=100.0)
    assert names(order.victims(-1.0, 99.9), 2) == []
    assert names(order.victims(-1.0, 100.0), 2) == ["p0", "p1"]
    programs[NS, "p0"].activity = "waiting"
    order.place((NS, "p0"), 100.0)
    assert names(order.victims(-1.0, 100.0), 2) == ["p1", "p2"], "a program that waits needs it"
