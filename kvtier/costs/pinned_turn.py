"""What a pin stands for: kept with it to value it under pressure and to recognise its return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtier.chunk_keys import ChunkChain
    from kvtier.ttl.gaps import SurvivalCurve


@dataclass(frozen=True, slots=True)
class PinnedTurn:
    """The turn whose KV is pinned.

    Attributes:
        tool: The tool that the program waits for.
        n_tokens: Tokens whose KV is pinned.
        prompt_blocks: How many of the blocks hold prompt: the rest is output, which only hits if the next
            prompt repeats it token for token.
        predicted_gap_s: Median of the gap that was expected.
        staged_tokens: Prefix that the CPU tier holds or is being given.
        strand: Name under which it does.
        miss_unstaged_s: What a return without the GPU copy costs more, seconds, without a staged copy.
        miss_staged_s: The same once the staged prefix is confirmed.
        tenant: vLLM's `cache_salt`, whose budget the pin is charged to.
        return_share: See `TtlController.return_share`; of no account where the gap is announced.
        announced: The gap that the client has announced, in place of those that were learned.
        announced_s: From when on it counts.
        chain: Chunk keys of its tokens; None where the KV may not leave the GPU.
        asked_until_s: A client has asked to keep it until then, and what is announced does not undo that; 0: nobody.
    """

    tool: str | None
    n_tokens: int
    prompt_blocks: int
    predicted_gap_s: float
    staged_tokens: int = 0
    strand: str = ""
    miss_unstaged_s: float = 0.0
    miss_staged_s: float = 0.0
    tenant: str | None = None
    return_share: float = 1.0
    announced: SurvivalCurve | None = None
    announced_s: float = 0.0
    chain: ChunkChain | None = None
    asked_until_s: float = 0.0
