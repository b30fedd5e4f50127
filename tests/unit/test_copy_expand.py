"""The addresses that a driver call gets: every byte once, cut where it must be."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.copies.compiled import compiled
from kvtier.copies.expand import expand_runs
from kvtier.copies.plan import plan_order
from tests.unit.copy_cases import Case, cases, make_case, reference_store

if TYPE_CHECKING:
    import pytest

NEVER = 1 << 40


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), most=st.sampled_from((3, 50, NEVER)), edge=st.sampled_from((7, 100, NEVER)))
def test_copying_run_by_run_equals_the_reference(case: Case, most: int, edge: int) -> None:
    order = case.order("store")
    expected = reference_store(case, order)
    plan = plan_order(case.layout, order, case.region.nbytes)
    address = case.region.ctypes.data
    kv, slots, sizes = expand_runs(plan, address, most_bytes=most, edge_bytes=edge)
    assert sizes.sum() == plan.n_bytes
    assert sizes.max() <= most
    offsets = slots - address
    np.testing.assert_array_equal(offsets // edge, (offsets + sizes - 1) // edge)
    if most == edge == NEVER:
        assert len(sizes) == plan.n_runs
    for source, target, n_bytes in zip(kv.tolist(), slots.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(target, source, n_bytes)
    np.testing.assert_array_equal(case.region, expected)


def test_nothing_to_copy_has_no_runs() -> None:
    case = make_case()
    order = case.order("load", block_ids=[], slots=[])
    plan = plan_order(case.layout, order, case.region.nbytes)
    assert expand_runs(plan, 0, most_bytes=NEVER, edge_bytes=NEVER).shape == (3, 0)


def test_without_numba_the_python_loop_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    plan = plan_order(case.layout, case.order("store"), case.region.nbytes)
    before = expand_runs(plan, 0, most_bytes=50, edge_bytes=70)
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.cache_clear()
    try:
        again = expand_runs(plan, 0, most_bytes=50, edge_bytes=70)
    finally:
        compiled.cache_clear()
    np.testing.assert_array_equal(again, before)
