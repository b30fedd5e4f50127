"""ttl-const: keep a context for as long as it takes to get it back (ski rental).

Holding costs memory x gap, and to get it back costs memory x restore time, as the memory is taken but of no use
meanwhile. To hold for just the restore time never costs more than twice what the best choice in hindsight does,
without any prediction (Karlin et al., "Competitive snoopy caching", Algorithmica 1988). Among fixed times, the
KV-swap study of HCAHOI/agent-sched-bench found it near the best, and per-tool distributions worse out of sample.

Requests are ordered by the arrival of their program, so that it differs from offload-pfcfs in the pins alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier.replay.baselines.offline_profile import restore_s
from kvtier.replay.baselines.retention import RetentionPolicy

if TYPE_CHECKING:
    from kvtier.replay.baselines.facts import RequestFacts


class TtlConstPolicy(RetentionPolicy):
    """See the module's docstring."""

    def ttl_s(self, facts: RequestFacts, n_tokens: int) -> float:  # noqa: ARG002
        """The time to get the context back."""
        return restore_s(self.around.machine, n_tokens)
