"""The memory that a benchmark copies: blocks on a device, slots in host memory, and what must come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from kvtier.copies.kv_layout import KVLayout
from kvtier.copy_engine import CopyOrder, Direction
from kvtier.linkbench.matrix import CHUNK_BLOCKS

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK_TOKENS: Final = 16


@dataclass(frozen=True, eq=False)
class Transfer:
    """Copy blocks to or from the slots from ``first_slot`` on, in this order."""

    direction: Direction
    block_ids: NDArray[np.int64]
    first_slot: int


class Memory:
    """One buffer on the device and one in host memory, warmed; arenas are cut from them."""

    def __init__(self, device: torch.device, n_bytes: int) -> None:
        """Take ``n_bytes`` on each side, filled with random bytes; the host's are page-locked for CUDA."""
        self.device = device
        generator = torch.Generator().manual_seed(0)
        host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        words = host[: n_bytes // 8 * 8].view(torch.int64)
        words.random_(generator=generator)
        self.host = host
        self.kv = host.flip(0).to(device) if device.type == "cuda" else host.flip(0)

    def arena(self, block_bytes: int, n_blocks: int | None = None) -> Arena:
        """Cut into blocks; all that fit if ``n_blocks`` is None."""
        n_blocks = self.host.numel() // block_bytes if n_blocks is None else n_blocks
        n_blocks -= n_blocks % CHUNK_BLOCKS
        n_bytes = n_blocks * block_bytes
        return Arena(self.kv[:n_bytes], self.host[:n_bytes], block_bytes)


class Arena:
    """Blocks of one size, and as many slots as hold them all.

    Attributes:
        kv: ``[blocks, tokens, width]`` of bfloat16, the KV cache of one layer with nothing but
            width, so that no path has to reorder: the easiest case for each of them.
        host: the slots, uint8. A slot holds `CHUNK_BLOCKS` blocks side by side.
    """

    def __init__(self, kv: torch.Tensor, host: torch.Tensor, block_bytes: int) -> None:
        """Cut both buffers, which are flat uint8."""
        self.block_bytes = block_bytes
        self.n_blocks = kv.numel() // block_bytes
        self.host = host
        self.kv_bytes = kv.view(self.n_blocks, block_bytes)
        width = block_bytes // _BLOCK_TOKENS // 2
        self.kv = kv.view(torch.bfloat16).view(self.n_blocks, _BLOCK_TOKENS, width)
        self.layout = KVLayout.from_kv_caches({"layer.0": self.kv}, num_blocks=self.n_blocks)
        self.slot_bytes = CHUNK_BLOCKS * block_bytes

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.kv.device

    @property
    def host_blocks(self) -> torch.Tensor:
        """The slots as blocks, uint8 ``[blocks, block_bytes]``."""
        return self.host.view(self.n_blocks, self.block_bytes)

    def order(self, transfer: Transfer) -> CopyOrder:
        """The transfer as an order to the copy engine."""
        n_slots = len(transfer.block_ids) // CHUNK_BLOCKS
        slots = (np.arange(n_slots) + transfer.first_slot) * self.slot_bytes
        return CopyOrder(
            order_id=transfer.direction,
            direction=transfer.direction,
            request_id="bench",
            block_ids=transfer.block_ids,
            slots=slots.tolist(),
            chunk_blocks=CHUNK_BLOCKS,
        )

    def expected(self, transfers: list[Transfer]) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks and slots as they must be afterwards, block by block; nothing is changed."""
        kv, host = self.kv_bytes.cpu().clone(), self.host_blocks.clone()
        for transfer in transfers:
            first = transfer.first_slot * CHUNK_BLOCKS
            for i, block_id in enumerate(transfer.block_ids.tolist()):
                if transfer.direction == "store":
                    host[first + i] = self.kv_bytes[block_id].cpu()
                else:
                    kv[block_id] = self.host_blocks[first + i]
        return kv, host

    def equals(self, expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether every byte of both sides is as `expected` said."""
        kv, host = expected
        return bool(torch.equal(self.kv_bytes.cpu(), kv) and torch.equal(self.host_blocks, host))
