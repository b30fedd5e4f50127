"""The worker's side of the CPU tier: LMCache's shared memory, mapped, and the engine that copies.

Offsets into the region come from another process. They are checked against the mapping, the
mapping against the file, and orders for an earlier life of the region are refused, so that a
wrong offset fails an order and never writes elsewhere.
"""

from __future__ import annotations

import logging
import mmap
import os
import resource
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtier.copies.plan import PIN_PIECE_BYTES
from kvtier.copies.populate import Populating
from kvtier.copy_engine import INLINE_BYTES, CopyEngine, CpuCopyEngine, rejected

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvtier.copies.kv_layout import KVLayout
    from kvtier.copies.plan import CopyOrder, CopyResult, Direction
    from kvtier.copies.switch import Switch

logger = logging.getLogger(__name__)

SHM_DIRECTORY = Path("/dev/shm")  # noqa: S108 - where Linux shows POSIX shared memory
DRAIN_TIMEOUT_S = 10.0

NOT_ATTACHED = "the CPU tier is not attached"
STALE_GENERATION = "the order is for generation {order} of the CPU tier, attached is {attached}"


class SharedRegionError(RuntimeError):
    """The shared memory cannot be used; the message says why and what helps."""


class SharedRegion:
    """LMCache's POSIX shared memory mapped into this process, read and write."""

    def __init__(self, name: str, mapping: mmap.mmap) -> None:
        """Take over ``mapping``; use `open`."""
        self.name = name
        self._mapping = mapping
        self._array: NDArray[np.uint8] | None = np.frombuffer(mapping, dtype=np.uint8)
        self._pinned: list[int] = []
        self._populating: Populating | None = None

    @classmethod
    def open(cls, shm_name: str, size_bytes: int) -> SharedRegion:
        """Map ``size_bytes`` of the segment ``shm_name`` (with or without a leading slash).

        The file is opened directly: ``multiprocessing.shared_memory`` would register the segment
        with this process's resource tracker, which deletes it when the worker ends.

        Raises:
            SharedRegionError: no such segment, owned by another user, too small, or ``/dev/shm``
                has no room for it.
        """
        name = shm_name.removeprefix("/")
        if not name or "/" in name or name in {".", ".."} or size_bytes <= 0:
            msg = f"invalid shared memory {shm_name!r} of {size_bytes} bytes"
            raise SharedRegionError(msg)
        path = SHM_DIRECTORY / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            msg = (
                f"cannot open shared memory {path}: {error.strerror}. The LMCache server must run "
                "on this host, in the same container or with the same /dev/shm (--ipc)"
            )
            raise SharedRegionError(msg) from error
        try:
            _check_file(fd, path, size_bytes)
            return cls(name, mmap.mmap(fd, size_bytes))
        finally:
            os.close(fd)

    @property
    def array(self) -> NDArray[np.uint8]:
        """The whole region, uint8 [size]. While it is referenced, `close` refuses to unmap."""
        if self._array is None:
            msg = f"shared memory {self.name} is closed"
            raise SharedRegionError(msg)
        return self._array

    @property
    def tensor(self) -> torch.Tensor:
        """The same bytes as a torch tensor, uint8 [size]."""
        return torch.from_numpy(self.array)

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return self.array.ctypes.data

    @property
    def size_bytes(self) -> int:
        """Length of the mapping."""
        return self.array.nbytes

    @property
    def is_pinned(self) -> bool:
        """Whether CUDA knows the region as page-locked memory."""
        return bool(self._pinned)

    def pin(self) -> bool:
        """Page-lock the region for CUDA; False, with a warning, if it stays pageable.

        Copies then still work, slower and no longer asynchronously.
        """
        if self.is_pinned:
            return True
        if not torch.cuda.is_available():
            logger.warning("shared memory %s stays pageable: CUDA is not available", self.name)
            return False
        cudart = torch.cuda.cudart()
        for offset in range(0, self.size_bytes, PIN_PIECE_BYTES):
            n_bytes = min(PIN_PIECE_BYTES, self.size_bytes - offset)
            code = int(cudart.cudaHostRegister(self.address + offset, n_bytes, 0))
            if code != 0:
                self._unpin()
                logger.warning(
                    "cudaHostRegister failed (code %d) on %d of %d bytes of %s: copies are slow "
                    "and block. The limit on locked memory is %s (ulimit -l; in a container "
                    "--ulimit memlock=-1 and a large enough --shm-size)",
                    code,
                    n_bytes,
                    self.size_bytes,
                    self.name,
                    _memlock_limit(),
                )
                return False
            self._pinned.append(self.address + offset)
        return True

    def populate(self) -> Populating:
        """Have its pages mapped, beside whatever goes on, so that copies need not wait for each. `close` ends it."""
        if self._populating is None:
            self._populating = Populating(self.address, self.size_bytes)
        return self._populating

    def close(self) -> None:
        """Unmap. Repeated calls do nothing.

        Raises:
            SharedRegionError: an engine or a caller still holds `array` or `tensor`; copies use
                raw addresses, so unmapping now could crash the process.
        """
        if self._array is None:
            return
        if self._populating is not None:
            self._populating.stop()
        self._unpin()
        array, self._array = self._array, None
        address = array.ctypes.data
        del array
        try:
            self._mapping.close()
        except BufferError as error:
            self._array = np.frombuffer(self._mapping, dtype=np.uint8)
            msg = f"shared memory {self.name} at {address:#x} is in use: close its engine first"
            raise SharedRegionError(msg) from error

    def _unpin(self) -> None:
        while self._pinned:
            address = self._pinned.pop()
            cudart = torch.cuda.cudart()
            code = int(cudart.cudaHostUnregister(address))
            if code != 0:
                logger.warning("cudaHostUnregister failed (code %d) on %s", code, self.name)


