"""`kvtier status`: the control server and its engines at a glance."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kvtier.operator.command import TOP_LEVEL, Session, control_command
from kvtier.operator.durations import about
from kvtier.operator.output import (
    ago,
    plain,
    print_json,
    print_pairs,
    show_bytes,
    show_rate,
)

if TYPE_CHECKING:
    from kvtier.client import CpuTier, EngineStatus, GpuTier, Link, Queue

WAITING = "wait for its next step"


@control_command(
    TOP_LEVEL, "status", examples=("kvtier status", "kvtier status --json --target host:7461")
)
def status(session: Session) -> None:
    """Show the engines of this host: memory, CPU tier, link and queue."""
    found = session.client.get_status()
    if session.as_json:
        print_json(found)
        return
    now, console = datetime.now(UTC), session.console
    console.print(
        plain(
            f"control server {found.version} at {session.client.connection.target}, "
            f"up {ago(found.started_at, now) or 'for an unknown time'}, "
            f"watchers: {found.watchers}"
        ),
        soft_wrap=True,
    )
    if not found.engines:
        console.print("no engine is connected")
    for engine in found.engines:
        console.print()
        console.print(plain(f"{engine.engine_id}  {engine.model}"), style="bold")
        print_pairs(console, _lines(engine, now))


def _lines(engine: "EngineStatus", now: datetime) -> list[tuple[str, object]]:
    started = ago(engine.started_at, now) or "for an unknown time"
    versions = ", ".join(f"{name} {v}" for name, v in engine.versions.items())
    return [
        ("mode", engine.mode),
        ("process", f"{engine.pid}, up {started}"),
        ("gpu", _gpu(engine.gpu)),
        ("cpu tier", _cpu(engine.cpu)),
        ("link", _link(engine.link, now)),
        ("queue", _queue(engine.queue)),
        ("when idle", f"commands {'reach it at once' if engine.wakeable else WAITING}"),
        ("versions", versions),
        ("reported", f"{ago(engine.reported_at, now)} ago" if engine.reported_at else "never"),
    ]


def _gpu(gpu: "GpuTier") -> str:
    return (
        f"{show_bytes(gpu.total_bytes)}: {show_bytes(gpu.pinned_bytes)} pinned of a budget of "
        f"{show_bytes(gpu.budget_bytes)}, {show_bytes(gpu.free_bytes)} free; programs: {gpu.programs}"
    )


def _cpu(cpu: "CpuTier") -> str:
    used = "" if cpu.used_bytes is None else f"{show_bytes(cpu.used_bytes)} used of "
    return (
        f"{cpu.state}, {used}{show_bytes(cpu.total_bytes)}; programs being staged: {cpu.staging_programs}, "
        f"requests being loaded: {cpu.loading_requests}"
    )


def _link(link: "Link", now: datetime) -> str:
    measured = ago(link.calibrated_at, now)
    return (
        f"to cpu {show_rate(link.to_cpu_bytes_per_s)}, to gpu {show_rate(link.to_gpu_bytes_per_s)}; "
        + (f"calibrated {measured} ago" if measured else "not calibrated")
    )


def _queue(queue: "Queue") -> str:
    return (
        f"running: {queue.running_requests}, waiting: {queue.waiting_requests} "
        f"({queue.waiting_tokens:,} tokens), a new request waits {about(queue.delay_s)}"
    )
