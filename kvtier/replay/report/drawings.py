"""The page's drawings: distributions, GPU memory, link, timelines, and the curve of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from kvtier.replay.report import charts
from kvtier.replay.report.charts import Chart, Mark, Tick
from kvtier.replay.summary import prefill_alone_s

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtier.replay.machine import Machine
    from kvtier.replay.simulation import Replayed, TurnRecord
    from kvtier.replay.sweep import Outcome, Sweep

HUES: Final = 6
"""Colours of curves; further curves are dashed."""
MAX_ROWS: Final = 100
ROW_HEIGHT: Final = 11.0
_CHART_HEIGHT: Final = 300.0
_MEMORY_HEIGHT: Final = 190.0
_GB: Final = 1e9
_LAYERS: Final = ("running", "pinned", "cached", "free")


@dataclass(frozen=True, slots=True)
class Row:
    """One program of a timeline."""

    program: str
    title: str
    top: float
    marks: list[Mark]


@dataclass(frozen=True, slots=True)
class Timeline:
    """One policy's programs over time."""

    policy: str
    height: float
    left_out: int
    x_ticks: list[Tick]
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class LinkUse:
    """How much one policy used the link, by direction: gigabytes, and share of the time."""

    policy: str
    store: tuple[float, float]
    load: tuple[float, float]


@dataclass(slots=True)
class Drawings:
    """All of a page."""

    curves: list[Chart] = field(default_factory=list)
    memory: list[Chart] = field(default_factory=list)
    links: list[LinkUse] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)


def draw(
    outcomes: Sequence[Outcome], sweep: Sweep | None, swept: Mapping[str, Any] | None
) -> Drawings:
    """What is drawn of the replays that have ended: of a sweep, its curve only."""
    if sweep is not None and swept is not None:
        return Drawings(curves=[_sweep_chart(swept)])
    replays = [o.replayed for o in outcomes if o.replayed is not None]
    if not replays:
        return Drawings()
    machine = outcomes[0].cell.machine
    end_s = max(replayed.virtual_s for replayed in replays)
    return Drawings(
        curves=_distributions(replays),
        memory=[_memory(replayed, machine, end_s) for replayed in replays if replayed.memory],
        links=[_link(replayed) for replayed in replays],
        timelines=[_timeline(replayed, machine, end_s) for replayed in replays],
    )


def _curve_css(number: int) -> str:
    dashed = f" dash-{number // HUES}" if number >= HUES else ""
    return f"hue-{number % HUES}{dashed}"


