"""A profile for a reader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.table import Table

from kvtier.copies.switch import MOVERS
from kvtier.linkbench.report import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtier.calibration import Profile
    from kvtier.copies.plan import Direction
    from kvtier.copies.switch import Switch

_WAYS: Final = {"d2h": "KV cache to host memory", "h2d": "and back", "both": "both at once"}
_DIRECTIONS: Final[tuple[Direction, ...]] = ("store", "load")
_COPY_BYTES: Final = 64 << 20
"""Of the copy for which the ways are compared."""


def profile_tables(profile: Profile) -> Iterator[Table]:
    """The link by run size, and prefill times."""
    link = Table(title="copies of the engine, GB/s by contiguous run", box=None)
    link.title_justify = "left"
    link.add_column("run", justify="right")
    columns = {
        f"{d} by {m.mover}": m.link for d in _DIRECTIONS for m in profile.movers if m.direction == d
    }
    columns = columns or {"store": profile.store, "load": profile.load}
    for name in columns:
        link.add_column(name, justify="right")
    for i, (size, _) in enumerate(profile.store.points):
        rates = (f"{measured.points[i][1] / 1e9:.1f}" for measured in columns.values())
        link.add_row(size_text(size), *rates)
    link.add_row("one copy, us", *(f"{m.latency_s * 1e6:.0f}" for m in columns.values()))
    yield link
    if profile.prefill:
        prefill = Table(title="prefill of one request", box=None, title_justify="left")
        for name in ("cached tokens", "new tokens", "seconds", "new tokens/s"):
            prefill.add_column(name, justify="right")
        for sample in profile.prefill:
            prefill.add_row(
                f"{sample.cached_tokens:,}",
                f"{sample.new_tokens:,}",
                f"{sample.seconds:.4f}",
                f"{sample.new_tokens / sample.seconds:,.0f}",
            )
        yield prefill


def profile_lines(profile: Profile) -> Iterator[str]:
    """What no table shows."""
    where = profile.gpu or profile.cpu
    driver = f", driver {profile.driver}" if profile.driver else ""
    yield f"{where}{driver}, {profile.measured_at}"
    if profile.ceilings:
        rates = (f"{_WAYS[way]} {rate / 1e9:.1f}" for way, rate in profile.ceilings.items())
        yield f"large copies, GB/s: {', '.join(rates)}"
    switch = profile.switch()
    sizes = [size for size, _ in profile.store.points]
    for direction in _DIRECTIONS if profile.movers else ():
        yield f"{direction}: {crossover(switch, direction, sizes)}"


def crossover(switch: Switch, direction: Direction, sizes: list[int]) -> str:
    """Up to which run size the kernel is the faster way."""
    if len({mover for way, mover in switch.times if way == direction}) < len(MOVERS):
        return "by DMA, the kernel cannot be used"
    chosen = [size for size in sizes if switch.choose(direction, _COPY_BYTES, size) == "kernel"]
    return f"by kernel for runs up to {size_text(max(chosen))}" if chosen else "by DMA always"
