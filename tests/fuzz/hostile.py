"""What the fuzzers share: how many examples they try, and values that nobody expects.

`FUZZ_EXAMPLES=100000 make fuzz` tries so many of each; without it, what takes seconds.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def fuzz(n_examples: int) -> settings:
    """Settings of a fuzzer that tries so many examples by default."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", n_examples)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, -0.0]),
    st.floats(),
    st.integers(),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "nan", "inf", "on", "\x00", "\ud800", "x" * 5000, "../../etc/passwd", "{}"]
    ),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
"""What JSON, and a little more, can say."""

DEEP = b"[" * 20_000


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value of which some parts are others, missing, or there twice."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 4))):
        value = _damage(draw, value)
    return value


def _damage(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    keys = sorted(value, key=repr) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(list(keys)))
    match draw(st.integers(0, 5)):
        case 0:
            del value[key]
        case 1 if isinstance(value, list):
            value.append(copy.deepcopy(value[key]))
        case _:
            value[key] = _damage(draw, value[key])
    return value


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of which some are others, cut off, or more."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        match draw(st.integers(0, 3)):
            case 0:
                del found[at:]
            case 1:
                found[at:at] = draw(st.binary(max_size=8))
            case _:
                found[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
    return bytes(found)


def as_json(value: Any) -> bytes:
    """As a recorder would write it, with what JSON has no word for."""
    return json.dumps(value).encode("utf-8", "surrogatepass")
