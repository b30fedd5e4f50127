"""Hints from the network: any type, any size, never an exception."""

from __future__ import annotations

import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.identity.request_params import (
    MAX_TEXT_BYTES,
    MAX_TTL_S,
    NO_HINTS,
    HintError,
    RequestHints,
    parse_hints,
    parse_transfer_params,
)


def test_reads_all_fields() -> None:
    hints, errors = parse_hints(
        {
            "program": "agent-7",
            "tool": "bash",
            "ttl_s": 30,
            "end": True,
            "pin": False,
            "stage": True,
        }
    )
    assert errors == ()
    assert hints == RequestHints("agent-7", "bash", 30.0, end=True, pin=False, stage=True)


def test_nothing_said() -> None:
    assert parse_hints(None) == (NO_HINTS, ())
    assert parse_hints({}) == (NO_HINTS, ())
    assert parse_hints({"ttl_s": None, "end": None}) == (NO_HINTS, ())


def test_other_connectors_parameters_are_not_ours() -> None:
    hints, errors = parse_transfer_params({"do_remote_prefill": True, "kvtier": {"program": "a"}})
    assert (hints.program, errors) == ("a", ())
    values: tuple[object, ...] = (None, [], "kvtier", 7, {"do_remote_prefill": True})
    for params in values:
        assert parse_transfer_params(params) == (NO_HINTS, ())


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("program", 5, "wrong_type"),
        ("program", b"x", "wrong_type"),
        ("program", "", "empty"),
        ("program", "x" * (MAX_TEXT_BYTES + 1), "too_long"),
        ("program", "é" * (MAX_TEXT_BYTES // 2 + 1), "too_long"),
        ("program", "a\nb", "not_printable"),
        ("program", "\ud800", "not_printable"),
        ("tool", ["bash"], "wrong_type"),
        ("ttl_s", "30", "wrong_type"),
        ("ttl_s", True, "wrong_type"),
        ("ttl_s", -1, "out_of_range"),
        ("ttl_s", -1e-9, "out_of_range"),
        ("ttl_s", math.nan, "not_a_number"),
        ("ttl_s", math.inf, "out_of_range"),
        ("ttl_s", 10**400, "out_of_range"),
        ("ttl_s", MAX_TTL_S * 1.01, "out_of_range"),
        ("end", 1, "wrong_type"),
        ("pin", "yes", "wrong_type"),
        ("stage", 0.0, "wrong_type"),
        ("ttl", 30, "unknown"),
    ],
)
def test_bad_fields_are_named_and_the_good_ones_survive(
    field: str, value: object, reason: str
) -> None:
    good: dict[str, object] = {"program": "agent", "tool": "bash", "ttl_s": 3}
    hints, errors = parse_hints({**good, field: value})
    assert errors == (HintError(field, reason),)  # type: ignore[arg-type]
    for name, kept in good.items():
        if name != field:
            assert getattr(hints, name) == kept
    assert getattr(hints, field, None) in (None, False)


def test_a_text_of_exactly_the_limit_is_kept_whole() -> None:
    for text in ("x" * MAX_TEXT_BYTES, "é" * (MAX_TEXT_BYTES // 2)):
        assert parse_hints({"program": text})[0].program == text


def test_what_is_not_an_object_is_one_error() -> None:
    for raw in ("x", 3, [], ["program"], True):
        assert parse_hints(raw) == (NO_HINTS, (HintError("", "wrong_type"),))


def test_hostile_sizes_cost_nothing() -> None:
    huge = "x" * 10_000_000
    raw = {huge + str(i): huge for i in range(3)}
    raw |= {f"k{i}": "v" for i in range(100_000)}
    raw["program"] = huge
    raw["tool"] = "bash"
    tracemalloc.start()
    hints, errors = parse_hints(raw)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000
    assert hints == RequestHints(tool="bash")
    assert HintError("program", "too_long") in errors
    assert len(errors) <= 9
    assert all(len(error.field) <= 32 for error in errors)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
_FIELDS = st.sampled_from(["program", "tool", "ttl_s", "end", "pin", "stage", "other"])


@given(_JSON | st.dictionaries(_FIELDS, _JSON) | st.dictionaries(st.integers(), _JSON))
def test_never_raises_and_what_it_returns_is_in_bounds(raw: object) -> None:
    hints, errors = parse_hints(raw)
    for text in (hints.program, hints.tool):
        assert text is None or 0 < len(text.encode()) <= MAX_TEXT_BYTES
    assert hints.ttl_s is None or (math.isfinite(hints.ttl_s) and hints.ttl_s >= 0)
    if isinstance(raw, dict):
        said = {key for key, value in raw.items() if value is not None}
        wrong = {error.field for error in errors}
        for name in ("program", "tool", "ttl_s", "pin", "stage"):
            assert (getattr(hints, name) is not None) == (name in said and name not in wrong)
