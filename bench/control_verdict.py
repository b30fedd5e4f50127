"""What calls of the control API may cost the engine: the limits of `bench/control_load.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_CPU: Final = 0.02
MOST_P99: Final = 0.05
LEAST_RATE: Final = 0.9
"""Of the calls a second that were wanted, the share that must have been made: less shows nothing of the rest."""
_MEASURES: Final = (
    ("instructions_per_token", "cpu_us_per_token", MOST_CPU),
    ("step_p99_instructions", "step_cpu_p99_us", MOST_P99),
)
"""Of the engine's whole process: instructions, the processor time that stands in for them, the most by which it may rise."""


def beyond(called: Mapping[str, Any], alone: Mapping[str, Any], rate: float) -> list[str]:
    """What has risen by more than it may, of the windows with calls over those without.

    Args:
        called: The figures with calls.
        alone: The same without; instructions are 0 where they were not counted.
        rate: The calls a second that were wanted.
    """
    found = []
    if called["calls_per_s"] < rate * LEAST_RATE:
        found.append(f"{called['calls_per_s']:.0f} calls a second were made; wanted are {rate:.0f}")
    for counted, timed, most in _MEASURES:
        name = counted if alone[counted] else timed
        if called[name] > alone[name] * (1 + most):
            rise = called[name] / alone[name] - 1
            found.append(f"{name} has risen by {rise:.2%} over `alone`; at most {most:.0%}")
    return found
