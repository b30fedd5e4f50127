"""The copies of LMCache and vLLM, called as they call them.

Both are imported by name when asked for: they take seconds, and need not be installed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvtier.linkbench.matrix import CHUNK_BLOCKS
from kvtier.linkbench.paths import Calls, Copy, PathError, Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.linkbench.arena import Arena, Transfer


def _import(module: str) -> Any:
    """Import what is another's, without its log lines.

    Raises:
        PathError: not installed, or not for this machine.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise PathError(f"{module} cannot be imported: {error}") from error


class LMCachePath:
    """LMCache's ``gather_paged_kv_to_cpu`` and ``scatter_cpu_to_paged_kv`` on views of the slots."""

    name = "lmcache"

    def __init__(self, arena: Arena) -> None:
        """Import LMCache.

        Raises:
            PathError: it is not installed.
        """
        module = _import("lmcache.v1.multiprocess.transfer_context")
        logging.getLogger("lmcache").setLevel(logging.ERROR)
        self._gather = module.gather_paged_kv_to_cpu
        self._scatter = module.scatter_cpu_to_paged_kv
        self._arena = arena
        self._caches = {"layer.0": arena.kv}
        self._streams = Streams(arena.device)

    def prepare(self, transfers: Sequence[Transfer]) -> Copy:
        """See `Path.prepare`."""
        return Calls([(t.direction, self._call(t)) for t in transfers], self._streams)

    def _call(self, transfer: Transfer) -> Callable[[], None]:
        arena, ids = self._arena, transfer.block_ids.tolist()
        # One chunk is [layers, tokens, width]: with one layer, the blocks side by side.
        tokens, width = arena.kv.shape[1] * CHUNK_BLOCKS, arena.kv.shape[2]
        slots = arena.host.view(torch.bfloat16).view(-1, 1, tokens, width)
        n_slots = len(ids) // CHUNK_BLOCKS
        chunks = list(slots[transfer.first_slot : transfer.first_slot + n_slots])

        def store() -> None:
            self._gather(self._caches, ids, CHUNK_BLOCKS, out=chunks)

        def load() -> None:
            self._scatter(self._caches, ids, chunks, CHUNK_BLOCKS)

        return store if transfer.direction == "store" else load

    def close(self) -> None:
        """See `Path.close`."""


class SwapBlocksPath:
    """vLLM's ``swap_blocks_batch``: one call with the addresses of all blocks, as they are."""

    name = "vllm"

    def __init__(self, arena: Arena) -> None:
        """Look the operator up.

        Raises:
            PathError: vLLM is not installed, or this build has no such operator.
        """
        if arena.device.type != "cuda":
            raise PathError("vLLM's swap_blocks_batch copies between a GPU and host memory only")
        self._swap = _import("vllm._custom_ops").swap_blocks_batch
        if not hasattr(torch.ops._C_cache_ops, "swap_blocks_batch"):  # noqa: SLF001 - so vLLM calls it
            raise PathError("this build of vLLM has no swap_blocks_batch")
        self._arena = arena
        self._streams = Streams(arena.device)

    def prepare(self, transfers: Sequence[Transfer]) -> Copy:
        """See `Path.prepare`."""
        return Calls([(t.direction, self._call(t)) for t in transfers], self._streams)

    def _call(self, transfer: Transfer) -> Callable[[], None]:
        arena = self._arena
        kv, host = arena.kv_bytes.data_ptr(), arena.host.data_ptr()
        size, is_load = arena.block_bytes, transfer.direction == "load"

        def copy() -> None:
            n = len(transfer.block_ids)
            first = host + transfer.first_slot * arena.slot_bytes
            blocks = torch.from_numpy(kv + transfer.block_ids * size)
            slots = torch.from_numpy(first + np.arange(n, dtype=np.int64) * size)
            ends = (slots, blocks) if is_load else (blocks, slots)
            sizes = torch.full((n,), size, dtype=torch.int64)
            # As in vLLM: what a copy reads from host memory nobody writes meanwhile.
            self._swap(*ends, sizes, is_src_access_order_any=is_load)

        return copy

    def close(self) -> None:
        """See `Path.close`."""
