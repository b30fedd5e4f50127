"""The command ``kvtier calibrate``."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from kvtier.calibration import (
    CalibrationError,
    Profile,
    fastest,
    load_profile,
    machine_profile_path,
    measure_link,
    measure_movers,
    profile_of,
    save_profile,
)
from kvtier.config import ConfigError, Settings
from kvtier.copies.driver import DriverError
from kvtier.linkbench.device import device_named
from kvtier.measuring.ceiling import measure_ceilings
from kvtier.measuring.show import profile_lines, profile_tables
from kvtier.paths import cache_dir

if TYPE_CHECKING:
    from collections.abc import Sequence


def calibrate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Model name or directory; other flags are those of vllm serve."),
    ] = None,
    *,
    link_only: Annotated[
        bool,
        typer.Option("--link-only", help="Measure copies alone: no model, for every engine here."),
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="For prefill times; the long ones come last.", metavar="SECONDS")
    ] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
    running: Annotated[
        bool,
        typer.Option(
            "--running",
            help="Let the engines that run measure their link anew: see kvtier calibrate --running --help.",
        ),
    ] = False,
) -> None:
    """Measure this machine for MODEL: the link to host memory, the engine's copies, prefill times.

    The result is kept as a profile, which engines start from. With MODEL a temporary engine is started
    with the flags that you serve it with.
    """
    out, log = Console(), Console(stderr=True, highlight=False)
    assert not running, "kvtier.cli hands this over to the operator's command"
    if (model is None) != link_only:
        log.print("kvtier: give a MODEL, or --link-only", markup=False)
        raise typer.Exit(2)
    try:
        settings = Settings.load()
        directory = settings.profile_dir or cache_dir() / "profiles"
        if model is None:
            path, profile = _link_profile(directory, log)
        else:
            path, profile = _model_profile(model, context.args, seconds, log)
        save_profile(path, profile)
    except (CalibrationError, ConfigError, DriverError, OSError, ValueError) as error:
        log.print(f"kvtier: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps({"file": str(path), **dataclasses.asdict(profile)}))
        return
    for line in profile_lines(profile):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    for table in profile_tables(profile):
        out.print()
        out.print(table)
    out.print()
    out.print(f"kept in {path}", highlight=False, markup=False, soft_wrap=True)


def _link_profile(directory: Path, log: Console) -> tuple[Path, Profile]:
    device = device_named("auto")
    log.print("measuring large copies", markup=False)
    ceilings = measure_ceilings(device)
    log.print("measuring the engine's copies", markup=False)
    movers = measure_movers(device)
    links = fastest(movers) if movers else measure_link(device)
    profile = profile_of("", "", device, links, movers=movers, ceilings=ceilings)
    return machine_profile_path(directory), profile


def _model_profile(
    model: str, words: Sequence[str], seconds: float, log: Console
) -> tuple[Path, Profile]:
    """Start an engine, which measures its link, and measure prefill through it."""
    from kvtier.serving.engine_env import engine_env  # noqa: PLC0415 - with a model only
    from kvtier.serving.plan import VllmFlags, plan_serve  # noqa: PLC0415
    from kvtier.serving.process import runs_on_cpu  # noqa: PLC0415

    cpu = runs_on_cpu()
    plan = plan_serve(
        model, words, cpu=cpu, chat_template=None, program_scheduler=False, middleware=False
    )
    os.environ.update(engine_env(os.environ, cpu=cpu, offline=Path(model).is_dir()))
    # The engine is in this process: what is timed must not wait for messages.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    log.print("measuring large copies", markup=False)
    device = device_named("cpu" if cpu else "auto")
    ceilings = measure_ceilings(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    from kvtier.measuring.prefill import TemporaryEngine, measure_prefill  # noqa: PLC0415 - vLLM

    log.print("starting a temporary engine, which measures its copies", markup=False)
    served = VllmFlags(plan.argv[plan.argv.index("serve") + 1 :]).without("--kv-transfer-config")
    engine = TemporaryEngine(["--model", *served])
    profile = load_profile(engine.profile)
    if profile is None:
        raise CalibrationError(f"{engine.profile}: the engine saved no profile there")
    log.print("measuring prefill times", markup=False)

    def told(cached: int, new: int, taken_s: float | None) -> None:
        if taken_s is not None:
            log.print(f"  {new:,} tokens after {cached:,}: {taken_s:.3f} s", markup=False)

    samples = measure_prefill(engine.limits, engine.prefill_s, budget_s=seconds, told=told)
    changes: dict[str, Any] = {"prefill": tuple(samples), "ceilings": ceilings}
    return engine.profile, dataclasses.replace(profile, **changes)
