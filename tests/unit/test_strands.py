"""Conversations of one program in the tier: which one a chain continues, and what staging one leaves."""

from __future__ import annotations

import pytest

from kvtier.chunk_keys import ChunkChain, chain_seed
from kvtier.turns.strands import MAX_STRANDS, Strands
from tests.unit.fake_vllm import BLOCK_TOKENS, CHUNK_TOKENS, FakeRequest
from tests.unit.test_staging import Rig


def chain(*parts: tuple[int, int]) -> ChunkChain:
    """A conversation of `(text, n_chunks)` parts."""
    tokens = [text * 10_000 + i for text, n in parts for i in range(n * CHUNK_TOKENS)]
    request = FakeRequest("r", tokens)
    start = ChunkChain(chain_seed(adapter=None, tenant=None), CHUNK_TOKENS)
    return start.extended(tokens, len(tokens), request.block_hashes, BLOCK_TOKENS)


SYSTEM = (1, 2)


def test_the_first_conversation_has_the_programs_name() -> None:
    strands = Strands()
    assert strands.find("p", chain(SYSTEM)) == "p"
    assert strands.take("p", chain(SYSTEM, (2, 4))) == "p"
    assert strands.names("p") == ["p"]
    assert strands.names("q") == ["q"]


def test_a_conversation_goes_on_under_its_name() -> None:
    strands = Strands()
    main, helper = chain(SYSTEM, (2, 4)), chain(SYSTEM, (3, 4))
    assert strands.take("p", main) == "p"
    assert strands.take("p", helper) == "p.1"
    assert strands.take("p", chain(SYSTEM, (2, 9))) == "p"
    assert strands.take("p", chain(SYSTEM, (3, 9))) == "p.1"
    # The client has rendered the last output anew.
    assert strands.take("p", chain(SYSTEM, (2, 7), (9, 5))) == "p"
    # Begun anew from an earlier turn.
    assert strands.take("p", chain(SYSTEM, (3, 1))) == "p.1"
    assert strands.names("p") == ["p", "p.1"]
    assert strands.find("p", chain(SYSTEM, (3, 5))) == "p.1"


def test_programs_do_not_mix() -> None:
    strands = Strands()
    strands.take("p", chain(SYSTEM, (2, 4)))
    assert strands.take("q", chain(SYSTEM, (3, 4))) == "q"
    strands.forget("p")
    assert len(strands) == 1
    strands.clear()
    assert len(strands) == 0


def test_the_conversation_that_staged_longest_ago_gives_way() -> None:
    strands = Strands()
    names = [strands.take("p", chain((i, 4))) for i in range(2, 2 + MAX_STRANDS)]
    assert len(set(names)) == MAX_STRANDS
    strands.take("p", chain((2, 8)))
    assert strands.take("p", chain((99, 4))) == names[1]
    assert strands.find("p", chain((2, 9))) == names[0]
    assert len(strands.names("p")) == MAX_STRANDS


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_staging_a_sub_agent_leaves_the_main_conversation_staged(rig: Rig) -> None:
    main, helper = chain(SYSTEM, (2, 5)), chain(SYSTEM, (3, 6))
    rig.start("main", main)
    rig.start("helper", helper, first_block=20)
    rig.run()
    assert rig.stager.copies.chunks_of("p", main) == len(main)
    assert rig.stager.copies.chunks_of("p", helper) == len(helper)
    assert not rig.tier.table._orphans, "the tier would give these up before anything else"
    # Only what the lookup of one conversation tells about the other is believed.
    rig.stager.copies.correct("p", helper, 3)
    assert rig.stager.copies.chunks_of("p", helper) == 3
    assert rig.stager.copies.chunks_of("p", main) == len(main)
    rig.stager.copies.correct("p", helper, 1)
    assert rig.stager.copies.chunks_of("p", main) == 1
    rig.stager.forget("p")
    assert rig.stager.copies._staged == {}
    assert rig.quiet
