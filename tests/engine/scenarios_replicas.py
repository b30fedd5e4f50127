"""Conversations that move between data parallel ranks, which share one CPU tier and no GPU memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.engine.engine_harness import BLOCK_TOKENS, CHUNK_TOKENS, readable, tokens

if TYPE_CHECKING:
    from tests.engine.replicas import Replicas


def moves(replicas: Replicas) -> None:
    """A conversation goes from rank 0 to rank 1 and back: it is loaded, not computed anew."""
    for rank in range(replicas.n_ranks):
        replicas.await_tier(rank)
    staged = {"program": "moves", "pin": False}
    first = replicas.turn(tokens("moves", 700), rank=0, **staged)
    assert first.told["staging"]
    replicas.await_chunks(readable(711) // CHUNK_TOKENS)
    second = replicas.turn(first.then(tokens("moves2", 100)), rank=1, **staged)
    assert (second.cpu, second.cached) == (readable(711), readable(711))
    n_tokens = len(second.prompt) + len(second.tokens) - 1
    replicas.await_chunks(n_tokens // CHUNK_TOKENS)
    replicas.evict()
    third = replicas.turn(second.then(tokens("moves3", 100)), rank=0, **staged)
    assert third.cpu == third.cached == n_tokens // CHUNK_TOKENS * CHUNK_TOKENS


def stays(replicas: Replicas) -> None:
    """A pinned program that returns to its rank hits its pin there."""
    first = replicas.turn(tokens("stays", 700), rank=1, program="stays", ttl_s=600.0, stage=False)
    assert first.told["pinned_blocks"] == 711 // BLOCK_TOKENS
    for i in range(6):
        replicas.turn(tokens(f"flood{i}", 900), 2, rank=1, pin=False, stage=False)
    prompt = first.then(tokens("stays2", 50))
    second = replicas.turn(prompt, rank=1, program="stays", stage=False)
    assert (second.cpu, second.cached) == (0, 711 // BLOCK_TOKENS * BLOCK_TOKENS)


def tenants(replicas: Replicas) -> None:
    """Another tenant on another rank finds nothing of the same text."""
    held = replicas.chunks()
    before = replicas.turn(tokens("salted", 700), rank=0, salt="a", program="t", pin=False)
    replicas.await_chunks(held + readable(711) // CHUNK_TOKENS)
    prompt = before.then(tokens("salted2", 50))
    other = replicas.turn(prompt, rank=1, salt="b", program="t", pin=False, stage=False)
    assert (other.cpu, other.cached) == (0, 0)
