"""What programs have in common counts once, whoever comes and goes."""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.shared_blocks import PLACES, SharedBlocks, beginning


def hashes(*parts: tuple[str, int]) -> list[bytes]:
    """A prompt of parts, each so many blocks: a block's hash stands for all before it, too."""
    text, before = "".join(name * n_blocks for name, n_blocks in parts), b""
    return [before := blake2b(before + name.encode(), digest_size=16).digest() for name in text]


def common_blocks(left: list[bytes], right: list[bytes]) -> int:
    return sum(a == b for a, b in zip(left, right, strict=False))


def test_places_are_dense_at_first_and_never_too_far_apart() -> None:
    assert PLACES[:13] == tuple(range(1, 14))
    assert all(b - a <= max(1, a // 12) for a, b in pairwise(PLACES))
    assert len(beginning(hashes(("a", 6250)))) < 100, "what a turn of 100,000 tokens costs"


@pytest.mark.parametrize("n_blocks", [0, 1, 12, 13, 300, 1250])
def test_what_two_prompts_share_is_found_but_for_a_twelfth(n_blocks: int) -> None:
    left, right = hashes(("s", n_blocks), ("a", 40)), hashes(("s", n_blocks), ("b", 900))
    shared: SharedBlocks[str] = SharedBlocks()
    shared.put("left", beginning(left))
    found = shared.found_blocks(beginning(right))
    assert n_blocks * 12 // 13 - 1 <= found <= n_blocks
    shared.put("right", beginning(right))
    assert shared.excess_blocks == found
    shared.drop("left")
    assert shared.excess_blocks == 0
    assert shared.found_blocks(beginning(right)) == PLACES[len(beginning(right)) - 1]


def test_of_a_programs_prompts_the_longest_counts() -> None:
    shared: SharedBlocks[str] = SharedBlocks()
    for name in "ab":
        shared.put(name, beginning(hashes(("s", 10))))
    assert shared.excess_blocks == 10
    shared.put("a", beginning(hashes(("s", 12), ("a", 3))))
    assert shared.excess_blocks == 10
    shared.put("b", beginning(hashes(("s", 12))))
    assert shared.excess_blocks == 12
    # A sub-agent's, which begins otherwise.
    shared.put("a", beginning(hashes(("z", 5))))
    assert shared.excess_blocks == shared.repeated_of("a") == 12
    # Of the same length, or longer: compacted, and gone on with.
    shared.put("a", beginning(hashes(("z", 40))))
    assert shared.excess_blocks == shared.repeated_of("b") == 0
    assert len(shared) == 2


prompts = st.lists(
    st.tuples(st.sampled_from("xy"), st.integers(1, 20)), min_size=1, max_size=4
).map(lambda parts: hashes(*parts))


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.none() | prompts), max_size=20), prompts)
def test_equals_counting_every_block(
    steps: list[tuple[str, list[bytes] | None]], newcomer: list[bytes]
) -> None:
    shared: SharedBlocks[str] = SharedBlocks()
    there: dict[str, list[bytes]] = {}
    for name, prompt in steps:
        if prompt is None:
            there.pop(name, None)
            shared.drop(name)
        else:
            if len(beginning(prompt)) >= len(beginning(there.get(name, []))):
                there[name] = prompt
            shared.put(name, beginning(prompt))
    repeated, distinct = 0, 0.0
    holders = Counter(block_hash for prompt in there.values() for block_hash in prompt)
    for prompt in there.values():
        for at, place in enumerate(PLACES):
            if place <= len(prompt) and holders[prompt[place - 1]] > 1:
                width = place - (PLACES[at - 1] if at else 0)
                repeated += width
                distinct += width / holders[prompt[place - 1]]
    assert shared.repeated_blocks == repeated == sum(map(shared.repeated_of, there))
    assert shared.distinct_blocks == pytest.approx(distinct)
    best = max((common_blocks(newcomer, prompt) for prompt in there.values()), default=0)
    assert shared.found_blocks(beginning(newcomer)) == max(
        (place for place in PLACES if place <= best), default=0
    )
    for name in list(there):
        shared.drop(name)
    assert (shared.repeated_blocks, shared.distinct_blocks, len(shared)) == (0, 0, 0)
    assert not shared._holders
