"""The policies that replay knows: how vLLM is started for each, and what stands in for its parts.

kvtier is the production code. Baselines live here and in `baselines/`, not in the product.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.core.sched.scheduler import Scheduler

from kvtier.scheduler import ProgramScheduler

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """How one policy runs.

    Attributes:
        name: As on the command line.
        about: One line for `--help` and reports, with its source.
        connector: None for plain vLLM.
        connector_module: Where the connector is.
        settings: Its extra configuration.
        scheduler_class: vLLM's scheduler, or one derived from it.
        by_priority: Whether requests are ordered by priority (and arrival) instead of arrival.
        unbounded: GPU memory holds everything that the workload ever needs.
        uses_tier: kvtier's CPU tier is there.
        prepare: Called with the simulation before it begins; for what only a replay can know.
    """

    name: str
    about: str
    connector: str | None = None
    connector_module: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    scheduler_class: type[Scheduler] = Scheduler
    by_priority: bool = False
    unbounded: bool = False
    uses_tier: bool = False
    prepare: Callable[[Any], None] | None = None


_KVTIER: Final[dict[str, Any]] = {
    "connector": "KVTierConnector",
    "connector_module": "kvtier.connector",
    "scheduler_class": ProgramScheduler,
    "by_priority": True,
    "uses_tier": True,
}

_SPECS: Final = (
    PolicySpec("vllm-lru", "vLLM with prefix caching: what was used longest ago goes first"),
    PolicySpec("ideal", "GPU memory for everything, first come first served", unbounded=True),
    PolicySpec("kvtier", "this project", **_KVTIER),
)

POLICIES: Final = {spec.name: spec for spec in _SPECS}


def policy(name: str) -> PolicySpec:
    """The policy of this name.

    Raises:
        ValueError: There is none; the message lists those that are.
    """
    try:
        return POLICIES[name]
    except KeyError:
        message = f"unknown policy {name!r}; accepted: {', '.join(POLICIES)}"
        raise ValueError(message) from None
