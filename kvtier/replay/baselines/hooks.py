"""What a baseline can do beside the CPU tier; here it does nothing, which is stock LMCache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from kvtier.replay.baselines.facts import RequestFacts, facts_by_request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvtier.replay.machine import Machine


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a policy works with.

    Attributes:
        clock: Virtual seconds.
        machine: What it is replayed on; how fast it is, a policy of the papers has measured.
        facts: About each request, by its id.
        scheduler: vLLM's.
        agents: The programs under way.
    """

    clock: Callable[[], float]
    machine: Machine
    facts: Mapping[str, RequestFacts]
    scheduler: Any
    agents: Any

    @classmethod
    def of(cls, sim: Any) -> Self:
        """Those of a simulation."""
        facts = facts_by_request(sim.programs)
        return cls(sim.clock, sim.machine, facts, sim.scheduler, sim.agents)

    @property
    def pool(self) -> Any:
        """The GPU's blocks."""
        return self.scheduler.kv_cache_manager.block_pool


class BaselinePolicy:
    """Called by `connector.BaselineConnector`; a policy overrides what it needs.

    Attributes:
        stores_all: Every full block goes to the CPU tier.
    """

    stores_all = True

    def arrived(self, request: Any) -> None:
        """A request has been queued."""

    def allocated(self, request: Any) -> None:
        """A request has got its blocks: it runs, or loads."""

    def finished(self, request: Any, blocks: Sequence[Any]) -> None:
        """A request has ended; `blocks` are its full ones, which vLLM is about to free."""

    def stepped(self, output: Any) -> None:
        """A step has been scheduled."""

    def stored(self, owner: str, block_hashes: Sequence[bytes]) -> None:
        """Blocks that the policy stored itself have been copied."""

    def make_room(
        self,
        request: Any,  # noqa: ARG002
        retry: Callable[[], Any],  # noqa: ARG002
        need_blocks: Callable[[], int],  # noqa: ARG002
    ) -> Any:
        """An allocation has failed: free something and `retry`; returns the blocks, None without."""
        return None

    def before_reset(self) -> None:
        """All blocks of the pool must be free."""
