"""How long an engine of these tests waits for its CPU tier.

A busy machine's server may take seconds to answer. That is no fault, so no test is to depend on it: where a
server is to hang, the test says so itself.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvtier.turns import returns
from kvtier.turns.prefetching import lookups
from tests.engine.tier_probe import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT_S = 1.0
"""Long enough for a test in which nobody answers."""


def be_patient(half: Any) -> None:
    """Wait for any answer, for as long as the tests do."""
    _set_deadline(WAIT_S)
    if hasattr(half.tier, "_config"):
        _set_timeout(half.tier, WAIT_S)


@contextmanager
def short_timeout(half: Any) -> Iterator[None]:
    """A server that does not answer is given up soon."""
    _set_timeout(half.tier, TIMEOUT_S)
    try:
        yield
    finally:
        _set_timeout(half.tier, WAIT_S)


@contextmanager
def short_deadline() -> Iterator[None]:
    """A request whose lookup is not answered goes on soon without the tier."""
    _set_deadline(TIMEOUT_S)
    try:
        yield
    finally:
        _set_deadline(WAIT_S)


def _set_deadline(deadline_s: float) -> None:
    returns.LOOKUP_DEADLINE_S = lookups.LOOKUP_DEADLINE_S = deadline_s


def _set_timeout(tier: Any, timeout_s: float) -> None:
    tier._config = dataclasses.replace(tier._config, timeout_s=timeout_s)
