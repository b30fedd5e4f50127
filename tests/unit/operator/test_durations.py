"""Durations are read as people write them, and written as they are read."""

from __future__ import annotations

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from kvtier.operator.durations import about, format_duration, parse_duration

MILLISECONDS = st.integers(0, 10**13)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("90", 90.0),
        ("1.5", 1.5),
        ("90s", 90.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("2d", 172_800.0),
        ("250ms", 0.25),
        ("1d2h3m4.5s", 93_784.5),
        ("1m500ms", 60.5),
        ("0.1h", 360.0),
    ],
)
def test_units_add_up(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "s",
        "-5",
        "5 m",
        "5M",
        "1m1h",
        "1h1h",
        "nan",
        "inf",
        "1e3",
        "5x",
        "\u0665s",
        "1.",
        ".5",
        "9" * 400,
    ],
)
def test_other_texts_are_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="accepted is a number of seconds, or with units"):
        parse_duration(text)


@given(MILLISECONDS)
def test_what_is_written_is_read_as_the_same(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.text())
def test_every_text_is_a_duration_or_refused(text: str) -> None:
    try:
        seconds = parse_duration(text)
    except typer.BadParameter:
        return
    assert 0 <= seconds < float("inf")


@given(st.floats(0, 1e9))
def test_a_rounded_duration_has_two_units_at_most_and_is_near(seconds: float) -> None:
    text = about(seconds)
    units = [part for part in ("d", "h", "ms" if "ms" in text else "m", "s") if part in text]
    assert len(units) <= 3 if "ms" in text else 2
    assert abs(parse_duration(text) - seconds) <= 0.0005 + 0.05 * seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (0.0124, "12ms"),
        (12.34, "12.3s"),
        (61.6, "1m2s"),
        (9000.0, "2h30m"),
        (-5.0, "-5s"),
    ],
)
def test_durations_of_tables(seconds: float, text: str) -> None:
    assert about(seconds) == text


def test_no_duration_is_no_text() -> None:
    assert about(None) == ""
