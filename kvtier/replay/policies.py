"""The policies that replay knows: how vLLM is started for each, and what stands in for its parts.

kvtier is the production code. Baselines live here and in `baselines/`, not in the product.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.core.sched.scheduler import Scheduler

from kvtier.replay import endings, oracle, wrong_gaps
from kvtier.replay.baselines.autellix import AutellixPolicy
from kvtier.replay.baselines.continuum import ContinuumPolicy
from kvtier.replay.baselines.continuum_2s import Continuum2sPolicy
from kvtier.replay.baselines.hooks import BaselinePolicy, Surroundings
from kvtier.replay.baselines.infercept import InferCeptPolicy
from kvtier.replay.baselines.ordering import (
    ProgramFcfsScheduler,
    RankedProgramScheduler,
    RankedScheduler,
)
from kvtier.replay.baselines.thunderagent import GatedScheduler, ThunderAgentPolicy
from kvtier.replay.baselines.ttl_const import TtlConstPolicy
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


def _baseline(
    policy_class: Callable[[Surroundings], BaselinePolicy] | None = None,
) -> dict[str, Any]:
    """What a baseline with a CPU tier needs; without a class it does nothing beside that."""

    def prepare(sim: Any) -> None:
        made = None if policy_class is None else policy_class(Surroundings.of(sim))
        sim.scheduler.connector.attach(sim.machine, made)

    return {
        "connector": "BaselineConnector",
        "connector_module": "kvtier.replay.baselines.connector",
        "prepare": prepare,
    }


_SPECS: Final = (
    PolicySpec("vllm-lru", "vLLM with prefix caching: what was used longest ago goes first"),
    PolicySpec("ideal", "GPU memory for everything, first come first served", unbounded=True),
    PolicySpec(
        "offload-lru",
        "a CPU tier that stores all and loads every hit, first come first served: stock LMCache",
        **_baseline(),
    ),
    PolicySpec(
        "offload-pfcfs",
        "offload-lru, but requests are ordered by the arrival of their program",
        scheduler_class=ProgramFcfsScheduler,
        by_priority=True,
        **_baseline(),
    ),
    PolicySpec(
        "infercept",
        "contexts are kept, swapped or discarded by what that wastes (arXiv 2402.01869)",
        scheduler_class=ProgramFcfsScheduler,
        by_priority=True,
        **_baseline(InferCeptPolicy),
    ),
    PolicySpec(
        "ttl-const",
        "offload-pfcfs, and KV stays in GPU memory for as long as a reload takes: ski rental",
        scheduler_class=RankedProgramScheduler,
        by_priority=True,
        **_baseline(TtlConstPolicy),
    ),
    PolicySpec(
        "continuum",
        "offload-pfcfs, and KV stays for the time of Continuum's Equation 2 (arXiv 2511.02230)",
        scheduler_class=RankedProgramScheduler,
        by_priority=True,
        **_baseline(ContinuumPolicy),
    ),
    PolicySpec(
        "continuum-2s",
        "offload-pfcfs, and KV stays as in Continuum's public code: 2 s after quick tools",
        scheduler_class=RankedProgramScheduler,
        by_priority=True,
        **_baseline(Continuum2sPolicy),
    ),
    PolicySpec(
        "autellix",
        "programs that were served least go first, preempting others (PLAS, arXiv 2502.13965)",
        settings={"store": "computed"},
        scheduler_class=RankedScheduler,
        by_priority=True,
        **_baseline(AutellixPolicy),
    ),
    PolicySpec(
        "thunderagent",
        "a proxy lets as many programs be active as fit into GPU memory (arXiv 2602.13692)",
        scheduler_class=GatedScheduler,
        **_baseline(ThunderAgentPolicy),
    ),
    PolicySpec("kvtier", "this project", **_KVTIER),
    PolicySpec(
        "kvtier-ends",
        "kvtier, and clients that say when a program is over",
        prepare=endings.tell,
        **_KVTIER,
    ),
    PolicySpec("oracle", "kvtier told the true gaps", prepare=oracle.tell, **_KVTIER),
)

POLICIES: Final = {spec.name: spec for spec in _SPECS}


def policy(name: str) -> PolicySpec:
    """The policy of this name; `kvtier:MODE` is kvtier with wrong predictions, see `wrong_gaps`.

    Raises:
        ValueError: There is none; the message lists those that are.
    """
    own, mark, mode = name.partition(":")
    if mark and own == "kvtier":
        about = f"kvtier with wrong predictions of tool times: {mode}"
        return replace(POLICIES[own], name=name, about=about, prepare=wrong_gaps.teller(mode))
    try:
        return POLICIES[name]
    except KeyError:
        message = f"unknown policy {name!r}; accepted: {', '.join(POLICIES)}"
        raise ValueError(message) from None
