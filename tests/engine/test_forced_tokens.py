"""The logits processor that makes the demo's requests generate recorded tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

vllm = pytest.importorskip("vllm")
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality  # noqa: E402

from kvtier.demo.forced_tokens import ForcedTokens  # noqa: E402

pytestmark = pytest.mark.engine

VOCABULARY = 16


def params(ids: object) -> Any:
    return vllm.SamplingParams(extra_args=None if ids is None else {"forced_token_ids": ids})


def chosen(processor: ForcedTokens, rows: int) -> list[int]:
    """Greedy choice of each row, where token 0 is the model's own."""
    logits = torch.zeros(rows, VOCABULARY)
    logits[:, 0] = 5.0
    tokens: list[int] = processor.apply(logits).argmax(dim=-1).tolist()
    return tokens


def batch(rows: int, **changes: Any) -> BatchUpdate:
    empty: dict[str, Any] = {"removed": [], "added": [], "moved": []}
    return BatchUpdate(batch_size=rows, **(empty | changes))


def test_positions_follow_the_output_and_other_requests_are_free() -> None:
    processor = ForcedTokens(None, torch.device("cpu"), False)
    output: list[int] = []
    added = [(0, params([7, 3]), [1], output), (1, params(None), [1], [])]
    processor.update_state(batch(2, added=added))
    assert chosen(processor, 2) == [7, 0]
    output.append(7)
    processor.update_state(None)
    assert chosen(processor, 2) == [3, 0]
    output.append(3)
    # Past the recording the model is free.
    assert chosen(processor, 2) == [0, 0]


def test_requests_may_move_and_leave() -> None:
    processor = ForcedTokens(None, torch.device("cpu"), False)
    added: list[Any] = [
        (0, params([7]), [1], []),
        (1, params([9]), [1], []),
        (2, params(None), [1], []),
    ]
    processor.update_state(batch(3, added=added))
    processor.update_state(batch(3, moved=[(0, 2, MoveDirectionality.SWAP)]))
    assert chosen(processor, 3) == [0, 9, 7]
    processor.update_state(batch(2, removed=[1], moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    assert chosen(processor, 2) == [0, 7]


def test_a_resumed_request_goes_on_where_it_was() -> None:
    processor = ForcedTokens(None, torch.device("cpu"), False)
    processor.update_state(batch(1, added=[(0, params([7, 3, 4]), [1], [7, 3])]))
    assert chosen(processor, 1) == [4]


@pytest.mark.parametrize("ids", ["1,2", [1, "2"], [1, -2], [True], {"a": 1}])
def test_malformed_ids_are_refused(ids: object) -> None:
    with pytest.raises(ValueError, match="must be a list of token ids"):
        ForcedTokens.validate_params(params(ids))


@pytest.mark.parametrize("ids", [None, []])
def test_requests_without_ids_choose_for_themselves(ids: list[int] | None) -> None:
    ForcedTokens.validate_params(params(ids))
    processor = ForcedTokens(None, torch.device("cpu"), False)
    free = chosen(processor, 1)
    processor.update_state(batch(1, added=[(0, params(ids), [1], [])]))
    assert chosen(processor, 1) == free
