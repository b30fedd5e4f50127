"""A vLLM logits processor that makes a request generate recorded tokens.

The demo's arms must do the same work, yet batching makes bfloat16 outputs differ between
runs. Writing another text into the next prompt than the engine generated would be no
answer: the KV cache of the generated part would then not be reusable. So the output
itself is forced: a request with ``vllm_xargs={"forced_token_ids": [...]}`` generates
position ``i`` as ``forced_token_ids[i]``; later positions, and other requests, are free.

Loaded with ``vllm serve --logits-processors kvtier.demo.forced_tokens:ForcedTokens``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig

FORCED_TOKENS_ARG = "forced_token_ids"

# What is kept per request: the ids to force, and the engine's running list of output ids.
_Forced = tuple[list[int], list[int]]


def _forced_ids(params: SamplingParams) -> list[int] | None:
    """The ids a request asks for; None when it asks for none.

    Raises:
        ValueError: not a list of non-negative integers.
    """
    ids: object = (params.extra_args or {}).get(FORCED_TOKENS_ARG)
    if ids is None:
        return None
    if not isinstance(ids, list) or any(type(item) is not int or item < 0 for item in ids):
        message = f"{FORCED_TOKENS_ARG} must be a list of token ids"
        raise ValueError(message)
    return ids


class ForcedTokens(LogitsProcessor):  # type: ignore[misc] # vLLM is untyped here
    """Forces the outputs of requests that carry ``forced_token_ids``."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request whose ids are malformed (vLLM answers HTTP 400)."""
        _forced_ids(sampling_params)

    def __init__(
        self,
        vllm_config: VllmConfig,  # noqa: ARG002 - vLLM's constructor signature
        device: torch.device,  # noqa: ARG002
        is_pin_memory: bool,  # noqa: ARG002
    ) -> None:
        """Start with no forced request."""
        self._rows: dict[int, _Forced] = {}

    def is_argmax_invariant(self) -> bool:
        """False: the most likely token changes."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests through the rows of the batch."""

        def state_of(
            params: SamplingParams, _prompt_ids: list[int] | None, output_ids: list[int]
        ) -> _Forced | None:
            ids = _forced_ids(params)
            return None if ids is None else (ids, output_ids)

        process_dict_updates(self._rows, batch_update, state_of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave only the recorded token possible, in place. ``logits``: (requests, vocabulary)."""
        for row, (forced, output) in self._rows.items():
            position = len(output)
            if position < len(forced):
                logits[row] = float("-inf")
                logits[row, forced[position]] = 0.0
        return logits