def _check_file(fd: int, path: Path, size_bytes: int) -> None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
        msg = (
            f"shared memory {path} belongs to user id {info.st_uid}, this process runs as "
            f"{os.geteuid()}: run the LMCache server as the same user"
        )
        raise SharedRegionError(msg)
    if info.st_size < size_bytes:
        msg = f"shared memory {path} has {info.st_size} bytes, {size_bytes} are needed"
        raise SharedRegionError(msg)
    if info.st_blocks * 512 >= size_bytes:  # st_blocks counts 512 bytes on Linux
        return
    # A file in /dev/shm may be larger than the memory behind it. Writing to a page that cannot
    # be had kills the process with SIGBUS; asking for all of them first fails with an error.
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        msg = (
            f"{path.parent} has no room for the {size_bytes} bytes of {path}: {error.strerror}. Raise "
            "its size (docker --shm-size; the default is 64 MB) or lower the CPU tier's"
        )
        raise SharedRegionError(msg) from error


def _memlock_limit() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"


def default_engine(
    layout: KVLayout, region: SharedRegion, switch: Switch | None = None
) -> CopyEngine:
    """Return the copy engine for the KV cache's device; pins the region for CUDA, or has its pages mapped.

    ``switch`` chooses between the GPU's ways to copy.
    """
    if layout.device.type == "cpu":
        region.populate()
        return CpuCopyEngine(layout, region.array, inline_bytes=INLINE_BYTES)
    if layout.device.type == "cuda":
        from kvtier.copies.cuda import CudaCopyEngine  # noqa: PLC0415 - only where CUDA is

        if not region.pin():
            region.populate()
        return CudaCopyEngine(layout, region.tensor, switch=switch)
    msg = f"kvtier cannot copy a KV cache on {layout.device}"
    raise ValueError(msg)


@dataclass(frozen=True)
class _Attachment:
    region: SharedRegion
    engine: CopyEngine
    shm_name: str
    size_bytes: int
    generation: int | str


class CpuPool:
    """One worker's CPU tier: KV layout, mapped region and copy engine.

    Not thread-safe. Every submitted order yields one result, also over `attach` and `detach`.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        engine_factory: Callable[[KVLayout, SharedRegion], CopyEngine] = default_engine,
        clock: Callable[[], float] = time.monotonic,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> None:
        """Bind to the worker's KV cache; the region comes with `attach`."""
        self.layout = layout
        self._engine_factory = engine_factory
        self._clock = clock
        self._drain_timeout_s = drain_timeout_s
        self._attached: _Attachment | None = None
        self._results: list[CopyResult] = []

    @property
    def generation(self) -> int | str | None:
        """Generation of the attached region, None when detached."""
        return None if self._attached is None else self._attached.generation

    def attach(self, shm_name: str, size_bytes: int, generation: int | str) -> None:
        """Map the region; with another name, size or generation, drain and map anew.

        A new generation means that the server restarted and the old file is gone, even under the
        same name: the old mapping would write into memory that nobody reads.

        Raises:
            SharedRegionError: see `SharedRegion.open`. The pool is then detached.
        """
        now = self._attached
        wanted = (shm_name, size_bytes, generation)
        if now is not None and (now.shm_name, now.size_bytes, now.generation) == wanted:
            return
        self.detach()
        region = SharedRegion.open(shm_name, size_bytes)
        try:
            engine = self._engine_factory(self.layout, region)
        except BaseException:
            region.close()
            raise
        self._attached = _Attachment(region, engine, *wanted)

    def detach(self) -> None:
        """Finish what is queued, for at most ``drain_timeout_s``, fail the rest and unmap."""
        now, self._attached = self._attached, None
        if now is None:
            return
        if not now.engine.drain(self._drain_timeout_s):
            logger.warning("copies to %s given up after %g s", now.shm_name, self._drain_timeout_s)
        now.engine.close()
        self._results += now.engine.poll()
        region = now.region
        del now  # the engine holds views of the region
        region.close()

    def submit(self, order: CopyOrder) -> None:
        """Queue ``order``; whatever is wrong with it becomes a failed result."""
        if self._attached is None:
            self._results.append(rejected(order, NOT_ATTACHED))
        elif order.generation != self._attached.generation:
            error = STALE_GENERATION.format(
                order=order.generation, attached=self._attached.generation
            )
            self._results.append(rejected(order, error))
        else:
            self._attached.engine.submit(order, self._clock())

    def cancel(self, order_id: int | str) -> bool:
        """See `CopyEngine.cancel`."""
        return self._attached is not None and self._attached.engine.cancel(order_id)

    def backlog_bytes(self, direction: Direction) -> int:
        """Bytes submitted in this direction and not finished."""
        return 0 if self._attached is None else self._attached.engine.backlog_bytes(direction)

    def poll(self) -> list[CopyResult]:
        """Results since the last call; empty while nothing has finished."""
        results, self._results = self._results, []
        if self._attached is not None:
            results += self._attached.engine.poll()
        return results

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or running; False if ``timeout_s`` passed before."""
        return self._attached is None or self._attached.engine.drain(timeout_s)
