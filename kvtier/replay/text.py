"""Prompts as token ids: equal content gives equal tokens, and block hashes are computed once a chain."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.replay.workload import Run, Turn

HASH_BYTES: Final = 32
_START: Final = b"\0" * HASH_BYTES


class Vocabulary:
    """Gives each content of each scope a token id of its own."""

    def __init__(self) -> None:
        self._ids: dict[tuple[str, int], int] = {}

    def token(self, scope: str, content: int) -> int:
        """The token of which this content consists."""
        return self._ids.setdefault((scope, content), len(self._ids) + 1)

    def tokens(self, scope: str, runs: Sequence[Run]) -> list[int]:
        """A prompt's token ids."""
        tokens: list[int] = []
        for run in runs:
            tokens += [self.token(scope, run.content)] * run.n_tokens
        return tokens


class ChainText:
    """The text of one chain of turns, as far as the engine needs it.

    Args:
        vocabulary: Shared by all chains of a replay.
        scope: See `Program.scope`; two chains of a program share theirs.
        turns: The chain.
        block_tokens: Tokens of a block.
        name: Unique among the chains: what its model generates at its end is nobody else's.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        scope: str,
        turns: Sequence[Turn],
        block_tokens: int,
        name: str,
    ) -> None:
        self._vocabulary = vocabulary
        self._scope = scope
        self._turns = turns
        self._block_tokens = block_tokens
        self._own = vocabulary.token(f"{scope}/{name}", 0)
        # Tokens shared by each turn's prompt and the one's before.
        self._shared = [0, *(shared_tokens(a.prompt, b.prompt) for a, b in pairwise(turns))]
        self._hashes: list[bytes] = []
        self._hashed_prompt_tokens = 0

    def prompt(self, index: int) -> list[int]:
        """Token ids of a turn's prompt."""
        return self._vocabulary.tokens(self._scope, self._turns[index].prompt)

    def outputs(self, index: int) -> list[int]:
        """What the model generates in a turn: what the next prompt has at those places, else tokens of its own."""
        turn = self._turns[index]
        start = turn.prompt_tokens
        known: list[int] = []
        if index + 1 < len(self._turns):
            known = self.prompt(index + 1)[start : start + turn.output_tokens]
        return known + [self._own] * (turn.output_tokens - len(known))

    def ended(self, index: int, block_hashes: Sequence[bytes]) -> None:
        """Keep a finished turn's hashes: the next one begins with the same tokens."""
        self._hashes = list(block_hashes)
        self._hashed_prompt_tokens = self._turns[index].prompt_tokens

    def hasher(self, index: int) -> Callable[[Any], list[bytes]]:
        """Block hasher of a turn's request: the hashes of the blocks that are full since the last call."""
        size = self._block_tokens
        shared = self._shared[index]
        # A prompt that is continued whole is followed by what was generated from it.
        reach = len(self._hashes) if shared == self._hashed_prompt_tokens else shared // size
        known = (
            self._hashes[: min(reach, self._turns[index].prompt_tokens // size)] if index else []
        )

        def new_hashes(request: Any) -> list[bytes]:
            first, end = len(request.block_hashes), request.num_tokens // size
            hashes = known[first:end]
            if first + len(hashes) == end:
                return hashes
            tokens = request.all_token_ids
            last = hashes[-1] if hashes else request.block_hashes[-1] if first else _START
            for i in range(first + len(hashes), end):
                data = array("q", tokens[i * size : (i + 1) * size]).tobytes()
                last = blake2b(last + data, digest_size=HASH_BYTES).digest()
                hashes.append(last)
            return hashes

        return new_hashes


def shared_tokens(left: Sequence[Run], right: Sequence[Run]) -> int:
    """How many leading tokens two prompts of one scope share."""
    n_tokens = 0
    for a, b in zip(left, right, strict=False):
        if a == b:
            n_tokens += a.n_tokens
            continue
        return n_tokens + (min(a.n_tokens, b.n_tokens) if a.content == b.content else 0)
    return n_tokens
