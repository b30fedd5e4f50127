"""What may happen in a life."""

from __future__ import annotations

from typing import Final

ACTIONS: Final[dict[str, float]] = {
    "arrive": 14.0,
    "twin": 3.0,
    "flood": 2.0,
    "abort": 4.0,
    "lull": 2.0,
    "time_passes": 4.0,
    "time_jumps": 0.7,
    "wall_jumps": 0.7,
    "reset": 1.0,
    "reset_all": 1.2,
    "lose_tier": 0.7,
    "tier_returns": 4.0,
    "weather": 3.0,
    "command": 16.0,
    "recall": 3.0,
    "wake": 6.0,
    "link": 2.0,
    "pause": 0.5,
}
"""What may happen besides steps of the engine, and how often, relative to each other."""
