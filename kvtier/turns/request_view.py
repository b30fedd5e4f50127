"""Questions to vLLM's requests that take more than reading one attribute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.block_ids import BlockIds
    from kvtier.turns.block_pool import VllmBlockPool

WAKE_PARAMS = {"kvtier": {"wake": True}}
"""What a waker sends, with a prompt of one token. What a client sends so is computed, without kvtier."""

MAX_TRACE_CHARS = 512
"""Of one trace header: what W3C asks a tracing system to pass on at least."""

STOP_TAIL_TOKENS = 64
"""A stop string ends within the last tokens; what is longer counts as an abort."""


def is_tierable(request: Any) -> bool:
    """Whether token ids alone determine the KV: not for images, audio or prompt embeddings.

    A prompt may have both: ids, and embeddings for some of its positions.
    """
    embeddings = getattr(request, "prompt_embeds", None)
    images = getattr(request, "mm_features", None)
    return not images and embeddings is None and request.prompt_token_ids is not None


def is_wake(request: Any) -> bool:
    """Whether this is no request, but vLLM's API process making an idle engine run a hook."""
    params = request.kv_transfer_params
    return bool(params) and params == WAKE_PARAMS and request.num_tokens == 1


def trace_headers(request: Any) -> dict[str, str]:
    """The W3C headers that name the request's trace, where vLLM traces; those too long for one left out."""
    found = getattr(request, "trace_headers", None) or {}
    return {name: value for name, value in found.items() if len(value) <= MAX_TRACE_CHARS}


def was_aborted(request: Any, decode: Callable[[Sequence[int]], str]) -> bool:
    """Whether the client went away. vLLM ends a stop string as aborted too (DESIGN D9)."""
    if request.status.name != "FINISHED_ABORTED":
        return False
    stops = getattr(request.sampling_params, "stop", None) or ()
    if not stops:
        return True
    tail = decode(list(request.output_token_ids[-STOP_TAIL_TOKENS:]))
    return not any(stop in tail for stop in stops)


def reusable_blocks(
    request: Any,
    block_ids: Sequence[int],
    block_tokens: int,
    pool: VllmBlockPool,
    *,
    all_hashed: bool,
) -> BlockIds:
    """The leading blocks of a finished request that a later prompt can hit (DESIGN D9).

    Full, computed and hashed; the last sampled token has no KV. `all_hashed`: see
    `VllmBlockPool.pinnable`.
    """
    full = max(0, min(request.num_tokens - 1, request.num_computed_tokens))
    return pool.pinnable(block_ids[: full // block_tokens], all_hashed=all_hashed)
