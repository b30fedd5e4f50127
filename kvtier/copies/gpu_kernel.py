"""The copy kernel, compiled for the device, and how large it is launched."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

    from kvtier.copies.driver import Driver

logger = logging.getLogger(__name__)

SOURCE: Final = Path(__file__).with_name("copy_runs.cu")
NAME: Final = "kvtier_copy_runs"
BLOCK_THREADS: Final = 1024
"""One block fills a multiprocessor, so a grid of n occupies at most n of them."""
PART_BYTES: Final = 64 << 10
"""Longer runs are cut, so that the warps end together."""
_MULTIPROCESSORS_PART: Final = 16
_MIN_BLOCKS: Final = 2


@dataclass(frozen=True)
class GpuKernel:
    """A loaded kernel.

    Attributes:
        function: the driver's handle.
        grid_blocks: blocks of `BLOCK_THREADS` that are launched.
        module: keeps the code loaded.
    """

    function: int
    grid_blocks: int
    module: Any = field(repr=False)


def grid_blocks(multiprocessors: int) -> int:
    """A sixteenth of the device: 8 of an H100's 132, each with 128 KiB in flight."""
    return max(_MIN_BLOCKS, multiprocessors // _MULTIPROCESSORS_PART)


def load_kernel(device: torch.device, driver: Driver) -> GpuKernel | None:
    """Compile the kernel, or None, with a line in the log, where it cannot be used."""
    index = device.index or 0
    if not driver.maps_host_memory(index):
        logger.info("GPU %d does not address host memory: copies go by DMA alone", index)
        return None
    try:
        cupy: Any = importlib.import_module("cupy")
        with cupy.cuda.Device(index) as current:
            module = cupy.RawModule(
                code=SOURCE.read_text(encoding="utf-8"), options=("--std=c++17",)
            )
            function = module.get_function(NAME)
            handle = int(function.kernel.ptr)
            count = int(current.attributes["MultiProcessorCount"])
    except Exception as error:  # noqa: BLE001 - no cupy, no compiler, no such device: DMA does it
        logger.info("no copy kernel, copies go by DMA alone: %s: %s", type(error).__name__, error)
        return None
    return GpuKernel(handle, grid_blocks(count), (module, function))
