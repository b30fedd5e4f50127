"""Measured speeds of this machine: the link by run size, and prefill samples.

A `Profile` is one JSON file per machine, model and KV layout. The estimators start from it and
correct it online; formulas serve only until the first one exists. `kvtier calibrate` writes one for a
model, or one for the machine alone, from which every model's starts.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast, get_args

import psutil
import torch

from kvtier.copies.plan import Direction
from kvtier.copies.switch import Mover, Switch
from kvtier.measuring.link import (
    CalibrationError,
    LinkMeasurement,
    MoverMeasurement,
    fastest,
    measure_link,
    measure_movers,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtier.copies.kv_layout import KVLayout

__all__ = [
    "CalibrationError",
    "LinkMeasurement",
    "MoverMeasurement",
    "PrefillSample",
    "Profile",
    "fastest",
    "fresh_profile",
    "load_profile",
    "machine_profile_path",
    "measure_link",
    "measure_movers",
    "measure_profile",
    "new_profile",
    "profile_of",
    "profile_path",
    "save_profile",
]

logger = logging.getLogger(__name__)

PROFILE_VERSION: Final = 1
COPY_REVISION: Final = 4
"""Of the copy engine and its measurement: what an older one found says nothing of this one."""
MAX_AGE: Final = dt.timedelta(days=30)
_DRIVER_FILE: Final = Path("/proc/driver/nvidia/version")


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
    driver: str = ""
    """Version of the GPU's driver, empty on CPU."""
    copy_revision: int = 1
    """`COPY_REVISION` of who measured."""
    movers: tuple[MoverMeasurement, ...] = ()
    """The links by DMA and by kernel; empty on CPU."""
    ceilings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Bytes/s of large copies: ``d2h``, ``h2d`` and ``both``. Empty if not measured."""

    def switch(self) -> Switch:
        """What chooses between DMA and kernel."""
        return Switch({(m.direction, m.mover): m.link.model() for m in self.movers})

    def is_fresh(self, device: torch.device, now: dt.datetime | None = None) -> bool:
        """Whether it still holds: same GPU, driver and copy engine, and not older than `MAX_AGE`."""
        try:
            measured_at = dt.datetime.fromisoformat(self.measured_at)
            age = (now or dt.datetime.now(dt.UTC)) - measured_at
        except (ValueError, TypeError):
            return False
        return (
            # A clock that was set back since makes it of the future: then it may be of any age.
            abs(age) <= MAX_AGE
            and self.copy_revision == COPY_REVISION
            and self.gpu == gpu_name(device)
            and self.driver == driver_version(device)
        )


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


def driver_version(device: torch.device | str) -> str:
    """Version of NVIDIA's kernel module, empty for the CPU and where it cannot be read."""
    if torch.device(device).type != "cuda" or not _DRIVER_FILE.is_file():
        return ""
    words = _DRIVER_FILE.read_text(encoding="utf-8", errors="replace").split()
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def new_profile(
    model: str,
    layout: KVLayout,
    links: Mapping[Direction, LinkMeasurement],
    prefill: Sequence[PrefillSample] = (),
    movers: Sequence[MoverMeasurement] = (),
) -> Profile:
    """Join measurements with the identity of this machine and the present time."""
    return profile_of(model, layout.fingerprint, layout.device, links, prefill, movers)


def profile_of(
    model: str,
    layout_fingerprint: str,
    device: torch.device,
    links: Mapping[Direction, LinkMeasurement],
    prefill: Sequence[PrefillSample] = (),
    movers: Sequence[MoverMeasurement] = (),
    ceilings: Mapping[str, float] | None = None,
) -> Profile:
    """As `new_profile`; ``model`` and ``layout_fingerprint`` are empty for the machine's own."""
    return Profile(
        machine_id=machine_id(),
        cpu=cpu_name(),
        gpu=gpu_name(device),
        driver=driver_version(device),
        copy_revision=COPY_REVISION,
        model=model,
        layout_fingerprint=layout_fingerprint,
        measured_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        store=links["store"],
        load=links["load"],
        prefill=tuple(prefill),
        movers=tuple(movers),
        ceilings=dict(ceilings or {}),
    )


def measure_profile(model: str, layout: KVLayout, prefill: Sequence[PrefillSample] = ()) -> Profile:
    """Measure the link of the layout's device, by each mover where there are several.

    Raises:
        CalibrationError: see `measure_link`.
    """
    movers = measure_movers(layout.device)
    links = fastest(movers) if movers else measure_link(layout.device)
    return new_profile(model, layout, links, prefill, movers)


def profile_path(directory: Path, model: str, layout_fingerprint: str) -> Path:
    """File of this machine's profile for a model and layout."""
    key = hashlib.sha256(f"{model}\n{layout_fingerprint}".encode()).hexdigest()[:12]
    return directory / f"{machine_id()}-{key}.json"


def machine_profile_path(directory: Path) -> Path:
    """File of the profile of this machine's link, which is of no model."""
    return directory / f"{machine_id()}-link.json"


def fresh_profile(directory: Path, model: str, layout: KVLayout) -> Profile | None:
    """The stored profile if it still holds, else one from the machine's own; None if none holds.

    What is known of prefill is kept in either case.
    """
    stored = load_profile(profile_path(directory, model, layout.fingerprint))
    if stored is not None and stored.is_fresh(layout.device):
        return stored
    machine = load_profile(machine_profile_path(directory))
    if machine is None or not machine.is_fresh(layout.device):
        return None
    return dataclasses.replace(
        machine,
        model=model,
        layout_fingerprint=layout.fingerprint,
        prefill=() if stored is None else stored.prefill,
    )


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
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        logger.warning("calibration profile %s ignored: %s: %s", path, type(error).__name__, error)
        return None


def _parse(data: dict[str, object]) -> Profile:
    """Check and build; every defect raises ValueError, TypeError, KeyError or OverflowError."""
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
        # Older files lack these.
        driver=_text({"driver": ""} | data, "driver"),
        copy_revision=int(cast("int", data.get("copy_revision", 1))),
        movers=tuple(_parse_mover(mover) for mover in cast("list[object]", data.get("movers", []))),
        ceilings={
            str(way): float(rate)
            for way, rate in dict(cast("dict[str, float]", data.get("ceilings", {}))).items()
        },
    )
    if any(
        s.cached_tokens < 0 or s.new_tokens <= 0 or not 0 < s.seconds < math.inf
        for s in profile.prefill
    ):
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


def _parse_mover(data: object) -> MoverMeasurement:
    if not isinstance(data, dict):
        msg = "a mover is not an object"
        raise TypeError(msg)
    direction, mover = data["direction"], data["mover"]
    if direction not in get_args(Direction) or mover not in get_args(Mover):
        msg = f"unknown mover {direction} {mover}"
        raise ValueError(msg)
    return MoverMeasurement(direction, mover, _parse_link(data["link"]))
