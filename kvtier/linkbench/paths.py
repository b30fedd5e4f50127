"""The ways to copy that are compared: the link's limit, kvtier's engine, and torch block by block."""

from __future__ import annotations

import contextlib
import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from kvtier.copies.switch import Switch, always
from kvtier.copy_engine import INLINE_BYTES, CpuCopyEngine
from kvtier.measuring.link import MoverMeasurement, measure_movers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtier.copies.gpu_kernel import GpuKernel
    from kvtier.copy_engine import CopyEngine, CopyOrder, Direction
    from kvtier.linkbench.arena import Arena, Transfer

_TIMEOUT_S = 120.0
CEILING = "ceiling"
OWN = "kvtier"
"""The engine as vLLM's worker uses it."""
_DIRECTIONS: tuple[Direction, ...] = ("store", "load")


class PathError(RuntimeError):
    """A path cannot be measured here, or failed; the message says why."""


class Copy(Protocol):
    """Prepared transfers; both methods are called once.

    Attributes:
        issue_s: after `wait`: what other threads than the caller's took to submit.
        moving_s: after `wait`: in which bytes moved, by the engine's own report; 0 if none is given.
    """

    issue_s: float
    moving_s: float

    def start(self) -> None:
        """Submit; returns when the caller is free for other work."""

    def wait(self) -> None:
        """Return when all bytes are where they belong."""


class Path(Protocol):
    """One way to copy, bound to an arena."""

    name: str

    def prepare(self, transfers: Sequence[Transfer]) -> Copy:
        """Make ready what is not part of a copy: views of slots, lists of ids."""

    def close(self) -> None:
        """Let go of threads and memory."""


class Streams:
    """A CUDA stream for each direction, or none for a device that has none."""

    def __init__(self, device: torch.device) -> None:
        """Create the streams."""
        self._streams: dict[Direction, torch.cuda.Stream] = {}
        if device.type == "cuda":
            self._streams = {direction: torch.cuda.Stream(device) for direction in _DIRECTIONS}

    def on(self, direction: Direction) -> contextlib.AbstractContextManager[object]:
        """Context in which work goes to the direction's stream."""
        if not self._streams:
            return contextlib.nullcontext()
        on_stream: contextlib.AbstractContextManager[object] = torch.cuda.stream(
            self._streams[direction]
        )
        return on_stream

    def wait(self) -> None:
        """Return when the streams are empty."""
        for stream in self._streams.values():
            stream.synchronize()


class Calls:
    """A `Copy` of one function for each transfer, in stream order."""

    issue_s = moving_s = 0.0

    def __init__(self, calls: Sequence[tuple[Direction, Callable[[], None]]], to: Streams) -> None:
        """Keep what is to be called."""
        self._calls = calls
        self._streams = to

    def start(self) -> None:
        """See `Copy.start`."""
        for direction, call in self._calls:
            with self._streams.on(direction):
                call()

    def wait(self) -> None:
        """See `Copy.wait`."""
        self._streams.wait()


