"""Plain vLLM: the tokens that kvtier must reproduce."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.engine.engine_harness import Engine


def replay(engine: Engine, prompts: list[list[int]], lengths: list[int]) -> None:
    """Generate for each prompt, one after the other: the records hold the results."""
    for prompt, length in zip(prompts, lengths, strict=True):
        engine.turn(prompt, length)
