"""continuum: the KV of a finished turn stays in GPU memory for the time of Equation 2, as the paper has it.

Continuum (arXiv 2511.02230; called CacheTTL in its version 4). The time: `eq2`. Pins: `retention`. Order of
waiting requests, section 4.3: preempted ones, then those of pinned programs, then by the arrival of their
program. A program's last step is known (`is_last_step`). CPU memory is used as the paper does, by stock
offloading that knows nothing of pins; `PrefillReload` is then the time to reload all of a context.

Departures. A chain of turns of a sub-agent is a job of its own, in the place of its program: the paper knows none.
A turn without a tool counts as one of a tool without a name. Whatever allocation fails ends pins, also that of a
running request; the paper tells of waiting ones only (a public re-implementation for vLLM 0.25 does the same).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from kvtier.replay.baselines.eq2 import Gaps, Memoryfulness, Queueing, best_ttl_s, cold_ttl_s
from kvtier.replay.baselines.offline_profile import restore_s
from kvtier.replay.baselines.retention import RetentionPolicy

if TYPE_CHECKING:
    from kvtier.replay.baselines.facts import RequestFacts
    from kvtier.replay.baselines.hooks import Surroundings


class ContinuumPolicy(RetentionPolicy):
    """See the module's docstring."""

    def __init__(self, around: Surroundings) -> None:
        super().__init__(around)
        self._gaps = Gaps()
        self._queueing = Queueing()
        self._memory = Memoryfulness()
        around.scheduler.rank_waiting = self._rank

    def _rank(self, request: Any) -> int:
        if request.status == RequestStatus.PREEMPTED:
            return 0
        return 1 if self.around.facts[request.request_id].chain in self.pins else 2

    def ttl_s(self, facts: RequestFacts, n_tokens: int) -> float:
        """Equation 2."""
        restored_s = restore_s(self.around.machine, n_tokens)
        gaps_s = self._gaps.known(facts.tool)
        if gaps_s is None:
            return cold_ttl_s(self._queueing.mean_s + restored_s)
        return best_ttl_s(gaps_s, self._queueing.mean_s * self._memory.eta + restored_s)

    def saw_gap(self, tool: str | None, gap_s: float) -> None:
        """A sample of S[f]."""
        self._gaps.add(tool, gap_s)

    def saw_queueing(self, delay_s: float) -> None:
        """A sample of T."""
        self._queueing.add(delay_s)

    def saw_chain(self, n_turns: int) -> None:
        """Samples of eta."""
        self._memory.add(n_turns)
