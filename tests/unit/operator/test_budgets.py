"""Tenants' budgets are read as people write them, and written as they are read."""

from __future__ import annotations

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from kvtier.client import TenantBudget
from kvtier.operator.budgets import parse_budgets, show_budgets

BUDGETS = st.lists(
    st.builds(
        TenantBudget,
        tenant=st.text().filter(lambda name: "," not in name),
        byte_seconds=st.integers(0, (1 << 63) - 1).filter(lambda n: n < 10**18),
        period_s=st.integers(1, 10**9).map(lambda ms: ms / 1000),
    )
)


def test_memory_times_its_time_in_each_period() -> None:
    assert parse_budgets("acme=8GiB*60s/10m,=0.5TiB*1h/1d") == [
        TenantBudget("acme", 8 * 60 << 30, 600.0),
        TenantBudget("", 3600 << 39, 86_400.0),
    ]
    assert parse_budgets("none") == []


def test_a_tenants_name_may_have_an_equals_sign() -> None:
    assert parse_budgets("c2FsdA===1*1s/1s") == [TenantBudget("c2FsdA==", 1, 1.0)]


@pytest.mark.parametrize(
    "text",
    ["", "acme", "acme=8GiB", "acme=8GiB*60s", "acme=8GB*60s/1m", "acme=8GiB*60s/0",
     "acme=8GiB*x/1m", "acme=1GiB*1s/1m,", "acme=99999999999TiB*9d/1s", "8GiB*60s/10m"],
)  # fmt: skip
def test_other_texts_are_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="accepted is"):
        parse_budgets(text)


@given(BUDGETS)
def test_what_is_written_is_read_as_the_same(budgets: list[TenantBudget]) -> None:
    assert parse_budgets(show_budgets(budgets)) == budgets
