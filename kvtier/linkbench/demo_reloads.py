"""What the reloads of a demo took, beside what the engine's cost model had predicted for them."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtier.linkbench.paths import PathError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class DemoReloads:
    """Reloads of one run of ``kvtier demo``: (tokens, predicted seconds, seconds in which bytes moved)."""

    reloads: tuple[tuple[int, float, float], ...]

    @property
    def median_error(self) -> float:
        """Median distance of a prediction from the measured time, as a share of it."""
        return statistics.median(abs(p - s) / s for _, p, s in self.reloads)

    @property
    def median_ratio(self) -> float:
        """Predicted over measured time, median: 1 where the model is right on the whole."""
        return statistics.median(p / s for _, p, s in self.reloads)

    @property
    def scatter(self) -> float:
        """What one rate leaves, chosen afterwards: more than half of the reloads are within this share of it.

        No other rate leaves less. Other threads that had the core in the meantime, say.
        """
        rates = sorted(tokens / s for tokens, _, s in self.reloads)
        half = len(rates) // 2
        return min(
            (high - low) / (high + low) for low, high in zip(rates, rates[half:], strict=False)
        )

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        names = ("tokens", "predicted_s", "measured_s")
        return {
            "median_error": self.median_error,
            "median_ratio": self.median_ratio,
            "scatter": self.scatter,
            "reloads": [dict(zip(names, reload, strict=True)) for reload in self.reloads],
        }


def demo_reloads(path: Path) -> DemoReloads:
    """Read them from what ``kvtier demo --json`` has written.

    Raises:
        PathError: it is no such file, or there was no reload.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["results"]
        loaded = [e for row in rows for e in row["decisions"] if e["event"] == "loaded"]
        found = tuple(
            (int(e["tokens"]), float(e["predicted_s"]), float(e["seconds"]))
            for e in loaded
            if e["ok"] and e["seconds"] > 0 and e["tokens"] > 0
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PathError(f"{path.name} is not of kvtier demo --json: {error!r}") from error
    if not found:
        raise PathError(f"{path.name}: the demo has reloaded nothing")
    return DemoReloads(found)
