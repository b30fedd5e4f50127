"""When programs begin, where it is not a matter of how many run at a time."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvtier.replay.workload import Program


def poisson(programs: Iterable[Program], rate_per_s: float, seed: int) -> list[Program]:
    """Programs that begin independently of each other, in the given order.

    Raises:
        ValueError: The rate is not positive and finite.
    """
    if not (rate_per_s > 0 and isfinite(rate_per_s)):
        raise ValueError(f"rate_per_s must be positive and finite, got {rate_per_s}")
    rng = Random(f"arrivals/{seed}")  # noqa: S311 - no secret
    now_s = 0.0
    arrived = []
    for program in programs:
        now_s += rng.expovariate(rate_per_s)
        arrived.append(replace(program, arrival_s=now_s))
    return arrived


def recorded(programs: Iterable[Program]) -> list[Program]:
    """Programs as they were recorded, by arrival; the first begins at 0 s."""
    ordered = sorted(programs, key=lambda program: program.arrival_s)
    return [
        replace(program, arrival_s=program.arrival_s - ordered[0].arrival_s) for program in ordered
    ]


def at_once(programs: Iterable[Program]) -> list[Program]:
    """All programs at 0 s."""
    return [replace(program, arrival_s=0.0) for program in programs]
