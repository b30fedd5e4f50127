"""The wastes that InferCept compares: memory x time (arXiv 2402.01869, equations 1, 2 and 4).

For an intercepted request with a context of ``C`` tokens, next to running ones with ``C_other`` tokens:

* preserve: its memory does nothing until it returns, ``T_INT * C``;
* discard: recomputed in ``n`` chunks, its memory fills up while it is of no use yet, ``T_fwd(C) * C / 2``, and
  the others' waits with each chunk, ``n * T_fwd(C / n) * C_other``;
* swap: nothing, as long as the copy is hidden behind the computation of a step.

The factor M, memory per token, is the same in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtier.replay.baselines.offline_profile import prefill_s

if TYPE_CHECKING:
    from kvtier.replay.machine import Machine


def preserve_waste(interception_s: float, context_tokens: int) -> float:
    """Token-seconds of a context that stays."""
    return interception_s * context_tokens


@dataclass(frozen=True, slots=True)
class Recompute:
    """What it takes to compute a context again.

    Attributes:
        context_tokens: C.
        whole_s: T_fwd(C).
        n_chunks: n.
        chunk_s: T_fwd(C / n), the mean over the chunks: later ones attend to more.
    """

    context_tokens: int
    whole_s: float
    n_chunks: int
    chunk_s: float

    @classmethod
    def of(cls, machine: Machine, context_tokens: int) -> Recompute:
        """As profiled on a machine."""
        n_chunks = max(1, -(-context_tokens // machine.batch_tokens))
        whole_s = prefill_s(machine, context_tokens)
        return cls(context_tokens, whole_s, n_chunks, whole_s / n_chunks)

    def waste(self, other_tokens: int) -> float:
        """Token-seconds of a context that is discarded."""
        own = self.whole_s * self.context_tokens / 2
        return own + self.n_chunks * self.chunk_s * other_tokens
