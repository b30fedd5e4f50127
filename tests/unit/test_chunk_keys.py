"""Chunk keys: incremental hashing changes nothing, and what must not share a key does not."""

from __future__ import annotations

from array import array
from dataclasses import replace
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.chunk_keys import ChunkChain, chain_seed, namespace
from kvtier.server.residency import ResidencyTable
from kvtier.wire import KEY_BYTES, split_keys
from tests.unit.fake_l1 import FakeL1
from tests.unit.fake_vllm import engine_facts

BLOCK_TOKENS = 2
CHUNK_TOKENS = 6
SEED = chain_seed(adapter=None, tenant=None)


def block_hashes(tokens: list[int], seed: bytes = b"engine") -> list[bytes]:
    """Chained hashes of the full blocks, as the engine computes them from a random seed."""
    hashes, last = [], seed
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        block = repr(tokens[end - BLOCK_TOKENS : end]).encode()
        last = blake2b(last + block, digest_size=32).digest()
        hashes.append(last)
    return hashes


def chain_of(
    tokens: list[int],
    start: ChunkChain | None = None,
    *,
    n_tokens: int | None = None,
    chain_seed: bytes = SEED,
    hash_seed: bytes = b"engine",
) -> ChunkChain:
    start = ChunkChain(chain_seed, CHUNK_TOKENS) if start is None else start
    n_tokens = len(tokens) if n_tokens is None else n_tokens
    return start.extended(tokens, n_tokens, block_hashes(tokens, hash_seed), BLOCK_TOKENS)


tokens_st = st.lists(st.integers(0, 3), max_size=40)


@settings(deadline=None)
@given(st.lists(tokens_st, min_size=1, max_size=5), st.data())
def test_extension_equals_hashing_from_scratch(tails: list[list[int]], data: st.DataObject) -> None:
    """A program's sequences share prefixes of any length, grow, shrink and branch."""
    chain, tokens = ChunkChain(SEED, CHUNK_TOKENS), list[int]()
    for tail in tails:
        tokens = tokens[: data.draw(st.integers(0, len(tokens)))] + tail
        n_tokens = data.draw(st.integers(0, len(tokens)))
        before = bytes(chain.keys), list(chain.marks)
        extended = chain_of(tokens, chain, n_tokens=n_tokens)
        assert extended == chain_of(tokens, n_tokens=n_tokens)
        assert len(extended) == n_tokens // CHUNK_TOKENS
        assert len(extended.keys) == KEY_BYTES * len(extended)
        assert (bytes(chain.keys), chain.marks) == before, "extending changed the old chain"
        chain = extended


@settings(deadline=None)
@given(tokens_st, tokens_st)
def test_equal_keys_mean_equal_prefixes(left: list[int], right: list[int]) -> None:
    mine, theirs = (split_keys(bytes(chain_of(tokens).keys)) for tokens in (left, right))
    for i, (a, b) in enumerate(zip(mine, theirs, strict=False), start=1):
        end = i * CHUNK_TOKENS
        assert (a == b) == (left[:end] == right[:end])


@given(tokens_st, st.integers(0, 8))
def test_the_head_of_a_chain_is_a_chain(tokens: list[int], n_chunks: int) -> None:
    assert chain_of(tokens).head(n_chunks) == chain_of(tokens[: n_chunks * CHUNK_TOKENS])


def test_the_key_is_a_rolling_hash_of_the_tokens() -> None:
    """Stored KV outlives kvtier's process: the bytes of a key are a format."""
    tokens = list(range(100 * CHUNK_TOKENS))
    key, keys = SEED, b""
    for start in range(0, len(tokens), CHUNK_TOKENS):
        chunk = array("q", tokens[start : start + CHUNK_TOKENS]).tobytes()
        key = blake2b(key + chunk, digest_size=16).digest()
        keys += key
    assert bytes(chain_of(tokens).keys) == keys
    known = chain_of(tokens[: 40 * CHUNK_TOKENS])
    assert bytes(chain_of(tokens, known).keys) == keys


