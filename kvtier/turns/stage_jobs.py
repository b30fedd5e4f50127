"""What staging remembers: jobs, their splits, and what is known to be staged."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtier.block_ids import BlockIds
    from kvtier.chunk_keys import ChunkChain


# eq=False: splits are compared by identity, as they know their jobs.
@dataclass(slots=True, eq=False)
class Split:
    """Some chunks of a job. `copied`: None until its copy has ended, then whether it succeeded."""

    job: StageJob
    start: int
    end: int
    reserve_id: int
    attempt: int
    copied: bool | None = None


@dataclass(slots=True)
class StageJob:
    """One finished turn on its way to the CPU tier.

    `void`: what it has stored is of no use any more, whatever a late commit says. `attempt` counts
    restarts after a hole was found in what the tier held before. `end_chunk` is less than the chain's
    length once the tier was full. `open` are the splits that are not committed, in order: they are
    copied in any order, but committed in this one, as a commit tells how long the prefix is by then.
    `strand` is the name under which the tier keeps the chain.
    """

    key: str
    program: str
    strand: str
    chain: ChunkChain
    block_ids: BlockIds
    value_s: float
    lease_s: float
    next_chunk: int
    end_chunk: int
    cancelled: bool = False
    void: bool = False
    attempt: int = 0
    open: deque[Split] = field(default_factory=deque)
    n_commits: int = 0
