"""Private memory of a deployment's processes over time, and how fast it grows.

The control server keeps the last decisions in a window of a fixed size (`kvtier_control_decision_history_bytes`), which
takes hours to fill: its memory is taken without that, or rather without what that takes at least.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from kvtier.control.files import ControlFiles
from kvtier.operator.chaos_faults import SERVER_NAME
from kvtier.server.files import ServerFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE_S: Final = 5.0
FEWEST_SAMPLES: Final = 24
HISTORY_AT_LEAST: Final = 0.8
"""The count is rough: the window's memory is 0.8 to 1.2 of it, by the size of decisions."""
CONTROL_SERVER: Final = "control server, but for its history"
_MIB: Final = 1 << 20


@dataclass(frozen=True)
class Sample:
    """Private memory of one process; `at_s` is counted from the beginning."""

    at_s: float
    pid: int
    anon_bytes: int


class Memory:
    """Samples the processes' private memory in a thread, while the context lasts."""

    def __init__(self, run_dir: Path, engine_pid: int, control_metrics: str) -> None:
        self._run_dir = run_dir
        self._control_metrics = control_metrics
        self._engine = psutil.Process(engine_pid)
        self._began_s = time.monotonic()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="memory")
        self.samples: dict[str, list[Sample]] = defaultdict(list)

    def __enter__(self) -> dict[str, list[Sample]]:
        """Begin; what is sampled comes into the value."""
        self._thread.start()
        return self.samples

    def __exit__(self, *_: object) -> None:
        """End.

        Raises:
            Exception: What ended the sampling before.
        """
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._sample()
        except Exception as error:  # noqa: BLE001 - a short series would be judged as a whole one
            self._error = error

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            at_s = time.monotonic() - self._began_s
            for role, pid in self._processes():
                with suppress(OSError, psutil.Error, httpx.HTTPError):
                    n_bytes = anon_bytes(pid)
                    if role == CONTROL_SERVER:
                        n_bytes -= round(HISTORY_AT_LEAST * self._history_bytes())
                    self.samples[role].append(Sample(at_s, pid, n_bytes))

    def _history_bytes(self) -> int:
        text = httpx.get(self._control_metrics, timeout=SAMPLE_S).raise_for_status().text
        (family,) = (
            found
            for found in text_string_to_metric_families(text)
            if found.name == "kvtier_control_decision_history_bytes"
        )
        return int(family.samples[0].value)

    def _processes(self) -> Iterator[tuple[str, int]]:
        parent = self._engine.parent()
        if parent is not None:
            yield "API server", parent.pid
        yield "engine", self._engine.pid
        for i, child in enumerate(self._engine.children()):
            yield f"worker {i}", child.pid
        server = ServerFiles(self._run_dir, SERVER_NAME).read_record()
        if server is not None and server.server is not None and server.server.alive():
            yield "LMCache server", server.server.pid
        control = ControlFiles(self._run_dir).read_record()
        if control is not None:
            yield CONTROL_SERVER, control.pid


def anon_bytes(pid: int) -> int:
    """Private memory of a process: without files and without the tier's shared memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise ProcessLookupError(pid)


def growth(samples: list[Sample]) -> dict[str, Any]:
    """The slope of the longest life of a process, in MiB an hour, with its 95 % interval.

    The median of the slopes between any two samples (Theil and Sen): memory that an allocator takes or gives back once, in
    a step, is no growth, and a line of least squares would make it one.
    """
    from scipy import stats  # noqa: PLC0415 - slow to load

    lives: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        lives[sample.pid].append(sample)
    longest = max(lives.values(), key=len)
    judged = longest[len(longest) // 3 :]
    found: dict[str, Any] = {
        "lives": len(lives),
        "minutes": (longest[-1].at_s - longest[0].at_s) / 60,
        "first_mib": longest[0].anon_bytes / _MIB,
        "settled_mib": judged[0].anon_bytes / _MIB,
        "last_mib": longest[-1].anon_bytes / _MIB,
    }
    if len(judged) < FEWEST_SAMPLES:
        return found
    slope, _, low, high = stats.theilslopes(
        [sample.anon_bytes / _MIB for sample in judged], [sample.at_s / 3600 for sample in judged]
    )
    return found | {
        "mib_per_hour": float(slope),
        "low_per_hour": float(low),
        "high_per_hour": float(high),
    }
