"""How `kvtier top` draws a view: engines with bars, programs, decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from kvtier.operator.durations import about
from kvtier.operator.output import ago, make_table, plain, show_bytes, show_rate
from kvtier.operator.programs import program_table
from kvtier.operator.reasons import headline
from kvtier.operator.top_view import STATES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from kvtier.client import EngineStatus
    from kvtier.operator.top_view import View

BAR_WIDTH: Final = 32
_STATE_STYLES: Final = {"ready": "green", "starting": "yellow", "lost": "red", "off": "dim"}


@dataclass(frozen=True, slots=True)
class Bar:
    """Parts of a whole, side by side; what they leave is empty.

    Attributes:
        parts: Amount, mark, mark where there is only ASCII, and style of each.
        whole: Of which they are parts; 0: nothing is known.
    """

    parts: Sequence[tuple[float, str, str, str]]
    whole: float

    def cells(self) -> list[int]:
        """Return the width of each part; a part that is there is seen."""
        widths: list[int] = []
        left = BAR_WIDTH
        for amount, *_ in self.parts:
            share = min(1.0, amount / self.whole) if self.whole > 0 else 0.0
            width = max(int(amount > 0), round(share * BAR_WIDTH))
            widths.append(min(left, width))
            left -= widths[-1]
        return widths

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Take no more room than it needs."""
        del console, options
        return Measurement(BAR_WIDTH, BAR_WIDTH)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        del console
        widths = self.cells()
        for (_, mark, ascii_mark, style), width in zip(self.parts, widths, strict=True):
            text = (ascii_mark if options.ascii_only else mark) * width
            yield Segment(text, Style.parse(style))
        yield Segment(("." if options.ascii_only else "░") * (BAR_WIDTH - sum(widths)))


def frame(view: View) -> RenderableType:
    """Return what is drawn of a view."""
    parts: list[RenderableType] = [_heading(view)]
    if view.trouble:
        parts.append(Text(plain(view.trouble), style="bold red"))
    for engine in view.status.engines:
        parts += [Text(), _engine(engine, view)]
    if not view.status.engines:
        parts.append(Text("no engine is connected"))
    parts += [Text(), Text("programs", style="bold"), _programs(view)]
    parts += [Text(), Text("last decisions", style="bold"), _decisions(view)]
    return Group(*parts)


def _heading(view: View) -> Text:
    counts = ", ".join(f"{view.counts.get(state, 0):,} {state}" for state in STATES)
    text = Text(f"kvtier {plain(view.status.version)}", style="bold")
    text.append(f"  {plain(view.where)}  programs: {counts}", style="not bold")
    return text


def _engine(engine: EngineStatus, view: View) -> Table:
    gpu, cpu, queue, link = engine.gpu, engine.cpu, engine.queue, engine.link
    others = max(0, gpu.total_bytes - gpu.free_bytes - gpu.pinned_bytes)
    grid = Table.grid(padding=(0, 1))
    for _ in range(3):
        grid.add_column(no_wrap=True)
    age = ago(engine.reported_at, view.taken_at)
    grid.add_row(
        Text("engine", style="bold"),
        Text(plain(f"{engine.engine_id}  {engine.mode}"), style="bold"),
        Text(plain(f"{engine.model}  reported {age or 'never'}" + (" ago" if age else ""))),
    )
    grid.add_row(
        "gpu",
        Bar(
            [(gpu.pinned_bytes, "█", "#", "cyan"), (others, "▓", "=", "blue")],
            gpu.total_bytes,
        ),
        f"{show_bytes(gpu.pinned_bytes)} pinned + {show_bytes(others)} other of "
        f"{show_bytes(gpu.total_bytes)}",
    )
    grid.add_row(
        "pins",
        Bar([(gpu.pinned_bytes, "█", "#", "cyan")], gpu.budget_bytes),
        f"{show_bytes(gpu.pinned_bytes)} of a budget of {show_bytes(gpu.budget_bytes)}",
    )
    used = "" if cpu.used_bytes is None else f"{show_bytes(cpu.used_bytes)} used of "
    grid.add_row(
        "cpu",
        Text(plain(cpu.state), style=_STATE_STYLES.get(cpu.state, "")),
        f"{used}{show_bytes(cpu.total_bytes)}, staging {cpu.staging_programs} programs, loading "
        f"{cpu.loading_requests} requests",
    )
    grid.add_row(
        "link",
        f"to cpu {show_rate(link.to_cpu_bytes_per_s)}",
        f"to gpu {show_rate(link.to_gpu_bytes_per_s)}",
    )
    grid.add_row(
        "queue",
        f"{queue.running_requests} running, {queue.waiting_requests} waiting",
        f"{queue.waiting_tokens:,} tokens, a new request waits {about(queue.delay_s)}",
    )
    return grid


def _programs(view: View) -> RenderableType:
    if not view.programs:
        return Text("none", style="dim")
    return program_table(view.programs, view.taken_at)


def _decisions(view: View) -> RenderableType:
    lost = Text(f"lost events: {view.lost_events}", style="yellow") if view.lost_events else Text()
    if not view.decisions:
        return Group(Text("none seen yet", style="dim"), lost)
    rows = [
        (
            ago(decided.decision.decided_at, view.taken_at),
            decided.name,
            headline(decided.decision),
            decided.decision.reason,
        )
        for decided in view.decisions
    ]
    return Group(make_table(("ago>", "program", "decision", "reason"), rows), lost)
