"""What the scheduler half remembers of one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtier.turns.request_view import is_tierable

if TYPE_CHECKING:
    from kvtier.chunk_keys import ChunkChain
    from kvtier.identity.request_params import RequestHints


@dataclass(slots=True)
class Turn:
    """One request: a program's turn, from its arrival to its end.

    Attributes:
        request: vLLM's request.
        program: Key of its program.
        hints: What the client asked for.
        seed: Start of its chunk chain: adapter and tenant.
        known_adapter: Whether it is known with which weights its KV is computed.
        arrived_s: Monotonic time of arrival.
        predicted_wait_s: Queue delay predicted at arrival, to correct the prediction later.
        index: Turns of its program that started before it.
        chain: Chunk keys of its prompt, once they were needed.
        asked_s: When the CPU tier was asked for its prompt.
        local_tokens: Prompt tokens found in GPU memory when last asked.
        predicted_load_s: The cost model's estimate for the load, when last decided.
        return_choice: The last decision on its return, to tell when it changes.
        started: Whether it has been given blocks.
        counted: Whether its prompt tokens were counted by source.
        uncounted_load_tokens: Prompt tokens whose source depends on how their load ends.
        bypass_tier: A load failed or an answer was late: recompute, do not ask again.
        return_share: See `TtlController.return_share`, when it was over.
        copy: Name of the tier's copy of its KV, where there was one when it came or started.
    """

    request: Any
    program: str
    hints: RequestHints
    seed: bytes
    known_adapter: bool
    arrived_s: float
    predicted_wait_s: float
    index: int = 0
    chain: ChunkChain | None = None
    asked_s: float = 0.0
    local_tokens: int = 0
    predicted_load_s: float = 0.0
    return_choice: tuple[str, int, str] | None = None
    started: bool = False
    counted: bool = False
    uncounted_load_tokens: int = 0
    bypass_tier: bool = False
    return_share: float = 1.0
    copy: str | None = None

    @property
    def tierable(self) -> bool:
        """Whether its KV may go through the CPU tier. A streaming session may be sent an image in its middle."""
        return self.known_adapter and is_tierable(self.request)

    @property
    def request_id(self) -> str:
        """The request's id."""
        return str(self.request.request_id)
