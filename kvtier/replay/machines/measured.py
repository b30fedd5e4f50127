"""A machine as `kvtier calibrate` has measured it: its profile takes the place of a GPU's data sheet."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvtier.replay.machine import GpuSpec, Scheduled
from kvtier.replay.step_clock import StepClock, fit

if TYPE_CHECKING:
    from pathlib import Path

SUFFIX: Final = ".json"
_HOW: Final = "accepted is a profile that kvtier calibrate MODEL has written"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a profile says.

    Attributes:
        gpu: Its link; peaks and memory are not known, and 0.
        clock: How long steps take, of the model that was measured.
    """

    gpu: GpuSpec
    clock: StepClock


def read(path: Path) -> Measured:
    """Read a profile.

    Raises:
        ValueError: It cannot be read, or has no prefill times (`kvtier calibrate --link-only` measures none).
    """
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        samples = [
            ([Scheduled(int(p["cached_tokens"]), int(p["new_tokens"]))], float(p["seconds"]))
            for p in profile["prefill"]
        ]
        link_bytes_per_s = float(max(rate for _, rate in profile["load"]["points"]))
        name = str(profile["gpu"] or profile["cpu"])
        measured_at = str(profile["measured_at"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}; {_HOW}") from error
    if not samples:
        raise ValueError(f"{path}: holds no prefill times; {_HOW}")
    figures = (link_bytes_per_s, *(seconds for _, seconds in samples))
    if not all(math.isfinite(figure) and figure > 0 for figure in figures):
        raise ValueError(f"{path}: a time or a bandwidth is no positive number; {_HOW}")
    source = f"kvtier calibrate, {measured_at}"
    return Measured(GpuSpec(name, 0.0, 0.0, 0.0, link_bytes_per_s, source=source), fit(samples))