@given(tokens_st, st.binary(max_size=8), st.binary(max_size=8))
def test_keys_do_not_depend_on_the_block_hash_seed(
    tokens: list[int], one: bytes, other: bytes
) -> None:
    assert chain_of(tokens, hash_seed=one).keys == chain_of(tokens, hash_seed=other).keys


texts = st.none() | st.text(max_size=12)


@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_adapters_and_tenants_never_share_a_key(
    one: tuple[str | None, str | None], other: tuple[str | None, str | None]
) -> None:
    seeds = [chain_seed(adapter=adapter, tenant=tenant) for adapter, tenant in (one, other)]
    same = [tuple(part or "" for part in who) for who in (one, other)]
    assert (seeds[0] == seeds[1]) == (same[0] == same[1])
    tokens = list(range(2 * CHUNK_TOKENS))
    keys = [set(split_keys(bytes(chain_of(tokens, chain_seed=seed).keys))) for seed in seeds]
    assert bool(keys[0] & keys[1]) == (same[0] == same[1])


def test_a_part_may_not_move_from_adapter_to_tenant() -> None:
    assert chain_seed(adapter="ab", tenant="c") != chain_seed(adapter="a", tenant="bc")
    assert chain_seed(adapter="x", tenant=None) != chain_seed(adapter=None, tenant="x")


parts_st = st.dictionaries(
    st.sampled_from(["model", "dtype", "layout", "epoch"]), st.text(max_size=6) | st.integers(0, 3)
)


identity_st = st.dictionaries(
    st.sampled_from(["model", "revision", "dtype", "cache_dtype", "layout", "ranks"]),
    st.text(max_size=6),
    min_size=1,
)


@given(parts_st, parts_st)
def test_namespaces_differ_with_any_part(
    one: dict[str, str | int], other: dict[str, str | int]
) -> None:
    as_text = [{k: str(v) for k, v in parts.items()} for parts in (one, other)]
    assert (namespace(**one) == namespace(**other)) == (as_text[0] == as_text[1])


def namespace_of(identity: dict[str, str], epoch: str) -> str:
    return replace(engine_facts(), identity=tuple(identity.items())).namespace(epoch)


@settings(deadline=None)
@given(
    identity_st.flatmap(lambda parts: st.tuples(st.just(parts), st.sampled_from(sorted(parts)))),
    st.text(max_size=6),
    st.tuples(st.sampled_from(["", "epoch"]), st.sampled_from(["", "epoch"])),
)
def test_engines_that_differ_in_one_part_never_find_each_others_chunks(
    identity_and_part: tuple[dict[str, str], str], other: str, epochs: tuple[str, str]
) -> None:
    """On one server: the same tokens, the same program's name, and one part or the epoch another."""
    identity, part = identity_and_part
    mine = namespace_of(identity, epochs[0])
    theirs = namespace_of({**identity, part: other}, epochs[1])
    server = ResidencyTable(FakeL1(8))
    keys = bytes(chain_of(list(range(2 * CHUNK_TOKENS))).keys)
    assert server.reserve("one", 1, mine, "program", keys, 0, 2, 1, 1, 1.0, 60.0, 0.0) is not None
    assert server.commit("one", 1, 0.0, ok=True) == 2
    found, _ = server.lookup("other", 2, theirs, "program", keys, 1, 0.0)
    is_same = other == identity[part] and epochs[0] == epochs[1]
    assert found == (2 if is_same else 0)


def test_namespace_is_readable_and_legal_for_lmcache() -> None:
    name = namespace(model="org/Model 7B@v1", dtype="bf16")
    assert name.startswith("org-Model-7B-v1.")
    assert all(c.isalnum() or c in "-._" for c in name)
    assert namespace(a="1", b="2") == namespace(b="2", a="1")


@pytest.mark.parametrize("n_hashes", [0, 2, 3, 5])
def test_blocks_that_the_engine_has_not_hashed_give_no_key(n_hashes: int) -> None:
    tokens = list(range(3 * CHUNK_TOKENS))
    hashes = block_hashes(tokens)[:n_hashes]
    chain = ChunkChain(SEED, CHUNK_TOKENS).extended(tokens, len(tokens), hashes, BLOCK_TOKENS)
    assert len(chain) == n_hashes * BLOCK_TOKENS // CHUNK_TOKENS
