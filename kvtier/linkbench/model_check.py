"""Whether the cost model's link predicts how long a reload takes."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from kvtier.linkbench.arena import Memory, Transfer
from kvtier.linkbench.matrix import (
    BLOCK_BYTES,
    CHUNK_BLOCKS,
    QUICK_BLOCK_BYTES,
    SMALL_COUNTS,
    block_tables,
)
from kvtier.linkbench.paths import Ways, kvtier_paths, measured_ways
from kvtier.measuring.link import fastest, measure_link

if TYPE_CHECKING:
    from kvtier.costs.link_model import LinkModel
    from kvtier.linkbench.demo_reloads import DemoReloads
    from kvtier.linkbench.matrix import Layout
    from kvtier.linkbench.measure import Plan

_LAYOUTS: Final[tuple[Layout, ...]] = ("runs4", "scattered")
_SEED: Final = 1


@dataclass(frozen=True)
class Prediction:
    """One kind of reload: what the link model says, and the median of what was measured."""

    block_bytes: int
    blocks: int
    layout: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Distance from the measured time, as a share of it."""
        return abs(self.predicted_s - self.measured_s) / self.measured_s


@dataclass(frozen=True)
class ModelCheck:
    """All predictions of one run."""

    predictions: tuple[Prediction, ...]
    demo: DemoReloads | None = None
    """What an engine has predicted while it served."""

    @property
    def median_error(self) -> float:
        """Median over all kinds of reload."""
        return statistics.median(prediction.error for prediction in self.predictions)

    def as_object(self) -> dict[str, Any]:
        """The check for JSON."""
        rows = [asdict(p) | {"error": p.error} for p in self.predictions]
        found: dict[str, Any] = {"median_error": self.median_error, "predictions": rows}
        return found if self.demo is None else found | {"demo": self.demo.as_object()}


def check_model(plan: Plan) -> ModelCheck:
    """Calibrate, on a CPU without the reader that there is at the start of an engine, then reload and compare.

    Small and large reloads of every block size, in fours and scattered. All are made in turn in each
    round, and the link is measured before and after: a drift of the machine is no error of the model.
    """
    sizes = QUICK_BLOCK_BYTES if plan.quick else BLOCK_BYTES
    ways = measured_ways(plan.device)
    before = _load_model(plan, ways)
    memory = Memory(plan.device, 2 * plan.total_bytes)
    measured: dict[tuple[int, int, Layout, float], float] = {}
    for size in sizes:
        arena = memory.arena(size)
        path = kvtier_paths(arena, ways)[-1]
        try:
            largest = plan.total_bytes // size
            for blocks in sorted({min(SMALL_COUNTS[-1], largest), largest}):
                for layout in _LAYOUTS:
                    run = size * (4 if layout == "runs4" else 1)
                    tables = block_tables(layout, blocks, arena.n_blocks, _SEED)
                    times = []
                    for _ in range(plan.rounds + 1):
                        copy = path.prepare([Transfer("load", next(tables), 0)])
                        started_s = time.perf_counter()
                        copy.start()
                        copy.wait()
                        elapsed_s = time.perf_counter() - started_s
                        # As `measure_link` has it: on a CPU without the thread's waking.
                        on_cpu = plan.device.type == "cpu"
                        times.append(copy.moving_s if on_cpu else elapsed_s)
                    measured[size, blocks, layout, run] = statistics.median(times[1:])
        finally:
            path.close()
    after = _load_model(plan, measured_ways(plan.device))
    return ModelCheck(
        tuple(
            Prediction(
                size,
                blocks - blocks % CHUNK_BLOCKS,
                layout,
                statistics.fmean(m.seconds(size * blocks, int(run)) for m in (before, after)),
                seconds,
            )
            for (size, blocks, layout, run), seconds in measured.items()
        )
    )


def _load_model(plan: Plan, ways: Ways | None) -> LinkModel:
    """The link model of the idle machine, which an engine on a GPU starts from."""
    if ways is None:
        return measure_link(plan.device, beside_reader=False)["load"].model()
    return fastest(ways.movers)["load"].model()
