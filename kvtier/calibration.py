"""Measured speeds of this machine: the link by run size, and prefill samples.

A `Profile` is one JSON file per machine, model and KV layout. The estimators start from it and
correct it online; formulas serve only until the first one exists.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from kvtier.copies.kv_layout import KVLayout
from kvtier.copy_engine import CopyEngine, CopyOrder, CpuCopyEngine, Direction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kvtier.costs.estimators import LinkModel

logger = logging.getLogger(__name__)

PROFILE_VERSION = 1
RUN_SIZES_BYTES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
SCRATCH_BYTES = 32 << 20
"""Per side: beyond the caches of a core, so that memory is measured."""
_ORDER_TIMEOUT_S = 10.0
_MAX_ROUNDS = 32
_MIN_ROUNDS = 3


class CalibrationError(RuntimeError):
    """A measurement copy failed; the message is the copy engine's."""


@dataclass(frozen=True)
class LinkMeasurement:
    """One direction: ``latency_s`` of an order, and ``(run bytes, bytes/s)`` by run size."""

    latency_s: float
    points: tuple[tuple[int, float], ...]

    def model(self) -> LinkModel:
        """Return the estimators' model of this link."""
        from kvtier.costs.estimators import LinkModel  # noqa: PLC0415 - only where a model is wanted

        return LinkModel(latency_s=self.latency_s, points=self.points)


@dataclass(frozen=True)
class PrefillSample:
    """One prefill: tokens found in the cache, tokens computed, seconds."""

    cached_tokens: int
    new_tokens: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """What was measured on one machine for one model."""

    machine_id: str
    """Digest of the machine's identity; no host name."""
    cpu: str
    gpu: str
    """Name of the accelerator, empty on CPU."""
    model: str
    layout_fingerprint: str
    measured_at: str
    """UTC, ISO 8601."""
    store: LinkMeasurement
    load: LinkMeasurement
    prefill: tuple[PrefillSample, ...] = ()
    version: int = PROFILE_VERSION


def _cpu_engine(layout: KVLayout, region: NDArray[np.uint8]) -> CopyEngine:
    return CpuCopyEngine(layout, region)


def _cuda_engine(layout: KVLayout, region: NDArray[np.uint8]) -> CopyEngine:
    from kvtier.copies.cuda import CudaCopyEngine  # noqa: PLC0415 - only where CUDA is

    # Pinned memory of torch stands in for the registered region.
    tensor = torch.from_numpy(region).pin_memory()
    return CudaCopyEngine(layout, tensor)


def measure_link(
    device: torch.device | str = "cpu",
    *,
    run_sizes_bytes: Sequence[int] = RUN_SIZES_BYTES,
    scratch_bytes: int = SCRATCH_BYTES,
    budget_s: float = 0.6,
    engine_factory: Callable[[KVLayout, NDArray[np.uint8]], CopyEngine] | None = None,
) -> dict[Direction, LinkMeasurement]:
    """Copy scratch memory through the copy engine, both ways, with runs of several sizes.

    Live KV is not touched: the blocks are scratch memory on ``device`` of one run each, in random
    order. The rate is the median over rounds of ``bytes / seconds`` as the engine reports it; the
    latency is the median time from submission to completion of an order of one smallest run, less
    the time its bytes took.

    Args:
        device: where the KV cache lies, ``"cpu"`` or a CUDA device.
        run_sizes_bytes: block sizes, in bytes; those above ``scratch_bytes`` are left out.
        scratch_bytes: memory used on each side, at least one block.
        budget_s: for all sizes and directions together, start-up and first touch excluded.
            Every size is measured at least three times each way, whatever it takes.
        engine_factory: builds the engine over a layout and slots; default by device.

    Raises:
        CalibrationError: an order failed or did not end.
    """
    device = torch.device(device)
    sizes = sorted({size for size in run_sizes_bytes if size <= scratch_bytes})
    if not sizes or sizes[0] <= 0:
        msg = f"no run size in {tuple(run_sizes_bytes)} fits {scratch_bytes} bytes"
        raise CalibrationError(msg)
    if engine_factory is None:
        engine_factory = _cpu_engine if device.type == "cpu" else _cuda_engine
    kv = torch.zeros(scratch_bytes, dtype=torch.uint8, device=device)
    region = np.ones(scratch_bytes, dtype=np.uint8)
    share_s = budget_s / (2 * len(sizes))
    points: dict[Direction, list[tuple[int, float]]] = {"store": [], "load": []}
    latency_s: dict[Direction, float] = {}
    directions: tuple[Direction, ...] = ("store", "load")
    for size in sizes:
        n_blocks = scratch_bytes // size
        layout = KVLayout.from_kv_caches({"scratch": kv[: n_blocks * size].view(n_blocks, size)})
        engine = engine_factory(layout, region)
        try:
            for direction in directions:
                if size == sizes[0]:
                    latency_s[direction] = _latency_s(engine, direction, size)
                rate = _rate(engine, direction, n_blocks, size, share_s)
                points[direction].append((size, rate))
        finally:
            engine.close()
    return {d: LinkMeasurement(latency_s[d], tuple(points[d])) for d in directions}