class Ceiling:
    """One large copy each way: ``memcpy`` by so many threads, or a DMA between pinned memory and GPU."""

    name = CEILING

    def __init__(self, arena: Arena, threads: int, n_bytes: int) -> None:
        """Copy ``n_bytes`` whatever the transfers say; ``both`` copies half of it each way."""
        self._arena = arena
        self.n_bytes = n_bytes
        self._streams = Streams(arena.device)
        self._pool = ThreadPoolExecutor(threads)
        self._threads = threads
        self._memcpy = ctypes.CDLL(None).memcpy
        self._memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self._memcpy.restype = ctypes.c_void_p

    def prepare(self, transfers: Sequence[Transfer]) -> Copy:
        """See `Path.prepare`."""
        n_bytes = self.n_bytes // len(transfers)
        kv, host = self._arena.kv_bytes.view(-1), self._arena.host
        calls: list[tuple[Direction, Callable[[], None]]] = []
        for i, transfer in enumerate(transfers):
            here = slice(i * n_bytes, (i + 1) * n_bytes)
            ends = (kv[here], host[here])
            source, target = ends if transfer.direction == "store" else ends[::-1]
            calls.append((transfer.direction, self._call(source, target)))
        return Calls(calls, self._streams)

    def _call(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
        n_bytes = source.numel()
        bounds = [n_bytes * i // self._threads for i in range(self._threads + 1)]

        def part(i: int) -> None:
            start, end = bounds[i], bounds[i + 1]
            self._memcpy(target.data_ptr() + start, source.data_ptr() + start, end - start)

        def copy() -> None:
            if self._arena.device.type == "cuda":
                target.copy_(source, non_blocking=True)
            elif self._threads == 1:
                part(0)
            else:
                list(self._pool.map(part, range(self._threads)))

        return copy

    def close(self) -> None:
        """See `Path.close`."""
        self._pool.shutdown()


class KvtierPath:
    """The copy engine, from `submit` to the result."""

    def __init__(self, arena: Arena, name: str, engine: CopyEngine) -> None:
        """Take over ``engine``, which is bound to the arena."""
        self.name = name
        self._arena = arena
        self._engine = engine

    def prepare(self, transfers: Sequence[Transfer]) -> Copy:
        """See `Path.prepare`."""
        return _EngineCopy(self._engine, [self._arena.order(transfer) for transfer in transfers])

    def close(self) -> None:
        """See `Path.close`."""
        self._engine.close()


class _EngineCopy:
    def __init__(self, engine: CopyEngine, orders: list[CopyOrder]) -> None:
        self._engine = engine
        self._orders = orders
        self.issue_s = self.moving_s = 0.0

    def start(self) -> None:
        for order in self._orders:
            self._engine.submit(order, time.monotonic())

    def wait(self) -> None:
        done = self._engine.drain(_TIMEOUT_S)
        results = self._engine.poll()
        failed = [result.error for result in results if not result.ok]
        if not done or failed or len(results) != len(self._orders):
            raise PathError(failed[0] if failed else f"no result within {_TIMEOUT_S:g} s")
        self.issue_s = sum(result.issue_s for result in results)
        self.moving_s = sum(result.seconds for result in results)


class TorchPerBlock:
    """``copy_`` block by block, as one would write it first."""

    name = "torch per block"

    def __init__(self, arena: Arena) -> None:
        """Bind to the arena."""
        self._arena = arena
        self._streams = Streams(arena.device)

    def prepare(self, transfers: Sequence[Transfer]) -> Copy:
        """See `Path.prepare`."""
        return Calls([(t.direction, self._call(t)) for t in transfers], self._streams)

    def _call(self, transfer: Transfer) -> Callable[[], None]:
        kv, host = self._arena.kv_bytes, self._arena.host_blocks
        first = transfer.first_slot * self._arena.slot_bytes // self._arena.block_bytes
        ids = transfer.block_ids.tolist()

        def store() -> None:
            for i, block_id in enumerate(ids, first):
                host[i].copy_(kv[block_id], non_blocking=True)

        def load() -> None:
            for i, block_id in enumerate(ids, first):
                kv[block_id].copy_(host[i], non_blocking=True)

        return store if transfer.direction == "store" else load

    def close(self) -> None:
        """See `Path.close`."""


@dataclass(frozen=True)
class Ways:
    """How kvtier's engine may copy on a GPU: what is compiled and measured once for all arenas."""

    movers: tuple[MoverMeasurement, ...]
    kernel: GpuKernel | None

    def switch(self) -> Switch:
        """What chooses between them."""
        return Switch({(m.direction, m.mover): m.link.model() for m in self.movers})


def measured_ways(device: torch.device) -> Ways | None:
    """Compile the kernel and calibrate the switch as an engine does at its start; None on the CPU."""
    if device.type != "cuda":
        return None
    from kvtier.copies.driver import load_driver  # noqa: PLC0415 - only where CUDA is
    from kvtier.copies.gpu_kernel import load_kernel  # noqa: PLC0415

    return Ways(measure_movers(device), load_kernel(device, load_driver()))


def kvtier_paths(arena: Arena, ways: Ways | None) -> list[Path]:
    """The engine of the arena's device; on CUDA by DMA, by kernel, and as it chooses itself.

    The last one is what an engine of vLLM uses.
    """
    if ways is None:
        slots = arena.host.numpy()
        engine = CpuCopyEngine(arena.layout, slots, inline_bytes=INLINE_BYTES)
        return [KvtierPath(arena, OWN, engine)]
    from kvtier.copies.cuda import CudaCopyEngine  # noqa: PLC0415 - only where CUDA is

    named = {f"{OWN} dma": always("dma"), f"{OWN} kernel": always("kernel"), OWN: ways.switch()}
    if ways.kernel is None:
        del named[f"{OWN} kernel"]
    return [
        KvtierPath(
            arena,
            name,
            CudaCopyEngine(arena.layout, arena.host, switch=switch, kernel=ways.kernel),
        )
        for name, switch in named.items()
    ]
