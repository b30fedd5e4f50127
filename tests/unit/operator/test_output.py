"""What is printed is for a terminal that nobody else steers, or for a program."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvtier.client import Lost, Mode, TtlScope
from kvtier.operator.output import ago, make_table, plain, show_bytes, show_rate, to_plain, until


@given(st.text())
def test_no_character_steers_the_terminal(text: str) -> None:
    shown = plain(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


def test_a_table_shows_markup_and_escapes_as_they_are() -> None:
    console = Console(width=80, markup=False, force_terminal=False)
    with console.capture() as capture:
        console.print(make_table(("name",), [["[red]x\x1b[31m\ny"]]))
    assert "[red]x\\x1b[31m\\ny" in capture.get()


def test_records_become_what_json_knows() -> None:
    at = datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=2)))
    value = to_plain({"a": (Lost(3),), "m": Mode.ON, "at": at, "s": TtlScope.of_all(), "n": None})
    assert json.loads(json.dumps(value)) == value
    assert value == {
        "a": [{"events": 3}],
        "m": "on",
        "at": "2026-01-02T01:00:00+00:00",
        "s": {"kind": "all", "name": "", "tenant": ""},
        "n": None,
    }


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1 << 20, "1.0 MiB"), (1 << 62, "4096.0 PiB")],
)
def test_memory_is_shown_in_the_unit_of_which_there_is_one(n_bytes: int, text: str) -> None:
    assert show_bytes(n_bytes) == text


def test_a_link_without_a_speed_was_not_measured() -> None:
    assert show_rate(0.0) == "not measured"
    assert show_rate(12.5e9) == "12.50 GB/s"


def test_times_are_shown_by_their_distance() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert ago(now - timedelta(seconds=90), now) == "1m30s"
    assert ago(now + timedelta(seconds=1), now) == "0s"
    assert until(now + timedelta(seconds=5), now) == "5s"
    assert until(now - timedelta(seconds=5), now) == "overdue"
    assert ago(None, now) == until(None, now) == ""