def _timed(
    engine: CopyEngine, direction: Direction, ids: NDArray[np.int64], size: int
) -> tuple[float, float]:
    """Copy blocks of ``size`` bytes; seconds of copying, seconds from submission to the end."""
    started_s = time.perf_counter()
    order = CopyOrder(
        order_id="calibration",
        direction=direction,
        request_id="calibration",
        block_ids=ids,
        slots=(np.arange(len(ids)) * size).tolist(),
        chunk_blocks=1,
    )
    engine.submit(order, time.monotonic())
    drained = engine.drain(_ORDER_TIMEOUT_S)
    elapsed_s = time.perf_counter() - started_s
    results = engine.poll()
    if not drained or len(results) != 1 or not results[0].ok:
        msg = f"calibration copy failed: {results[0].error if results else 'no result'}"
        raise CalibrationError(msg)
    return results[0].seconds, elapsed_s


def _latency_s(engine: CopyEngine, direction: Direction, size: int) -> float:
    times = [_timed(engine, direction, np.zeros(1, np.int64), size) for _ in range(_MAX_ROUNDS)]
    return statistics.median(max(elapsed - seconds, 0.0) for seconds, elapsed in times)


def _rate(
    engine: CopyEngine, direction: Direction, n_blocks: int, size: int, share_s: float
) -> float:
    """Bytes/s over all blocks in random order; the first round only touches the memory."""
    ids = np.random.default_rng(0).permutation(n_blocks).astype(np.int64)
    _timed(engine, direction, ids, size)
    deadline_s = time.perf_counter() + share_s
    rates: list[float] = []
    while len(rates) < _MIN_ROUNDS or (
        len(rates) < _MAX_ROUNDS and time.perf_counter() < deadline_s
    ):
        seconds, _ = _timed(engine, direction, ids, size)
        rates.append(n_blocks * size / max(seconds, 1e-9))
    return statistics.median(rates)


def machine_id() -> str:
    """Digest over machine id, processor, cores and memory; stable over restarts, no host name.

    machine-id(5) asks to publish only a hash. Containers may lack the file; the rest then counts.
    """
    path = Path("/etc/machine-id")
    parts = (
        path.read_text(encoding="ascii").strip() if path.is_file() else "",
        cpu_name(),
        str(os.cpu_count()),
        str(psutil.virtual_memory().total),
    )
    return hashlib.sha256("\n".join(("kvtier", *parts)).encode()).hexdigest()[:16]


def cpu_name() -> str:
    """Model name of the processor as the kernel gives it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def gpu_name(device: torch.device | str) -> str:
    """Name of a CUDA device, empty for the CPU."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def new_profile(
    model: str,
    layout: KVLayout,
    links: dict[Direction, LinkMeasurement],
    prefill: Sequence[PrefillSample] = (),
) -> Profile:
    """Join measurements with the identity of this machine and the present time."""
    return Profile(
        machine_id=machine_id(),
        cpu=cpu_name(),
        gpu=gpu_name(layout.device),
        model=model,
        layout_fingerprint=layout.fingerprint,
        measured_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        store=links["store"],
        load=links["load"],
        prefill=tuple(prefill),
    )


def profile_path(directory: Path, model: str, layout_fingerprint: str) -> Path:
    """File of this machine's profile for a model and layout."""
    key = hashlib.sha256(f"{model}\n{layout_fingerprint}".encode()).hexdigest()[:12]
    return directory / f"{machine_id()}-{key}.json"


def save_profile(path: Path, profile: Profile) -> None:
    """Write ``profile``; a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the directory cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(profile), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_profile(path: Path) -> Profile | None:
    """Read a profile. None if there is none, and with a warning if it cannot be used."""
    try:
        text = path.read_text(encoding="utf-8")
        return _parse(json.loads(text))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("calibration profile %s ignored: %s: %s", path, type(error).__name__, error)
        return None


def _parse(data: dict[str, object]) -> Profile:
    """Check and build; every defect raises ValueError, TypeError or KeyError."""
    if not isinstance(data, dict) or data.get("version") != PROFILE_VERSION:
        msg = f"not a profile of version {PROFILE_VERSION}"
        raise ValueError(msg)
    samples = data["prefill"]
    if not isinstance(samples, list):
        msg = "prefill is not a list"
        raise TypeError(msg)
    profile = Profile(
        machine_id=_text(data, "machine_id"),
        cpu=_text(data, "cpu"),
        gpu=_text(data, "gpu"),
        model=_text(data, "model"),
        layout_fingerprint=_text(data, "layout_fingerprint"),
        measured_at=_text(data, "measured_at"),
        store=_parse_link(data["store"]),
        load=_parse_link(data["load"]),
        prefill=tuple(
            PrefillSample(int(s["cached_tokens"]), int(s["new_tokens"]), float(s["seconds"]))
            for s in samples
        ),
    )
    if any(s.cached_tokens < 0 or s.new_tokens <= 0 or s.seconds <= 0 for s in profile.prefill):
        msg = "a prefill sample is out of range"
        raise ValueError(msg)
    return profile


def _text(data: dict[str, object], name: str) -> str:
    value = data[name]
    if not isinstance(value, str):
        msg = f"{name} is not a text"
        raise TypeError(msg)
    return value


def _parse_link(data: object) -> LinkMeasurement:
    if not isinstance(data, dict):
        msg = "a link is not an object"
        raise TypeError(msg)
    points = tuple((int(size), float(rate)) for size, rate in data["points"])
    link = LinkMeasurement(float(data["latency_s"]), points)
    link.model()  # checks the values
    return link
