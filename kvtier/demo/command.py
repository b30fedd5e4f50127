"""The command ``kvtier demo``."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import signal
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from tokenizers import Tokenizer

from kvtier import __version__
from kvtier.demo import repo_tools
from kvtier.demo.arms import (
    AGING_S,
    BLOCK_TOKENS,
    CHUNK_TOKENS,
    Arm,
    EngineConfig,
    engine_environment,
)
from kvtier.demo.driver import WorkError
from kvtier.demo.number_format import engine_dtype
from kvtier.demo.progress import DemoProgress
from kvtier.demo.report import ArmResult, build_report, render_html, write_json
from kvtier.demo.runner import DemoRun, run_arms
from kvtier.demo.servers import ServerError
from kvtier.demo.sizes import Size, SizeName, choose_size
from kvtier.demo.summary import print_summary
from kvtier.demo.workload import Workload, WorkloadConfig, build_workload
from kvtier.server.launch import SupervisorError, shm_free_bytes
from kvtier.setup.model import ModelSetupError, ensure_model
from kvtier.stop_signals import as_interrupt

_GIB = 1 << 30
_MIB = 1 << 20
_BY_SIZE = "that of the size"
_WHY_SMALL = (
    "this CPU does not multiply bfloat16: the demo computes in float32, the small workload (seven to ten minutes). "
    "--size full takes half an hour"
)


def demo(
    *,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained page to this file.")
    ] = None,
    size: Annotated[
        SizeName,
        typer.Option(
            help="How much work: full is 10 agents of 6 turns and some 2,000 tokens, small 8 of 4 turns and 1,200. "
            "auto is full where the engine computes in bfloat16, small on a CPU that does not multiply it."
        ),
    ] = SizeName.AUTO,
    programs: Annotated[
        int | None, typer.Option(min=1, help="Number of agents.", show_default=_BY_SIZE)
    ] = None,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Turns of each agent.", show_default=_BY_SIZE)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the workload.")] = 5,
    arms: Annotated[
        str,
        typer.Option(
            help="Engines to run, in this order: plain, stock, kvtier. kvtier's patience with new programs "
            f"follows the longest wait on plain; without plain before it, it is {AGING_S:g} s."
        ),
    ] = "plain,stock,kvtier",
    kv_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="KV memory of the engine in tokens.", show_default=_BY_SIZE),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model directory; default is the built-in small model.")
    ] = None,
    cpu_tier_gib: Annotated[
        float, typer.Option(min=0.1, help="CPU memory for KV in GiB (stock and kvtier).")
    ] = 1.5,
    engine_threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of a CPU engine; default leaves one core free."),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Keep the servers' logs in this new or empty directory.")
    ] = None,
) -> None:
    """Run the same agents on plain vLLM, on stock LMCache and on kvtier, and compare."""
    console = Console()
    # The command line's own logging would print every request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        chosen = _parse_arms(arms)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--arms") from None
    if work_dir is not None and work_dir.exists() and any(work_dir.iterdir()):
        raise typer.BadParameter(f"{work_dir} is not empty", param_hint="--work-dir")
    logs = work_dir or Path(tempfile.mkdtemp(prefix="kvtier-demo-"))
    try:
        for output in (json_file, html_file):
            _check_writable(output)
        logs.mkdir(parents=True, exist_ok=True)
        model_dir = model or ensure_model()
        on_cpu = "cpu" in metadata.version("vllm")
        dtype = engine_dtype(on_cpu=on_cpu)
        chosen_size = choose_size(size, dtype)
        workload = _build_workload(model_dir, _workload_config(chosen_size, programs, turns, seed))
        engine = EngineConfig(
            model=model_dir,
            kv_tokens=kv_tokens or chosen_size.kv_tokens,
            longest_tokens=workload.longest_tokens,
            cpu_tier_bytes=int(cpu_tier_gib * _GIB),
            engine_threads=engine_threads,
            on_cpu=on_cpu,
            dtype=dtype,
        )
        if size is SizeName.AUTO and chosen_size.name is SizeName.SMALL:
            console.print(_WHY_SMALL, highlight=False, soft_wrap=True)
        if set(chosen) != {Arm.PLAIN}:
            _check_shared_memory(engine.cpu_tier_bytes)
        with (
            as_interrupt(signal.SIGTERM),
            DemoProgress(console, chosen, len(workload.programs), workload.turns) as progress,
        ):
            results = run_arms(DemoRun(workload, engine, chosen, logs), progress)
    except KeyboardInterrupt:
        console.print("stopped; all servers are down")
        raise typer.Exit(130) from None
    except (
        ModelSetupError,
        ServerError,
        SupervisorError,
        WorkError,
        ValueError,
        OSError,
        httpx.HTTPError,
    ) as error:
        console.print(f"kvtier demo: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    finally:
        if work_dir is None:
            shutil.rmtree(logs, ignore_errors=True)
    _publish(console, workload, engine, chosen_size, results, json_file, html_file)


def _publish(
    console: Console,
    workload: Workload,
    engine: EngineConfig,
    size: Size,
    results: list[ArmResult],
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    report = build_report(
        _config_object(workload, engine, size), workload.digest(), len(workload.programs), results
    )
    print_summary(report, console)
    if json_file is not None:
        write_json(report, json_file)
        console.print(f"figures: {json_file}", highlight=False, markup=False, soft_wrap=True)
    if html_file is not None:
        html_file.write_text(render_html(report), encoding="utf-8")
        console.print(f"page: {html_file}", highlight=False, markup=False, soft_wrap=True)


def _parse_arms(text: str) -> tuple[Arm, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - {arm.value for arm in Arm})
    if unknown or not names or len(set(names)) != len(names):
        wrong = f"{', '.join(unknown)} is none of them" if unknown else f"not {text!r}"
        message = f"give some of plain, stock and kvtier, each at most once, with commas: {wrong}"
        raise ValueError(message)
    return tuple(Arm(name) for name in names)


def _check_writable(path: Path | None) -> None:
    """Say before the run, not after it, that a result cannot be written."""
    if path is not None and not os.access(path.parent, os.W_OK):
        message = f"cannot write {path}: no such directory, or not writable"
        raise OSError(message)


def _check_shared_memory(need_bytes: int) -> None:
    free_bytes = shm_free_bytes()
    if free_bytes < need_bytes:
        message = (
            f"shared memory has {free_bytes // _MIB} MiB free, the CPU memory for KV needs "
            f"{need_bytes // _MIB} MiB. Lower --cpu-tier-gib, or in Docker start the container "
            "with --shm-size=2g or --ipc=host"
        )
        raise SupervisorError(message)


def _workload_config(
    size: Size, programs: int | None, turns: int | None, seed: int
) -> WorkloadConfig:
    return WorkloadConfig(
        programs or size.programs,
        turns or size.turns,
        seed,
        first_prompt_tokens=size.first_prompt_tokens,
        output_tokens=size.output_tokens,
        result_tokens=size.result_tokens,
        start_interval_s=size.start_interval_s,
    )


def _build_workload(model_dir: Path, config: WorkloadConfig) -> Workload:
    tokenizer = Tokenizer.from_str((model_dir / "tokenizer.json").read_text(encoding="utf-8"))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return build_workload(config, encode, repo_tools.load_corpus())


def _config_object(workload: Workload, engine: EngineConfig, size: Size) -> dict[str, Any]:
    """What was run, in JSON types."""
    final_tokens = [program.final_tokens for program in workload.programs]
    return asdict(workload.config) | {
        "size": size.name.value,
        "model": engine.model.name,
        "kv_tokens": engine.blocks * BLOCK_TOKENS,
        "block_tokens": BLOCK_TOKENS,
        "chunk_tokens": CHUNK_TOKENS,
        "cpu_tier_bytes": engine.cpu_tier_bytes,
        "engine_threads": (
            int(engine_environment(engine)["OMP_NUM_THREADS"]) if engine.on_cpu else None
        ),
        "model_in_engine_process": (
            engine_environment(engine).get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
        ),
        "dtype": engine.dtype,
        "max_model_tokens": engine.max_model_tokens,
        "final_tokens": sum(final_tokens),
        "longest_tokens": max(final_tokens),
        "requests": workload.turns,
        "source_text_digest": repo_tools.corpus_digest(repo_tools.load_corpus()),
        "python": platform.python_version(),
        "vllm": metadata.version("vllm"),
        "lmcache": metadata.version("lmcache"),
        "kvtier": __version__,
        "cores": len(os.sched_getaffinity(0)),
    }
