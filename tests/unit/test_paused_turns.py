"""Hashes of paused turns: always those of the last turn, however they came; bounded in all."""

from __future__ import annotations

from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from kvtier.chunk_keys import ChunkChain
from kvtier.turns.paused_turns import PausedTurns

CHAIN = ChunkChain(b"seed", 8)


def chained(tokens: list[int], width: int = 32) -> list[bytes]:
    """Hashes as vLLM computes them: each depends on all before."""
    hashes, before = [], b""
    for token in tokens:
        before = blake2b(before + b"%d" % token, digest_size=width).digest()
        hashes.append(before)
    return hashes


def remember(turns: PausedTurns, program: str, hashes: list[bytes], n_blocks: int) -> None:
    turns.remember(program, "r", hashes, n_blocks, CHAIN, prompt_blocks=1, tool="bash", salt=None)


def known(turns: PausedTurns, program: str) -> list[bytes]:
    turn = turns.get(program)
    return [] if turn is None else list(turn.hashes_from(0, 1000))


def test_a_turn_is_known_by_its_program() -> None:
    turns = PausedTurns()
    hashes = chained([1, 2, 3, 4])
    turns.remember("p", "r7", hashes, 3, CHAIN, prompt_blocks=2, tool="bash", salt="t")
    turn = turns.get("p")
    assert turn is not None
    assert (turn.request_id, turn.tool, turn.salt, turn.prompt_blocks) == ("r7", "bash", "t", 2)
    assert turn.chain is CHAIN
    assert turn.n_blocks == 3
    assert list(turn.hashes_from(1, 9)) == hashes[1:3]
    assert turns.get("q") is None


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(st.lists(st.tuples(st.sampled_from("pq"), tokens, st.sampled_from([16, 32])), max_size=12))
def test_the_last_turn_counts(history: list[tuple[str, list[int], int]]) -> None:
    """Its conversation may go on from the one before, branch off from it, or be another."""
    turns, last = PausedTurns(), {}
    for program, text, width in history:
        hashes = chained(text, width)
        remember(turns, program, hashes, len(hashes))
        last[program] = hashes
    for program, hashes in last.items():
        assert known(turns, program) == hashes
    assert turns.n_bytes == sum(len(b"".join(hashes)) for hashes in last.values())


def test_who_paused_longest_ago_gives_way() -> None:
    turns = PausedTurns(max_bytes=6 * 32)
    for program in "abca":
        remember(turns, program, chained([1, 2]), 2)
    assert (len(turns), turns.n_bytes) == (3, 6 * 32)
    remember(turns, "d", chained([1]), 1)
    assert [known(turns, program) != [] for program in "abcd"] == [True, False, True, True]
    remember(turns, "e", chained([1] * 7), 7)
    assert (len(turns), turns.n_bytes) == (0, 0), "one that is too large is not kept either"


def test_what_is_over_is_forgotten() -> None:
    turns = PausedTurns()
    remember(turns, "p", chained([1, 2]), 2)
    remember(turns, "q", chained([1]), 1)
    turns.forget("p")
    turns.forget("p")
    assert (len(turns), turns.n_bytes) == (1, 32)
    turns.clear()
    assert (len(turns), turns.n_bytes) == (0, 0)