def _distributions(replays: Sequence[Replayed]) -> list[Chart]:
    jct_s = [[end - r.arrived_s[name] for name, end in r.ended_s.items()] for r in replays]
    ttft_s = [[turn.first_token_s - turn.arrived_s for turn in r.turns] for r in replays]
    linear = charts.x_axis(max(map(max, jct_s)))
    log = charts.log_axis([value for values in ttft_s for value in values])
    y = charts.y_axis(1.0, _CHART_HEIGHT)
    shares = [Tick(y.at(share), f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    made = []
    for title, x, values, whose in (
        ("Job completion time", linear, jct_s, "programs"),
        ("Time to first token", log, ttft_s, "requests"),
    ):
        x_label = f"seconds, {'logarithmic' if x.log else 'virtual'}"
        chart = Chart(title, x_label, f"share of {whose}", _CHART_HEIGHT, x.ticks(), shares)
        for number, (replayed, own) in enumerate(zip(replays, values, strict=True)):
            path = charts.ecdf(own, x, y)
            chart.marks.append(Mark(replayed.policy, _curve_css(number), path))
        made.append(chart)
    return made


def _sweep_chart(swept: Mapping[str, Any]) -> Chart:
    values = swept["values"]
    means: Mapping[str, list[float | None]] = swept["mean_jct_s"]
    x = charts.Axis(min(0.0, *values), max(values) or 1.0, charts.LEFT, charts.WIDTH - charts.RIGHT)
    y = charts.y_axis(max((m for own in means.values() for m in own if m), default=1.0), 300.0)
    chart = Chart(
        "Mean job completion time", swept["option"], "seconds", _CHART_HEIGHT, x.ticks(), y.ticks()
    )
    for number, (policy, own) in enumerate(means.items()):
        points = sorted((v, m) for v, m in zip(values, own, strict=True) if m is not None)
        if points:
            chart.marks.append(Mark(policy, _curve_css(number), charts.line(points, x, y)))
    return chart


def _memory(replayed: Replayed, machine: Machine, end_s: float) -> Chart:
    samples = [replayed.memory[i] for i in charts.thinned(len(replayed.memory))]
    gb = machine.block_bytes / _GB
    at_s = [sample.at_s for sample in samples]
    layers = [[getattr(sample, name) * gb for sample in samples] for name in _LAYERS]
    x = charts.x_axis(max(end_s, at_s[-1]))
    y = charts.y_axis(max(map(sum, zip(*layers, strict=True))), _MEMORY_HEIGHT)
    chart = Chart(replayed.policy, "s", "GB", _MEMORY_HEIGHT, x.ticks(), y.ticks())
    lower = [0.0] * len(samples)
    for name, own in zip(_LAYERS, layers, strict=True):
        upper = [a + b for a, b in zip(lower, own, strict=True)]
        chart.marks.append(Mark(name, f"m-{name}", charts.band(at_s, lower, upper, x, y)))
        lower = upper
    return chart


def _link(replayed: Replayed) -> LinkUse:
    def use(direction: Any) -> tuple[float, float]:
        moved = replayed.link_bytes.get(direction, 0) / _GB
        return moved, min(1.0, replayed.link_busy_s.get(direction, 0.0) / replayed.virtual_s)

    return LinkUse(replayed.policy, use("store"), use("load"))


def _timeline(replayed: Replayed, machine: Machine, end_s: float) -> Timeline:
    x = charts.Axis(0.0, end_s, 2 * charts.LEFT, charts.WIDTH - charts.RIGHT)
    own: dict[str, list[TurnRecord]] = {}
    for turn in replayed.turns:
        own.setdefault(turn.program, []).append(turn)
    names = sorted(replayed.ended_s, key=lambda name: (replayed.arrived_s[name], name))
    rows = []
    for number, name in enumerate(names[:MAX_ROWS]):
        top = charts.TOP + number * ROW_HEIGHT
        jct_s = replayed.ended_s[name] - replayed.arrived_s[name]
        turns = own[name]
        title = f"{name}: {len(turns)} turns, job completion {jct_s:.1f} s"
        rows.append(Row(name, title, top, _row_marks(turns, machine, x, top)))
    height = charts.TOP + len(rows) * ROW_HEIGHT + charts.BOTTOM
    return Timeline(replayed.policy, height, len(names) - len(rows), x.ticks(" s"), rows)


def _row_marks(
    turns: Sequence[TurnRecord], machine: Machine, x: charts.Axis, top: float
) -> list[Mark]:
    chains: dict[str, list[TurnRecord]] = {}
    for turn in turns:
        chains.setdefault(turn.chain, []).append(turn)
    gaps, queued, busy = [], [], []
    for chain in chains.values():
        chain.sort(key=lambda turn: turn.index)
        gaps += [(a.ended_s, b.arrived_s) for a, b in pairwise(chain)]
        for turn in chain:
            # A prompt's own time, as if nothing ran beside it; what is above was waiting.
            hit = turn.gpu_tokens + turn.cpu_tokens
            prefill_s = prefill_alone_s(machine, hit, turn.prompt_tokens)
            begins_s = max(turn.arrived_s, turn.first_token_s - prefill_s)
            queued.append((turn.arrived_s, begins_s))
            busy.append((begins_s, turn.ended_s))
    middle = top + ROW_HEIGHT / 2 - 2
    return [
        Mark("gap", "t-gap", charts.bars(gaps, x, middle, 2)),
        Mark("queued", "t-queued", charts.bars([s for s in queued if s[1] > s[0]], x, top, 9)),
        Mark("busy", "t-busy", charts.bars(busy, x, top, 9)),
    ]
