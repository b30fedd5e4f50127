"""What the CPU tier is known to hold of each program: what commits have confirmed, until the tier says otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtier.turns.strands import Strands

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.backend import Activity, Evicted, TierBackend
    from kvtier.chunk_keys import ChunkChain


@dataclass(frozen=True, slots=True)
class Staged:
    """A conversation's confirmed KV in the tier: the first `n_chunks` chunks of `chain`."""

    chain: ChunkChain
    n_chunks: int


class StagedCopies:
    """The copies of all programs, by the name of each conversation in the tier.

    Attributes:
        namespace: Under which the tier keeps them.
        strands: The names of a program's conversations.
    """

    def __init__(self, tier: TierBackend, namespace: str) -> None:
        self.namespace = namespace
        self.strands = Strands()
        self._tier = tier
        self._staged: dict[str, Staged] = {}

    def __contains__(self, strand: str) -> bool:
        """Whether anything is known to be staged under this name."""
        return strand in self._staged

    def __len__(self) -> int:
        """Return the number of copies."""
        return len(self._staged)

    def chunks_of(self, program: str, chain: ChunkChain) -> int:
        """How many leading chunks of `chain` the tier has confirmed for this program."""
        confirmed = (self._staged.get(name) for name in self.strands.names(program))
        return max(
            (min(s.n_chunks, s.chain.common_chunks(chain)) for s in confirmed if s is not None),
            default=0,
        )

    def confirmed_chunks(self, strand: str) -> int:
        """Chunks of the conversation's last staged chain that the tier has confirmed."""
        staged = self._staged.get(strand)
        return staged.n_chunks if staged is not None else 0

    def confirm(self, strand: str, chain: ChunkChain, n_chunks: int) -> int:
        """A commit has confirmed the first `n_chunks` of `chain`; returns how many more that are than before."""
        before = self.confirmed_chunks(strand)
        self._staged[strand] = Staged(chain, n_chunks)
        return max(0, n_chunks - before)

    def evicted(self, event: Evicted) -> None:
        """The tier has made room, and holds no more than so many chunks of a conversation."""
        staged = self._staged.get(event.program)
        # Of the same name there may be a copy that other weights have made, and that goes first.
        if staged is None or event.namespace != self.namespace:
            return
        if event.resident_chunks < staged.n_chunks:
            self._staged[event.program] = Staged(staged.chain, event.resident_chunks)

    def correct(self, program: str, chain: ChunkChain, resident_chunks: int) -> None:
        """A lookup of `chain` has seen how much of it is really there.

        Only what the chain shares with a staged one tells: a sub-agent's prompt may share little.
        """
        for name in self.strands.names(program):
            staged = self._staged.get(name)
            if staged is None:
                continue
            if resident_chunks < min(staged.n_chunks, staged.chain.common_chunks(chain)):
                self._staged[name] = Staged(staged.chain, resident_chunks)

    def find(self, program: str, chain_of: Callable[[], ChunkChain]) -> str | None:
        """The name of the copy that a turn of the program goes on from; None where nothing is staged.

        Args:
            program: The program.
            chain_of: Returns the chain of the turn's prompt; called where anything is staged.
        """
        if not any(name in self._staged for name in self.strands.names(program)):
            return None
        name = self.strands.continued(program, chain_of())
        return name if name in self._staged else None

    def mark(self, name: str, activity: Activity) -> None:
        """Tell the tier what the program does, and so what the copy is worth."""
        self._tier.mark(self.namespace, name, activity)

    def spoilt(self, key: bytes) -> None:
        """What the tier holds under this key is not what was stored: nobody must find it any more."""
        self._tier.spoilt(self.namespace, key)

    def forget(self, program: str) -> None:
        """The program is over."""
        for name in self.strands.names(program):
            self._staged.pop(name, None)
        self.strands.forget(program)

    def clear(self) -> None:
        """Nothing is known to be staged any more."""
        self._staged.clear()
        self.strands.clear()
