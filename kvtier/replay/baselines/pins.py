"""KV of finished requests that stays in GPU memory: references on vLLM's blocks, with an end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Container, Sequence


@dataclass(frozen=True, slots=True)
class Pin:
    """The KV of one chain of turns.

    Attributes:
        chain: Whose it is.
        program: The program of that chain.
        arrival_s: When that program came.
        expires_s: When it ends, unless the next turn waits then.
        blocks: In the order of the text.
    """

    chain: str
    program: str
    arrival_s: float
    expires_s: float
    blocks: Sequence[Any]


class Pins:
    """At most one pin per chain.

    Args:
        pool: vLLM's block pool.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._by_chain: dict[str, Pin] = {}

    def __len__(self) -> int:
        """Number of pins."""
        return len(self._by_chain)

    def __contains__(self, chain: str) -> bool:
        """Whether a chain's KV is pinned."""
        return chain in self._by_chain

    def add(self, pin: Pin) -> None:
        """Keep blocks that are referenced, or at least cached; a pin of the chain from before ends."""
        self._pool.touch(pin.blocks)
        self.release(pin.chain)
        self._by_chain[pin.chain] = pin

    def release(self, chain: str) -> None:
        """End a pin, if there is one: its blocks are free, but cached until they are needed."""
        pin = self._by_chain.pop(chain, None)
        if pin is not None:
            # The end of a text goes first: what comes before it is of use without it.
            self._pool.free_blocks(reversed(pin.blocks))

    def release_program(self, program: str) -> None:
        """End all pins of a program."""
        for pin in list(self._by_chain.values()):
            if pin.program == program:
                self.release(pin.chain)

    def release_all(self) -> None:
        """End all pins."""
        for chain in list(self._by_chain):
            self.release(chain)

    def expire(self, now_s: float, waiting: Container[str]) -> None:
        """End pins whose time is over, but none of a chain in `waiting`, whose next turn is there."""
        over = [
            pin.chain
            for pin in self._by_chain.values()
            if pin.expires_s < now_s and pin.chain not in waiting
        ]
        for chain in over:
            self.release(chain)

    def latest_arrived(self, last: str) -> str:
        """The chain whose program has come last; `last` only if there is no other."""
        pins = self._by_chain.values()
        return max(pins, key=lambda p: (p.chain != last, p.arrival_s, p.expires_s, p.chain)).chain

    def latest_expiring(self) -> str:
        """The chain whose pin would last longest."""
        return max(self._by_chain.values(), key=lambda pin: (pin.expires_s, pin.chain)).chain
