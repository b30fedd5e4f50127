"""Prompts as tokens: what is shared is shared, and hashes are those of the tokens."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from hashlib import blake2b

import pytest

from kvtier.replay.text import HASH_BYTES, ChainText, Vocabulary, shared_tokens
from kvtier.replay.workload import Run, Turn

BLOCK = 4


@dataclass
class FakeRequest:
    """What the hasher reads of vLLM's request."""

    all_token_ids: list[int]
    block_hashes: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def hashes_of(tokens: list[int]) -> list[bytes]:
    last, hashes = b"\0" * HASH_BYTES, []
    for i in range(0, len(tokens) - len(tokens) % BLOCK, BLOCK):
        data = array("q", tokens[i : i + BLOCK]).tobytes()
        last = blake2b(last + data, digest_size=HASH_BYTES).digest()
        hashes.append(last)
    return hashes


def run_through(turns: list[Turn]) -> list[FakeRequest]:
    """Each turn's request at its end, hashed as it grew."""
    text = ChainText(Vocabulary(), "scope", turns, BLOCK, "chain")
    requests = []
    for i in range(len(turns)):
        hasher = text.hasher(i)
        request = FakeRequest(text.prompt(i))
        request.block_hashes += hasher(request)
        for token in text.outputs(i):
            request.all_token_ids.append(token)
            request.block_hashes += hasher(request)
        text.ended(i, request.block_hashes)
        requests.append(request)
    return requests


def test_outputs_are_what_the_next_prompt_has_there() -> None:
    first, second = run_through(
        [
            Turn((Run(1, 6),), 5, 0.0),
            Turn((Run(1, 6), Run(2, 3), Run(3, 9)), 2, 0.0),
        ]
    )
    assert second.all_token_ids[:11] == first.all_token_ids
    assert first.all_token_ids[6:9] != first.all_token_ids[:3]


@pytest.mark.parametrize(
    "second",
    [
        (Run(1, 6), Run(2, 3), Run(3, 9)),
        (Run(1, 5), Run(9, 20)),
        (Run(7, 3),),
        (Run(1, 6), Run(2, 1)),
    ],
)
def test_hashes_taken_over_are_those_of_the_tokens(second: tuple[Run, ...]) -> None:
    turns = [
        Turn((Run(1, 6),), 5, 0.0),
        Turn(second, 7, 0.0),
        Turn((*second, Run(4, 13)), 3, 0.0),
    ]
    for request in run_through(turns):
        assert request.block_hashes == hashes_of(request.all_token_ids)


def test_the_last_output_is_nobody_elses() -> None:
    vocabulary = Vocabulary()
    turns = [Turn((Run(1, 4),), 3, 0.0)]
    left = ChainText(vocabulary, "s", turns, BLOCK, "left")
    right = ChainText(vocabulary, "s", turns, BLOCK, "right")
    assert left.prompt(0) == right.prompt(0)
    assert set(left.outputs(0)).isdisjoint(right.outputs(0))


def test_scopes_share_nothing() -> None:
    vocabulary = Vocabulary()
    assert vocabulary.tokens("a", [Run(1, 2)]) != vocabulary.tokens("b", [Run(1, 2)])


def test_shared_tokens() -> None:
    assert shared_tokens([Run(1, 4), Run(2, 4)], [Run(1, 4), Run(2, 3), Run(5, 1)]) == 7
    assert shared_tokens([Run(1, 4)], [Run(2, 4)]) == 0
    assert shared_tokens([Run(1, 4)], [Run(1, 4), Run(2, 1)]) == 4
