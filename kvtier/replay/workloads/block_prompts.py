"""Prompts from recorded block hashes: which content the blocks have, and which the cut one at the end."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

from kvtier.replay.workload import Run

if TYPE_CHECKING:
    from collections.abc import Sequence


class BlockPrompts:
    """Makes the prompts of one recorded session.

    A recorded prompt is a list of block ids and a length. The ids name full blocks; what is left over, less
    than a block, has an id that says nothing (it is of the cut block) or none. If the next prompt of the
    chain begins with the same full blocks and is no shorter, the rest is taken for the beginning of what that
    prompt has there, as it is where a conversation only grows. Without this, no prompt could reuse the last
    tokens of the one before, nor what was generated after them. Otherwise the rest is a content of its own,
    with a negative id that no recorded block has.

    Args:
        block_tokens: Tokens of a full block.
        name: Unique among the sessions whose ids mean the same.
    """

    def __init__(self, block_tokens: int, name: str) -> None:
        self._block_tokens = block_tokens
        self._name = name
        self._n_own = 0
        # Long prompts come again every turn: one object for all uses of a block.
        self._full: dict[int, Run] = {}

    def of(self, chain: Sequence[tuple[Sequence[int], int]]) -> list[tuple[Run, ...]]:
        """The prompts of a chain of turns, told as (block ids, tokens)."""
        prompts: list[tuple[Run, ...]] = []
        next_ids: Sequence[int] = ()
        next_tokens = 0
        for recorded, n_tokens in reversed(chain):
            ids = list(recorded[: n_tokens // self._block_tokens])
            rest = n_tokens - len(ids) * self._block_tokens
            runs = [self._full_block(content) for content in ids]
            if rest:
                n_full = len(ids)
                continued = (
                    rest < self._block_tokens
                    and n_tokens <= next_tokens
                    and n_full < len(next_ids)
                    and ids == next_ids[:n_full]
                )
                if continued:
                    ids.append(next_ids[n_full])
                elif n_full < len(recorded):
                    ids.append(recorded[n_full])
                else:
                    ids.append(self._own())
                runs.append(Run(ids[-1], rest))
            prompts.append(tuple(runs))
            next_ids, next_tokens = ids, n_tokens
        return prompts[::-1]

    def _full_block(self, content: int) -> Run:
        run = self._full.get(content)
        if run is None:
            run = self._full[content] = Run(content, self._block_tokens)
        return run

    def _own(self) -> int:
        self._n_own += 1
        digest = blake2b(f"{self._name}/{self._n_own}".encode(), digest_size=7).digest()
        return -1 - int.from_bytes(digest, "big")
